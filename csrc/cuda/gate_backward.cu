// The gradient of the logits from those of the weights and of the sums, in one pass over the
// logits.
#include <type_traits>

#include "common/launch.cuh"
#include "gate.cuh"

namespace moekernels::cuda {
namespace {

// Subtracts their mean from the gradients of a token's shares, factor * chosen, where they are
// `shares` that add up to one. So the gradient of the largest may be subtracted first: a share of
// nearly one then gets what all others make of it, which 1 - share would round away.
template <class Tm>
__device__ void less_mean(const float* chosen, float factor, bool shares, int top_k,
                          float* dchosen) {
  int at = 0;
  for (int k = 1; k < top_k; ++k) at = chosen[k] > chosen[at] ? k : at;
  const float most = shares ? dchosen[at] : 0;
  float dot = 0;
  for (int k = 0; k < top_k && shares; ++k) dot += (dchosen[k] - most) * chosen[k] * factor;
  Tm::sync();
  for (int k = Tm::lane(); k < top_k; k += Tm::lanes) dchosen[k] = dchosen[k] - most - dot;
  Tm::sync();
}

// From the gradients of a token's weights to those of its chosen scores, in place; chosen and
// divisor as `weigh` left them.
template <class Tm>
__device__ void weigh_backward(const float* chosen, float divisor, int top_k, bool soft,
                               bool renormalize, float* dchosen) {
  Tm::sync();
  if (renormalize) {
    // Else the divisor is a constant.
    less_mean<Tm>(chosen, 1, divisor > kTiny, top_k, dchosen);
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes) dchosen[k] /= divisor;
    Tm::sync();
  }
  if (soft) {
    less_mean<Tm>(chosen, divisor, true, top_k, dchosen);
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes) dchosen[k] *= chosen[k] * divisor;
    Tm::sync();
  }
}

// The gradients of the sums of a token's segment.
struct SegmentGradients {
  const float* scores = nullptr;  // [E] or null
  float z = 0;

  __device__ SegmentGradients(const GateBackwardArgs& args, int64_t t) {
    int64_t segment = 0;
    if (args.offsets != nullptr) {
      const int64_t up_to = offsets_up_to(args.offsets, args.segments, t);
      segment = up_to <= args.segments ? up_to - 1 : -1;
    }
    if (segment < 0) return;
    if (args.dscore_sum != nullptr) {
      scores = static_cast<const float*>(args.dscore_sum) + segment * args.experts;
    }
    if (args.dz_sum != nullptr) z = static_cast<const float*>(args.dz_sum)[segment];
  }
};

// A team's token, in registers but for the choice.
template <class Tm>
struct Token {
  float x[Tm::values], softmax[Tm::values], scores[Tm::values];
  float top, lse, total;  // the largest logit; total: of own scores
  const int32_t* ids;
  bool live;
  float *chosen, *dchosen;  // [K], shared
};

// Of the largest score's gradient d: see `less_mean`.
template <class Tm>
__device__ float of_largest(const Token<Tm>& token, const float (&d)[Tm::values],
                            uint32_t* scratch) {
  float found = -INFINITY;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) found = token.x[i] == token.top ? fmaxf(found, d[i]) : found;
  return Tm::largest(found, scratch);
}

// d: the gradients of the scores from those of the score sums, through the division by the total.
template <class Tm>
__device__ void from_score_sum(const float* dsum, int experts, bool own, const Token<Tm>& token,
                               uint32_t* scratch, float (&d)[Tm::values]) {
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    const int e = Tm::expert(i);
    d[i] = dsum != nullptr && e < experts ? dsum[e] : 0.0f;
  }
  if (!own) return;
  float most = of_largest(token, d, scratch), dot = 0;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) dot += (d[i] - most) * token.scores[i];
  dot = Tm::sum(dot, scratch) / token.total;
  if (token.total <= kTiny) most = dot = 0;  // a constant
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    const bool is = dsum != nullptr && Tm::expert(i) < experts;
    d[i] = is ? (d[i] - most - dot) / token.total : 0.0f;
  }
}

