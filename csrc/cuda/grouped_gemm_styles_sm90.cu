// grouped_gemm, its dgrad and the down-projection on sm_90a with a hidden epilogue.
#include "sm90/variant.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T>
void store_as(const RowProduct& product, const GemmChoice& choice, void* out, const void* bias,
              const RowUse& use, Stream stream) {
  run_variant<HiddenStyle<StoreRows<T, 256>>>(
      "row_product_hidden_sm90", product, choice, tile_count(product.width, 256), 256, 128,
      {static_cast<T*>(out), static_cast<const T*>(bias), product.width, use}, stream);
}

}  // namespace

void store_product_hidden(const RowProduct& product, const GemmChoice& choice, void* out,
                          const void* bias, const RowUse& use, Stream stream) {
  product.dtype == DType::f16 ? store_as<__half>(product, choice, out, bias, use, stream)
                              : store_as<__nv_bfloat16>(product, choice, out, bias, use, stream);
}

}  // namespace moekernels::cuda::sm90
