// grouped_gemm, its dgrad and its wgrad on sm_90a.
#include "moekernels/grouped_gemm.h"

#include "sm90/add.cuh"
#include "sm90/entry.cuh"
#include "sm90/run.cuh"
#include "sm90/styles.cuh"

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
  using Epilogue = StoreGradient<T, RowSum::kColumns, kAccumulate>;
  const RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  launch_product<Epilogue, true, true>("grouped_wgrad_sm90", choice, sum.tiles,
                                       sum.a(args, promotion), sum.b(args, promotion), sum.product,
                                       {args.dw, args.m, args.n}, stream);
}

template <class T>
void wgrad_into_sums(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  using Epilogue = AddGradient<T>;
  const char* name = "grouped_wgrad_add_sm90";
  RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  const auto kernel = product_into_sums<Epilogue>;
  const auto [blocks, bytes] =
      prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
  launch(name, kernel, blocks, kProductThreads, bytes, stream, sum.a(args, promotion),
         sum.b(args, promotion), sum.sums(args, Epilogue::kBoxRows), sum.product, args.dw, args.m,
         args.n, note_launch(name));
}

template <class T>
void wgrad_of(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  const auto run = !args.accumulate             ? wgrad<T, false>
                   : order_of(choice).bulk_sums ? wgrad_into_sums<T>
                                                : wgrad<T, true>;
  run(args, choice, stream);
}

}  // namespace

void store_product(const char* name, const RowProduct& product, const GemmChoice& choice, void* out,
                   const void* bias, const RowUse& use, Stream stream) {
  if (takes(name, choice, GemmStyle::hidden))
    return store_product_hidden(product, choice, out, bias, use, stream);
  if (in_chain(product.dtype))
    return store_product_chained(product, choice, out, bias, use, stream);
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
  const char* name = "grouped_wgrad_sm90";
  if (args.accumulate && order_of(choice).bulk_sums) {
    if (takes(name, choice, GemmStyle::pingpong))
      return grouped_wgrad_pingpong(args, choice, stream);
  } else {  // a row of the table that names a style says nothing of these
    GemmChoice own = choice;
    own.order.style = GemmStyle::direct;
    own.order.pair = GemmPair::none;
    takes(name, own, GemmStyle::direct);
  }
  if (in_chain(args.dtype)) return grouped_wgrad_chained(args, choice, stream);
  args.dtype == DType::f16 ? wgrad_of<__half>(args, choice, stream)
                           : wgrad_of<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
