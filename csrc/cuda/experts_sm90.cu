// The experts' products on sm_90a, their nonlinearities in the epilogues.
#include "moekernels/experts.h"

#include "sm90/entry.cuh"
#include "sm90/ffn.cuh"
#include "sm90/styles.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T>
void up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  up_with<T>(args, [&](const RowProduct& product, auto... rest) {
    product.run<StoreUp<T>>("experts_up_sm90", choice, rest..., stream);
  });
}

template <class T>
void dact(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  dact_with<StoreDAct<T>>(args, [&](const RowProduct& product, auto... rest) {
    product.run<StoreDAct<T>>("experts_dact_sm90", choice, rest..., stream);
  });
}

}  // namespace

void experts_up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  if (takes("experts_up_sm90", choice, GemmStyle::hidden))
    return experts_up_hidden(args, choice, stream);
  if (in_chain(args.of.dtype)) return experts_up_chained(args, choice, stream);
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
  if (takes("experts_dact_sm90", choice, GemmStyle::pingpong))
    return experts_dact_pingpong(args, choice, stream);
  if (in_chain(args.of.dtype)) return experts_dact_chained(args, choice, stream);
  args.of.dtype == DType::f16 ? dact<__half>(args, choice, stream)
                              : dact<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
