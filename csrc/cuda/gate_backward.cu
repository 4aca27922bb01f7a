// The gradient of the logits from those of the weights and of the sums, in one pass over the
// logits.
#include <type_traits>

#include "detail/gate.cuh"
#include "detail/launch.cuh"

namespace moekernels::cuda {
namespace {

// From the gradients of a token's weights to those of its chosen scores, in place; chosen and
// divisor as `weigh` left them.
template <class Tm>
__device__ void weigh_backward(const float* chosen, float divisor, int top_k, bool soft,
                               bool renormalize, float* dchosen) {
  Tm::sync();
  float dot = 0;
  if (renormalize) {
    for (int k = 0; k < top_k; ++k) dot += dchosen[k] * chosen[k];
    if (divisor <= kTiny) dot = 0;  // then the divisor is a constant
    Tm::sync();
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes) dchosen[k] = (dchosen[k] - dot) / divisor;
    Tm::sync();
  }
  if (soft) {
    dot = 0;
    for (int k = 0; k < top_k; ++k) dot += dchosen[k] * chosen[k] * divisor;
    Tm::sync();
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes)
      dchosen[k] = chosen[k] * divisor * (dchosen[k] - dot);
    Tm::sync();
  }
}

template <class Tm>
__global__ void __launch_bounds__(kGateThreads<Tm>)
    gate_backward_tokens(const GateBackwardArgs args, const bool vector) {
  MOEKERNELS_DYNAMIC_SHARED(uint32_t, shared);
  __shared__ uint32_t scratch[4];
  const int experts = static_cast<int>(args.experts), top_k = static_cast<int>(args.top_k),
            team = Tm::team_of_block();
  float* chosen = reinterpret_cast<float*>(shared) + team * 2 * top_k;
  float* dchosen = chosen + top_k;
  const bool is_sigmoid = args.score == GateScore::sigmoid,
             soft_topk = args.score == GateScore::softmax_topk;
  const bool independent = is_sigmoid || args.score == GateScore::sqrtsoftplus;

  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTeams<Tm> + team;
  const bool inside_batch = t < args.tokens;
  const int32_t* ids = args.ids + (inside_batch ? t * top_k : 0);
  bool live = inside_batch;
  for (int k = 0; live && k < top_k; ++k) live = inside(ids[k], experts);
  int64_t segment = 0;
  if (args.offsets != nullptr) {
    const int64_t up_to = offsets_up_to(args.offsets, args.segments, t);
    segment = up_to <= args.segments ? up_to - 1 : -1;
  }
  const float* dsum = segment >= 0 && args.dscore_sum != nullptr
                          ? static_cast<const float*>(args.dscore_sum) + segment * experts
                          : nullptr;
  const float dz = segment >= 0 && args.dz_sum != nullptr
                       ? static_cast<const float*>(args.dz_sum)[segment]
                       : 0.0f;

  float x[Tm::values], softmax[Tm::values], scores[Tm::values], d[Tm::values];
  load_logits<Tm>(args.logits, args.dtype, {t, experts, live, vector}, x);
  const float lse = soften<Tm>(x, softmax, scratch);
  float sum = 1;
  if (independent) {
    sum = score<Tm>(x, is_sigmoid, experts, scores, scratch);
  } else {
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) scores[i] = soft_topk ? x[i] : softmax[i];
  }

  // From the score sums: through the division by the row's sum.
  float dot = 0;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    const int e = Tm::expert(i);
    d[i] = dsum != nullptr && e < experts ? dsum[e] : 0.0f;
    if (independent) dot += d[i] * scores[i];
  }
  if (independent) {
    dot = Tm::sum(dot, scratch);
    dot = sum > kTiny ? dot / sum : 0.0f;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      d[i] = dsum != nullptr && Tm::expert(i) < experts ? (d[i] - dot) / sum : 0.0f;
    }
  }
  // From the weights.
  if (args.dweights != nullptr) {
    for (int k = 0; k < top_k; ++k) {
      const int id = live ? ids[k] : 0;
      if (Tm::lane_of(id) != Tm::lane()) continue;
#pragma unroll
      for (int i = 0; i < Tm::values; ++i) {
        if (Tm::expert(i) == id) chosen[k] = scores[i];
      }
      dchosen[k] = live ? static_cast<const float*>(args.dweights)[t * top_k + k] *
                              static_cast<float>(args.scale)
                        : 0.0f;
    }
    const float divisor = weigh<Tm>(chosen, top_k, soft_topk, args.renormalize);
    weigh_backward<Tm>(chosen, divisor, top_k, soft_topk, args.renormalize, dchosen);
  }
  const auto add_chosen = [&](float (&to)[Tm::values]) {
    for (int k = 0; args.dweights != nullptr && live && k < top_k; ++k) {
      if (Tm::lane_of(ids[k]) != Tm::lane()) continue;
#pragma unroll
      for (int i = 0; i < Tm::values; ++i) {
        if (Tm::expert(i) == ids[k]) to[i] += dchosen[k];
      }
    }
  };
  if (!soft_topk) add_chosen(d);
  // To the logits.
  const float dlse = 2 * dz * lse;
  if (independent) {
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      const float s = scores[i];
      const float slope = is_sigmoid ? s * (1 - s) : sqrt_softplus_slope(x[i], s);
      d[i] = d[i] * slope + dlse * softmax[i];
    }
  } else {
    dot = 0;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) dot += d[i] * softmax[i];
    const float shift = dlse - Tm::sum(dot, scratch);
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) d[i] = softmax[i] * (d[i] + shift);
    if (soft_topk) add_chosen(d);
  }
  if (!inside_batch) return;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) d[i] = live ? d[i] : 0.0f;
  store_logits<Tm>(args.dlogits, args.dtype, {t, experts, true, vector}, d);
}

}  // namespace

void gate_backward(const GateBackwardArgs& args, Stream stream) {
  const bool vector = args.experts % 8 == 0 && aligned16(args.logits, args.dlogits);
  with_team(args.experts, [&](auto team) {
    using Tm = decltype(team);
    launch("gate_backward", gate_backward_tokens<Tm>, ceil_div(args.tokens, kTeams<Tm>),
           kGateThreads<Tm>, kTeams<Tm> * args.top_k * 8, stream, args, vector);
  });
}

}  // namespace moekernels::cuda
