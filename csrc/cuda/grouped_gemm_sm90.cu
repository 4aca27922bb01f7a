// grouped_gemm, its dgrad and its wgrad on sm_90a.
#include "moekernels/grouped_gemm.h"

#include "sm90/entry.cuh"
#include "sm90/product.cuh"
#include "sm90/run.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T, int kColumns>
void store_as(const char* name, const RowProduct& product, const GemmChoice& choice, void* out,
              const void* bias, const RowUse& use, Stream stream) {
  product.run<StoreRows<T, kColumns>>(
      name, choice, tile_count(product.width, kColumns), kColumns, 128,
      {static_cast<T*>(out), static_cast<const T*>(bias), product.width, use}, stream);
}

template <class T, bool kAccumulate>
void wgrad(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  constexpr int kColumns = 256;
  using Epilogue = StoreGradient<T, kColumns, kAccumulate>;
  const ProductArgs product{
      .offsets = args.offsets,
      .token_of = args.token_of,
      .rows = args.num_rows,
      .tokens = args.tokens,
      .experts = static_cast<int32_t>(args.experts),
      .depth = 0,
      .row_tiles = static_cast<int32_t>(tile_count(args.m, kTileRows)),
      .column_tiles = static_cast<int32_t>(tile_count(args.n, kColumns)),
      .column_step = kColumns,
      .second_half = 128,
      .stages = 0,
      .band = 0,
      .skip_empty = kAccumulate,
      .prefetch = false,
  };
  const int64_t tiles = args.experts * product.row_tiles * product.column_tiles;
  const int promotion = order_of(choice).promotion;
  launch_product<Epilogue, true, true>(
      "grouped_wgrad_sm90", choice, tiles,
      tensor_map(args.dtype, args.a, {args.m, args.num_rows}, 64, promotion),
      tensor_map(args.dtype, args.b, {args.n, args.num_rows}, 64, promotion), product,
      {args.dw, args.m, args.n}, stream);
}

template <class T>
void wgrad_of(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.accumulate ? wgrad<T, true>(args, choice, stream) : wgrad<T, false>(args, choice, stream);
}

}  // namespace

void store_product(const char* name, const RowProduct& product, const GemmChoice& choice, void* out,
                   const void* bias, const RowUse& use, Stream stream) {
  const bool half = product.dtype == DType::f16, narrow = choice.tile_n == 128;
  const auto run = half     ? narrow ? store_as<__half, 128> : store_as<__half, 256>
                   : narrow ? store_as<__nv_bfloat16, 128>
                            : store_as<__nv_bfloat16, 256>;
  run(name, product, choice, out, bias, use, stream);
}

void grouped_gemm(const GroupedGemmArgs& args, const GemmChoice& choice, Stream stream) {
  const RowProduct product{.rows = args.rows,
                           .w = args.w,
                           .offsets = args.offsets,
                           .num_rows = args.num_rows,
                           .depth = args.in,
                           .width = args.out_width,
                           .experts = args.experts,
                           .along_n = args.transposed,
                           .dtype = args.dtype};
  store_product("grouped_gemm_sm90", product, choice, args.out, nullptr, {nullptr, nullptr, 0},
                stream);
}

void grouped_wgrad(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.dtype == DType::f16 ? wgrad_of<__half>(args, choice, stream)
                           : wgrad_of<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
