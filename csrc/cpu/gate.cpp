// A token's logits are read once; scores, choice and loss sums are made in buffers that stay in the
// first-level cache. Compiled once for each ISA level.
#include "moekernels/gate.h"

#include <cstdlib>

#include "topk.h"
#include "vmath.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// The least that a sum of scores is divided by.
constexpr double kTiny = 1e-20;

inline bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}

template <class W>
struct Buffers {
  int64_t padded;  // E rounded up to whole vectors
  char* memory;
  W *x, *softmax, *scores, *keys, *sums, *best, *chosen, *ranks;
  int64_t* order;

  Buffers(int64_t experts, int64_t top_k, int64_t groups) {
    padded = (experts + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
    const int64_t values = 5 * padded + 2 * top_k + groups + kLanes<W>;
    memory = static_cast<char*>(std::calloc(values + top_k + groups, 8));
    W* next = reinterpret_cast<W*>(memory + (top_k + groups) * 8);
    order = reinterpret_cast<int64_t*>(memory);
    x = next;
    softmax = x + padded;
    scores = softmax + padded;
    keys = scores + padded;
    sums = keys + padded;
    best = sums + padded;
    chosen = best + top_k;
    ranks = chosen + top_k;
  }
  ~Buffers() { std::free(memory); }
  Buffers(const Buffers&) = delete;
};

// Fills x, behind it up to a whole vector with -infinity, and returns the largest that is a number.
template <class T, class W>
W widen(const T* logits, W* x, int64_t experts) {
  constexpr int64_t lanes = kLanes<W>;
  Vec<W> top = Vec<W>{} - W(INFINITY);
  for (int64_t e = 0; e < experts; e += lanes) {
    const int64_t n = experts - e;
    const Vec<W> v = n >= lanes ? load(logits + e) : load_tail(logits + e, n, W(-INFINITY));
    store(x + e, v);
    top = v > top ? v : top;
  }
  return max_lanes<W>(top);
}

// softmax of x; returns logsumexp.
template <class W>
double soften(const W* x, W top, W* softmax, int64_t padded) {
  constexpr int64_t lanes = kLanes<W>;
  Vec<W> total = {};
  for (int64_t e = 0; e < padded; e += lanes) {
    const Vec<W> v = exp(load(x + e) - top);
    store(softmax + e, v);
    total += v;
  }
  const W sum = sum_lanes<W>(total);
  for (int64_t e = 0; e < padded; e += lanes) store(softmax + e, load(softmax + e) / sum);
  return double(top) + ::log(double(sum));
}

// sigmoid or sqrt(softplus) of x, zero behind the experts; returns their sum, at least kTiny.
template <class W>
W score(const W* x, bool is_sigmoid, W* scores, int64_t experts, int64_t padded) {
  constexpr int64_t lanes = kLanes<W>;
  for (int64_t e = 0; e < padded; e += lanes) {
    const Vec<W> v = load(x + e);
    store(scores + e, is_sigmoid ? sigmoid<W>(v) : sqrt_softplus<W>(v));
  }
  for (int64_t e = experts; e < padded; ++e) scores[e] = 0;
  Vec<W> total = {};
  for (int64_t e = 0; e < padded; e += lanes) total += load(scores + e);
  const W sum = sum_lanes<W>(total);
  return sum < W(kTiny) ? W(kTiny) : sum;
}

// Leaves keys only in the groups that rank highest; the others get -infinity.
template <class W>
void keep_groups(const GateArgs& args, const Buffers<W>& b) {
  const int64_t size = args.experts / args.num_groups;
  for (int64_t g = 0; g < args.num_groups; ++g) {
    W first = W(-INFINITY), second = W(-INFINITY);
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const W key = b.keys[e];
      if (key > first) {
        second = first;
        first = key;
      } else if (key > second) {
        second = key;
      }
    }
    const W rank = args.sum_two && size > 1 ? first + second : first;
    b.ranks[g] = rank == rank ? rank : W(INFINITY);
  }
  // `largest` writes groups_kept <= num_groups entries behind the K of the experts' order.
  int64_t* kept = b.order + args.top_k;
  W* best = b.sums;  // free until the groups are chosen
  largest(b.ranks, args.num_groups, args.groups_kept, best, kept);
  for (int64_t g = 0; g < args.num_groups; ++g) {
    bool keep = false;
    for (int64_t i = 0; i < args.groups_kept; ++i) keep |= kept[i] == g;
    for (int64_t e = g * size; !keep && e < (g + 1) * size; ++e) b.keys[e] = W(-INFINITY);
  }
}

// Fills keys and order. Without a bias the logits themselves are the keys: every score grows with
// its logit.
template <class W>
void choose(const GateArgs& args, const W* scores, const Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  const W* bias = static_cast<const W*>(args.bias);
  const bool by_score = bias != nullptr || (args.num_groups > 1 && args.sum_two);
  const W* from = by_score ? scores : b.x;
  for (int64_t e = 0; e < b.padded; e += lanes) {
    Vec<W> v = load(from + e);
    const int64_t n = args.experts - e;
    if (bias != nullptr) v += n >= lanes ? load(bias + e) : load_tail(bias + e, n);
    store(b.keys + e, v == v ? v : Vec<W>{} + W(INFINITY));  // NaN ranks first, and stays in order
  }
  if (args.num_groups > 1) keep_groups(args, b);
  largest(b.keys, args.experts, args.top_k, b.best, b.order);
}

