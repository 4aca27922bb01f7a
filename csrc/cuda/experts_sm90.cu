// The experts' products on sm_90a, their nonlinearities in the epilogues.
#include "moekernels/experts.h"

#include "sm90/dact.cuh"
#include "sm90/entry.cuh"
#include "sm90/product.cuh"
#include "sm90/run.cuh"
#include "sm90/up.cuh"

namespace moekernels::cuda::sm90 {
namespace {

ExpertStyle style_of(const ExpertsArgs& args) {
  return {args.ffn, args.activation, static_cast<float>(args.alpha), static_cast<float>(args.limit),
          args.interleaved};
}
RowUse use_of(const ExpertsArgs& args) {
  return {args.token_of, static_cast<const float*>(args.weights), args.tokens};
}

template <class T>
void up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
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
  product.run<StoreUp<T>>("experts_up_sm90", choice,
                          tile_count(style.apart() ? of.ffn : style.width(), tile), tile,
                          style.apart() ? of.ffn : 128, to, stream);
}

template <class T>
void dact(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  const ExpertsArgs& of = args.of;
  static_assert(StoreDAct<T>::kPartColumns == kDWeightsColumns);
  const RowProduct product{.rows = args.dy,
                           .w = of.w2,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.hidden,
                           .width = of.ffn,
                           .experts = of.experts,
                           .along_n = !of.transposed,
                           .dtype = of.dtype};
  const typename StoreDAct<T>::Args to{static_cast<const T*>(args.h),
                                       static_cast<T*>(args.dh),
                                       static_cast<T*>(args.weighted_a),
                                       static_cast<float*>(args.dweights_parts),
                                       experts_dweights_parts(of.ffn),
                                       style_of(of),
                                       use_of(of)};
  product.run<StoreDAct<T>>("experts_dact_sm90", choice, tile_count(of.ffn, 256), 256, 128, to,
                            stream);
}

}  // namespace

void experts_up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.dtype == DType::f16 ? up<__half>(args, choice, stream)
                              : up<__nv_bfloat16>(args, choice, stream);
}

void experts_down(const ExpertsDownArgs& args, const GemmChoice& choice, Stream stream) {
  const ExpertsArgs& of = args.of;
  const RowProduct product{.rows = args.a,
                           .w = of.w2,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.ffn,
                           .width = of.hidden,
                           .experts = of.experts,
                           .along_n = of.transposed,
                           .dtype = of.dtype};
  store_product("experts_down_sm90", product, choice, args.y, of.b2, use_of(of), stream);
}

void experts_dact(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.dtype == DType::f16 ? dact<__half>(args, choice, stream)
                              : dact<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
