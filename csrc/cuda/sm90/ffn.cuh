// The experts' products on sm_90a as launchers see them: operands, epilogues' arguments and columns
// of a tile, the same for every style.
#pragma once

#include "dact.cuh"
#include "moekernels/experts.h"
#include "run.cuh"
#include "up.cuh"

namespace moekernels::cuda::sm90 {

inline ExpertStyle style_of(const ExpertsArgs& args) {
  return {args.ffn, args.activation, static_cast<float>(args.alpha), static_cast<float>(args.limit),
          args.interleaved};
}
inline RowUse use_of(const ExpertsArgs& args) {
  return {args.token_of, static_cast<const float*>(args.weights), args.tokens};
}

// run(product, column tiles, their step, a tile's second half, arguments).
template <class T, class Run>
void up_with(const ExpertsUpArgs& args, const Run& run) {
  const ExpertsArgs& of = args.of;
  const ExpertStyle style = style_of(of);
  const RowProduct product{.rows = of.x,
                           .w = of.w1,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.hidden,
                           .width = style.width(),
                           .experts = of.experts,
                           .along_n = of.transposed,
                           .dtype = of.dtype};
  const typename StoreUp<T>::Args to{static_cast<T*>(args.h), static_cast<T*>(args.a),
                                     static_cast<const T*>(of.b1), style};
  const int64_t tile = style.apart() ? 128 : 256;
  run(product, tile_count(style.apart() ? of.ffn : style.width(), tile), tile,
      style.apart() ? of.ffn : 128, to);
}

template <class Store, class Run>
void dact_with(const ExpertsDActArgs& args, const Run& run) {
  using T = typename Store::Type;
  const ExpertsArgs& of = args.of;
  static_assert(Store::kPartColumns == kDWeightsColumns);
  const RowProduct product{.rows = args.dy,
                           .w = of.w2,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.hidden,
                           .width = of.ffn,
                           .experts = of.experts,
                           .along_n = !of.transposed,
                           .dtype = of.dtype};
  const typename Store::Args to{static_cast<const T*>(args.h),
                                static_cast<T*>(args.dh),
                                static_cast<T*>(args.weighted_a),
                                static_cast<float*>(args.dweights_parts),
                                experts_dweights_parts(of.ffn),
                                style_of(of),
                                use_of(of)};
  run(product, tile_count(of.ffn, Store::kColumns), Store::kColumns, 128, to);
}

}  // namespace moekernels::cuda::sm90