// chosen[k]: the scores of the chosen before scaling; returns what they were divided by.
template <class W>
W weigh(const W* scores, const int64_t* order, int64_t top_k, bool soft, bool renormalize,
        W* chosen) {
  W total = 0;
  if (soft) {
    W top = scores[order[0]];
    for (int64_t k = 1; k < top_k; ++k) top = scores[order[k]] > top ? scores[order[k]] : top;
    for (int64_t k = 0; k < top_k; ++k) total += chosen[k] = exp_of(scores[order[k]] - top);
    for (int64_t k = 0; k < top_k; ++k) chosen[k] /= total;
  } else {
    for (int64_t k = 0; k < top_k; ++k) chosen[k] = scores[order[k]];
  }
  if (!renormalize) return 1;
  total = 0;
  for (int64_t k = 0; k < top_k; ++k) total += chosen[k];
  total = total < W(kTiny) ? W(kTiny) : total;
  for (int64_t k = 0; k < top_k; ++k) chosen[k] /= total;
  return total;
}

template <class T>
void forward(const GateArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  using W = Wide<T>;
  const bool independent =
      args.score == GateScore::sigmoid || args.score == GateScore::sqrtsoftplus;
  const bool soft_topk = args.score == GateScore::softmax_topk;
  const int64_t experts = args.experts, top_k = args.top_k;
  Buffers<W> b(experts, top_k, args.num_groups);
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    int64_t* counts = args.chunk_counts + c * experts;
    std::memset(counts, 0, experts * sizeof(int64_t));
    double* totals = args.chunk_scores + c * experts;
    std::memset(totals, 0, experts * sizeof(double));
    double z = 0;
    for (int64_t t = args.chunk_begin[c]; t < args.chunk_begin[c + 1]; ++t) {
      W* weights = static_cast<W*>(args.weights) + t * top_k;
      int32_t* ids = args.ids + t * top_k;
      if (args.valid != nullptr && !args.valid[t]) {
        for (int64_t k = 0; k < top_k; ++k) {
          weights[k] = 0;
          ids[k] = -1;
        }
        continue;
      }
      const W top = widen(static_cast<const T*>(args.logits) + t * experts, b.x, experts);
      const double lse = soften(b.x, top, b.softmax, b.padded);
      z += lse * lse;
      const W* scores = independent ? b.scores : soft_topk ? b.x : b.softmax;
      const W* normal = independent ? b.scores : b.softmax;
      W divisor = 1;
      if (independent) {
        divisor = score(b.x, args.score == GateScore::sigmoid, b.scores, experts, b.padded);
      }
      choose(args, scores, b);
      weigh(scores, b.order, top_k, soft_topk, args.renormalize, b.chosen);
      for (int64_t k = 0; k < top_k; ++k) {
        weights[k] = b.chosen[k] * W(args.scale);
        ids[k] = static_cast<int32_t>(b.order[k]);
        ++counts[b.order[k]];
      }
      for (int64_t e = 0; e < experts; ++e) totals[e] += normal[e] / divisor;
    }
    args.chunk_z[c] = z;
  }
}

template <class W>
void reduce(const GateArgs& args) {
  const int64_t experts = args.experts;
  Buffers<double> totals(experts, 0, 0);
  int64_t c = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    int64_t* counts = args.counts + s * experts;
    std::memset(counts, 0, experts * sizeof(int64_t));
    std::memset(totals.x, 0, experts * sizeof(double));
    double z = 0;
    while (c < args.chunks && args.chunk_segment[c] < 0) ++c;
    for (; c < args.chunks && args.chunk_segment[c] == s; ++c) {
      for (int64_t e = 0; e < experts; ++e) {
        totals.x[e] += args.chunk_scores[c * experts + e];
        counts[e] += args.chunk_counts[c * experts + e];
      }
      z += args.chunk_z[c];
    }
    for (int64_t e = 0; e < experts; ++e) {
      static_cast<W*>(args.score_sum)[s * experts + e] = static_cast<W>(totals.x[e]);
    }
    static_cast<W*>(args.z_sum)[s] = static_cast<W>(z);
  }
}

// The gradients of the chosen scores, given chosen (from `weigh`) and the gradients of the weights.
template <class W>
void weigh_backward(const W* chosen, W divisor, const W* dweights, int64_t top_k, W scale,
                    bool soft, bool renormalize, W* dchosen) {
  for (int64_t k = 0; k < top_k; ++k) dchosen[k] = dweights[k] * scale;
  if (renormalize) {
    W dot = 0;
    for (int64_t k = 0; k < top_k; ++k) dot += dchosen[k] * chosen[k];
    const bool clamped = divisor <= W(kTiny);  // then the divisor is a constant
    for (int64_t k = 0; k < top_k; ++k)
      dchosen[k] = (dchosen[k] - (clamped ? W(0) : dot)) / divisor;
  }
  if (soft) {
    W dot = 0;
    for (int64_t k = 0; k < top_k; ++k) dot += dchosen[k] * chosen[k] * divisor;
    for (int64_t k = 0; k < top_k; ++k) dchosen[k] = chosen[k] * divisor * (dchosen[k] - dot);
  }
}