// dchosen: the gradients of the chosen scores, from those of the weights.
template <class Tm>
__device__ void from_weights(const GateBackwardArgs& args, int64_t t, const Token<Tm>& token) {
  const int top_k = static_cast<int>(args.top_k);
  const bool soft = args.score == GateScore::softmax_topk;
  for (int k = 0; k < top_k; ++k) {
    const int id = token.live ? token.ids[k] : 0;
    if (Tm::lane_of(id) != Tm::lane()) continue;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      if (Tm::expert(i) == id) token.chosen[k] = token.scores[i];
    }
    token.dchosen[k] = token.live ? static_cast<const float*>(args.dweights)[t * top_k + k] *
                                        static_cast<float>(args.scale)
                                  : 0.0f;
  }
  const float divisor = weigh<Tm>(token.chosen, top_k, soft, args.renormalize);
  weigh_backward<Tm>(token.chosen, divisor, top_k, soft, args.renormalize, token.dchosen);
}

template <class Tm>
__device__ void add_chosen(const Token<Tm>& token, int top_k, float (&d)[Tm::values]) {
  for (int k = 0; token.live && k < top_k; ++k) {
    if (Tm::lane_of(token.ids[k]) != Tm::lane()) continue;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      if (Tm::expert(i) == token.ids[k]) d[i] += token.dchosen[k];
    }
  }
}

template <class Tm>
__global__ void __launch_bounds__(kGateThreads<Tm>)
    gate_backward_tokens(const GateBackwardArgs args, const bool vector) {
  MOEKERNELS_DYNAMIC_SHARED(float, choices);  // [teams, 2, K]
  __shared__ uint32_t scratch[4];
  const int experts = static_cast<int>(args.experts), top_k = static_cast<int>(args.top_k);
  const int team = Tm::team_of_block();
  const bool soft_topk = args.score == GateScore::softmax_topk;
  const bool own = is_own(args.score), has_weights = args.dweights != nullptr;

  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTeams<Tm> + team;
  const bool inside_batch = t < args.tokens;
  Token<Tm> token;
  token.chosen = choices + team * 2 * top_k;
  token.dchosen = token.chosen + top_k;
  token.ids = args.ids + (inside_batch ? t * top_k : 0);
  token.live = inside_batch;
  for (int k = 0; token.live && k < top_k; ++k) token.live = inside(token.ids[k], experts);
  const SegmentGradients dsums(args, t);

  load_logits<Tm>(args.logits, args.dtype, {t, experts, token.live, vector}, token.x);
  token.top = largest<Tm>(token.x, scratch);
  token.lse = soften<Tm>(token.x, token.top, token.softmax, scratch);
  token.total = 1;
  if (own) {
    token.total = score<Tm>(token.x, args.score, experts, token.scores, scratch);
  } else {
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      token.scores[i] = soft_topk ? token.x[i] : token.softmax[i];
    }
  }

  float d[Tm::values];
  from_score_sum<Tm>(dsums.scores, experts, own, token, scratch, d);
  if (has_weights) from_weights<Tm>(args, t, token);
  if (has_weights && !soft_topk) add_chosen<Tm>(token, top_k, d);
  // To the logits. The weights of softmax_topk are functions of the chosen logits themselves.
  const float dlse = 2 * dsums.z * token.lse;
  if (own) {
    with_own_score(args.score, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < Tm::values; ++i) {
        const float slope = score_slope<kind.value, ScoreMath, float>(token.x[i], token.scores[i]);
        d[i] = d[i] * slope + dlse * token.softmax[i];
      }
    });
  } else {
    const float most = of_largest(token, d, scratch);
    float dot = 0;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) dot += (d[i] - most) * token.softmax[i];
    const float shift = dlse - Tm::sum(dot, scratch);
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) d[i] = token.softmax[i] * (d[i] - most + shift);
  }
  if (has_weights && soft_topk) add_chosen<Tm>(token, top_k, d);
  if (!inside_batch) return;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) d[i] = token.live ? d[i] : 0.0f;
  store_logits<Tm>(args.dlogits, args.dtype, {t, experts, true, vector}, d);
}

}  // namespace

void gate_backward(const GateBackwardArgs& args, Stream stream) {
  const bool vector = args.experts % 8 == 0 && aligned16(args.logits, args.dlogits);
  with_team(args.experts, [&](auto team) {
    using Tm = decltype(team);
    launch("gate_backward", gate_backward_tokens<Tm>, ceil_div(args.tokens, kTeams<Tm>),
           kGateThreads<Tm>, kTeams<Tm> * 2 * args.top_k * int64_t{sizeof(float)}, stream, args,
           vector);
  });
}

}  // namespace moekernels::cuda
