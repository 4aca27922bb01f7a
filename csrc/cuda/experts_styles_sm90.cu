// The experts' first product on sm_90a with a hidden epilogue, and down's dgrad in ping-pong.
#include "sm90/ffn.cuh"
#include "sm90/variant.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T>
void up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  up_with<T>(args, [&](const RowProduct& product, auto... rest) {
    run_variant<HiddenStyle<StoreUp<T>>>("experts_up_hidden_sm90", product, choice, rest...,
                                         stream);
  });
}

template <class T>
void dact(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  using Store = StoreDAct<T, 128>;
  dact_with<Store>(args, [&](const RowProduct& product, auto... rest) {
    run_variant<PingpongStyle<Store>>("experts_dact_pingpong_sm90", product, choice, rest...,
                                      stream);
  });
}

}  // namespace

void experts_up_hidden(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.dtype == DType::f16 ? up<__half>(args, choice, stream)
                              : up<__nv_bfloat16>(args, choice, stream);
}

void experts_dact_pingpong(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream) {
  args.of.dtype == DType::f16 ? dact<__half>(args, choice, stream)
                              : dact<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
