// The products of a layer in a chain of launches, in bf16 and the direct style.
#include "sm90/chained.cuh"
#include "sm90/entry.cuh"
#include "sm90/ffn.cuh"
#include "sm90/gathered.cuh"
#include "sm90/styles.cuh"

namespace moekernels::cuda::sm90 {
namespace {

using T = __nv_bfloat16;

template <int kColumns>
void store_as(const RowProduct& product, const GemmChoice& choice, void* out, const void* bias,
              const RowUse& use, Stream stream) {
  product.run<StoreRows<T, kColumns>, InChain>(
      "row_product_chained_sm90", choice, tile_count(product.width, kColumns), kColumns, 128,
      {static_cast<T*>(out), static_cast<const T*>(bias), product.width, use}, stream);
}

void wgrad_into_sums(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  using Epilogue = AddGradient<T>;
  const char* name = "grouped_wgrad_add_chained_sm90";
  RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  const auto kernel = chained_into_sums<Epilogue>;
  const ProductLaunch of = prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
  launch_blocks<InChain>(name, kernel, of, stream, sum.a(args, promotion), sum.b(args, promotion),
                         sum.sums(args, Epilogue::kBoxRows), sum.product, args.dw, args.m, args.n,
                         note_launch(name));
}

template <bool kAccumulate>
void wgrad(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  const RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  launch_product<StoreGradient<T, RowSum::kColumns, kAccumulate>, true, true, InChain>(
      "grouped_wgrad_chained_sm90", choice, sum.tiles, sum.a(args, promotion),
      sum.b(args, promotion), sum.product, {args.dw, args.m, args.n}, stream);
}

}  // namespace

void experts_up_chained(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  up_with<T>(args, [&](const RowProduct& product, auto... rest) {
    product.run<StoreUp<T>, InChain>("experts_up_chained_sm90", choice, rest..., stream);
  });
}

void experts_dact_chained(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  dact_with<StoreDAct<T>>(args, [&](const RowProduct& product, auto... rest) {
    product.run<StoreDAct<T>, InChain>("experts_dact_chained_sm90", choice, rest..., stream);
  });
}

void store_product_chained(const RowProduct& product, const GemmChoice& choice, void* out,
                           const void* bias, const RowUse& use, Stream stream) {
  const auto run = choice.tile_n == 128 ? store_as<128> : store_as<256>;
  run(product, choice, out, bias, use, stream);
}

void grouped_wgrad_chained(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  const auto run = !args.accumulate             ? wgrad<false>
                   : order_of(choice).bulk_sums ? wgrad_into_sums
                                                : wgrad<true>;
  run(args, choice, stream);
}

void experts_up_gathered_chained(const ExpertsUpArgs& args, const GemmChoice& choice,
                                 Stream stream) {
  up_gathered<T, InChain>(args, choice, stream);
}

void grouped_wgrad_gathered_chained(const GroupedWgradArgs& args, const GemmChoice& choice,
                                    Stream stream) {
  wgrad_gathered<T, InChain>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