template <class T>
void backward(const GateBackwardArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  using W = Wide<T>;
  constexpr int64_t lanes = kLanes<W>;
  const bool is_sigmoid = args.score == GateScore::sigmoid;
  const bool independent = is_sigmoid || args.score == GateScore::sqrtsoftplus;
  const bool soft_topk = args.score == GateScore::softmax_topk;
  const int64_t experts = args.experts, top_k = args.top_k;
  Buffers<W> b(experts, top_k, 0);
  W* dscores = b.keys;
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    const int64_t segment = args.chunk_segment[c];
    const W* dsum = segment >= 0 && args.dscore_sum != nullptr
                        ? static_cast<const W*>(args.dscore_sum) + segment * experts
                        : nullptr;
    const W dz =
        segment >= 0 && args.dz_sum != nullptr ? static_cast<const W*>(args.dz_sum)[segment] : 0;
    for (int64_t t = args.chunk_begin[c]; t < args.chunk_begin[c + 1]; ++t) {
      T* dlogits = static_cast<T*>(args.dlogits) + t * experts;
      bool valid = true;
      for (int64_t k = 0; k < top_k; ++k) {
        b.order[k] = args.ids[t * top_k + k];
        valid &= inside(b.order[k], experts);
      }
      if (!valid) {
        std::memset(dlogits, 0, experts * sizeof(T));
        continue;
      }
      const W top = widen(static_cast<const T*>(args.logits) + t * experts, b.x, experts);
      const double lse = soften(b.x, top, b.softmax, b.padded);
      W sum = 1;
      if (independent) sum = score(b.x, is_sigmoid, b.scores, experts, b.padded);
      const W* scores = independent ? b.scores : soft_topk ? b.x : b.softmax;

      // From the score sums: through the division by the row's sum.
      std::memset(dscores, 0, b.padded * sizeof(W));
      if (dsum != nullptr) std::memcpy(dscores, dsum, experts * sizeof(W));
      if (independent && dsum != nullptr) {
        Vec<W> dots = {};
        for (int64_t e = 0; e < b.padded; e += lanes) dots += load(dscores + e) * load(scores + e);
        const W dot = sum > W(kTiny) ? sum_lanes<W>(dots) / sum : W(0);
        for (int64_t e = 0; e < b.padded; e += lanes)
          store(dscores + e, (load(dscores + e) - dot) / sum);
      }
      // From the weights.
      if (args.dweights != nullptr) {
        const W divisor = weigh(scores, b.order, top_k, soft_topk, args.renormalize, b.chosen);
        weigh_backward(b.chosen, divisor, static_cast<const W*>(args.dweights) + t * top_k, top_k,
                       W(args.scale), soft_topk, args.renormalize, b.best);
        for (int64_t k = 0; k < top_k && !soft_topk; ++k) dscores[b.order[k]] += b.best[k];
      }
      // To the logits.
      const W dlse = static_cast<W>(2 * dz * lse);
      if (independent) {
        for (int64_t e = 0; e < b.padded; e += lanes) {
          const Vec<W> s = load(scores + e), one = Vec<W>{} + 1;
          const Vec<W> slope =
              is_sigmoid ? s * (one - s) : sqrt_softplus_slope<W>(load(b.x + e), s);
          store(dscores + e, load(dscores + e) * slope + dlse * load(b.softmax + e));
        }
      } else {
        Vec<W> dots = {};
        for (int64_t e = 0; e < b.padded; e += lanes)
          dots += load(dscores + e) * load(b.softmax + e);
        const W shift = dlse - sum_lanes<W>(dots);
        for (int64_t e = 0; e < b.padded; e += lanes) {
          store(dscores + e, load(b.softmax + e) * (load(dscores + e) + shift));
        }
        for (int64_t k = 0; k < top_k && soft_topk && args.dweights != nullptr; ++k) {
          dscores[b.order[k]] += b.best[k];
        }
      }
      for (int64_t e = 0; e < experts; e += lanes) {
        const int64_t n = experts - e;
        n >= lanes ? store(dlogits + e, load(dscores + e))
                   : store_tail(dlogits + e, load(dscores + e), n);
      }
    }
  }
}

}  // namespace

void gate(const GateArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  with_type(args.dtype, [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(args, chunk_begin, chunk_end);
  });
}

void gate_reduce(const GateArgs& args) {
  args.dtype == DType::f64 ? reduce<double>(args) : reduce<float>(args);
}

void gate_backward(const GateBackwardArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  with_type(args.dtype, [&](auto* type) {
    backward<std::remove_pointer_t<decltype(type)>>(args, chunk_begin, chunk_end);
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
