// The products of sm_90a that gather the rows of x as they load them: the experts' first, and the
// gradient of its weights.
#include "sm90/entry.cuh"
#include "sm90/gather.cuh"
#include "sm90/run.cuh"
#include "sm90/up.cuh"

namespace moekernels::cuda::sm90 {
namespace {

// Copies of 16 bytes cost a product about 6 % of its time, permuting the rows before it the time of
// moving them twice: what is more depends on the columns that each row meets.
constexpr int64_t kGatherBelow = 4096;

template <class T, bool kAlongN>
void up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  const char* name = "experts_up_gathered_sm90";
  const ExpertsArgs& of = args.of;
  const ExpertStyle style{of.ffn, of.activation, static_cast<float>(of.alpha),
                          static_cast<float>(of.limit), of.interleaved};
  const int64_t step = style.apart() ? 128 : 256,
                column_tiles = tile_count(style.apart() ? of.ffn : style.width(), step);
  ProductArgs product{.offsets = of.offsets,
                      .token_of = nullptr,
                      .rows = of.num_rows,
                      .tokens = 0,
                      .experts = static_cast<int32_t>(of.experts),
                      .depth = static_cast<int32_t>(of.hidden),
                      .row_tiles = 0,
                      .column_tiles = static_cast<int32_t>(column_tiles),
                      .column_step = static_cast<int32_t>(step),
                      .second_half = static_cast<int32_t>(style.apart() ? of.ffn : 128),
                      .stages = 0,
                      .band = 0,
                      .skip_empty = true,
                      .prefetch = false};
  const int promotion = order_of(choice).promotion;
  const CUtensorMap w =
      kAlongN ? tensor_map(of.dtype, of.w1, {style.width(), of.hidden, of.experts}, 64, promotion)
              : tensor_map(of.dtype, of.w1, {of.hidden, style.width(), of.experts}, 128, promotion);
  const typename StoreUp<T>::Args to{static_cast<T*>(args.h), static_cast<T*>(args.a),
                                     static_cast<const T*>(of.b1), style};
  const Gather from{of.x, of.token_of, of.tokens, static_cast<int32_t>(of.hidden)};
  const auto kernel = product_gathered<StoreUp<T>, false, kAlongN, false>;
  const auto [blocks, bytes] =
      prepare(name, kernel, StoreUp<T>::kColumns, choice,
              row_tiles_bound(of.num_rows, of.experts, kTileRows) * column_tiles, product);
  launch(name, kernel, blocks, kProductThreads, bytes, stream, w, from, product, to,
         note_launch(name));
}

template <class T, bool kOfB>
void wgrad(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  const char* name =
      args.accumulate ? "grouped_wgrad_add_gathered_sm90" : "grouped_wgrad_gathered_sm90";
  RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  const CUtensorMap other = kOfB ? sum.a(args, promotion) : sum.b(args, promotion);
  const Gather from{kOfB ? args.b : args.a, args.token_of, args.tokens,
                    static_cast<int32_t>(kOfB ? args.n : args.m)};
  if (args.accumulate) {
    using Epilogue = AddGradient<T>;
    const CUtensorMap sums = sum.sums(args, Epilogue::kBoxRows);
    const auto kernel = product_gathered_into_sums<Epilogue, kOfB>;
    const auto [blocks, bytes] =
        prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
    launch(name, kernel, blocks, kProductThreads, bytes, stream, other, sums, from, sum.product,
           args.dw, args.m, args.n, note_launch(name));
  } else {
    using Epilogue = StoreGradient<T, RowSum::kColumns, false>;
    const auto kernel = product_gathered<Epilogue, true, true, kOfB>;
    const auto [blocks, bytes] =
        prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
    const typename Epilogue::Args to{args.dw, args.m, args.n};
    launch(name, kernel, blocks, kProductThreads, bytes, stream, other, from, sum.product, to,
           note_launch(name));
  }
}

template <class T>
void wgrad_of(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.gather_b ? wgrad<T, true>(args, choice, stream) : wgrad<T, false>(args, choice, stream);
}

template <class T>
void up_of(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.transposed ? up<T, true>(args, choice, stream) : up<T, false>(args, choice, stream);
}

bool gathers(const GemmChoice& choice, int64_t columns) {
  const GemmOrder order = order_of(choice);
  if (order.style != GemmStyle::direct || order.pair != GemmPair::none) return false;
  return order.gather >= 0 ? order.gather != 0 : columns < kGatherBelow;
}

}  // namespace

bool gathers(const ExpertsUpArgs& args, const GemmChoice& choice) {
  return gathers(choice, (args.of.activation <= Activation::swiglu_clamped ? 2 : 1) * args.of.ffn);
}

bool gathers(const GroupedWgradArgs& args, const GemmChoice& choice) {
  if (args.accumulate && !order_of(choice).bulk_sums) return false;  // threads add permuted rows
  return gathers(choice, args.gather_b ? args.m : args.n);
}

void experts_up_gathered(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.dtype == DType::f16 ? up_of<__half>(args, choice, stream)
                              : up_of<__nv_bfloat16>(args, choice, stream);
}

void grouped_wgrad_gathered(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.dtype == DType::f16 ? wgrad_of<__half>(args, choice, stream)
                           : wgrad_of<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
