// The launchers of the products that gather the rows of x as they load them: the experts' first,
// and the gradient of its weights. How: GatherInTurn, or chained.cuh's.
#pragma once

#include "gather.cuh"
#include "moekernels/experts.h"
#include "run.cuh"
#include "up.cuh"

namespace moekernels::cuda::sm90 {

struct GatherInTurn {
  static constexpr bool kChained = false;
  template <class Epilogue, bool kOverRows, bool kAlongN, bool kOfB>
  static constexpr auto gathered = product_gathered<Epilogue, kOverRows, kAlongN, kOfB>;
  template <class Epilogue, bool kOfB>
  static constexpr auto gathered_into_sums = product_gathered_into_sums<Epilogue, kOfB>;
};

template <class T, bool kAlongN, class How>
void up_gathered(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  const char* name =
      How::kChained ? "experts_up_gathered_chained_sm90" : "experts_up_gathered_sm90";
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
  const auto kernel = How::template gathered<StoreUp<T>, false, kAlongN, false>;
  const ProductLaunch launched =
      prepare(name, kernel, StoreUp<T>::kColumns, choice,
              row_tiles_bound(of.num_rows, of.experts, kTileRows) * column_tiles, product);
  launch_blocks<How>(name, kernel, launched, stream, w, from, product, to, note_launch(name));
}

template <class T, bool kOfB, class How>
void wgrad_gathered(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  const char* name = args.accumulate ? How::kChained ? "grouped_wgrad_add_gathered_chained_sm90"
                                                     : "grouped_wgrad_add_gathered_sm90"
                     : How::kChained ? "grouped_wgrad_gathered_chained_sm90"
                                     : "grouped_wgrad_gathered_sm90";
  RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  const CUtensorMap other = kOfB ? sum.a(args, promotion) : sum.b(args, promotion);
  const Gather from{kOfB ? args.b : args.a, args.token_of, args.tokens,
                    static_cast<int32_t>(kOfB ? args.n : args.m)};
  if (args.accumulate) {
    using Epilogue = AddGradient<T>;
    const CUtensorMap sums = sum.sums(args, Epilogue::kBoxRows);
    const auto kernel = How::template gathered_into_sums<Epilogue, kOfB>;
    const ProductLaunch launched =
        prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
    launch_blocks<How>(name, kernel, launched, stream, other, sums, from, sum.product, args.dw,
                       args.m, args.n, note_launch(name));
  } else {
    using Epilogue = StoreGradient<T, RowSum::kColumns, false>;
    const auto kernel = How::template gathered<Epilogue, true, true, kOfB>;
    const ProductLaunch launched =
        prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product);
    const typename Epilogue::Args to{args.dw, args.m, args.n};
    launch_blocks<How>(name, kernel, launched, stream, other, from, sum.product, to,
                       note_launch(name));
  }
}

// The way that the orientation of the weights, or the operand that is gathered, asks for.
template <class T, class How>
void up_gathered(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.transposed ? up_gathered<T, true, How>(args, choice, stream)
                     : up_gathered<T, false, How>(args, choice, stream);
}
template <class T, class How>
void wgrad_gathered(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.gather_b ? wgrad_gathered<T, true, How>(args, choice, stream)
                : wgrad_gathered<T, false, How>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
