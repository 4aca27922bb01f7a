// A token's logits are read once; scores, choice and loss sums are made in buffers that stay in the
// first-level cache. Compiled once for each ISA level.
#include "moekernels/gate.h"

#include <cstdlib>
#include <new>

#include "activation.h"
#include "moekernels/score.h"
#include "topk.h"
#include "weigh.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

inline bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}

// What is computed of one token, E rounded up to whole vectors, in memory that all tokens share.
template <class W>
struct Buffers {
  int64_t padded;
  W* x;  // the logits, widened
  W *softmax, *scores, *keys, *dscores;
  W *chosen_keys, *chosen, *dchosen;  // [K]
  W *ranks, *kept_ranks;              // of groups
  int64_t *ids, *kept_groups;         // [K], of groups

  Buffers(int64_t experts, int64_t top_k, int64_t groups)
      : padded((experts + kLanes<W> - 1) / kLanes<W> * kLanes<W>) {
    const int64_t count = 5 * padded + 4 * top_k + 3 * groups + kLanes<W>;
    memory_ = std::calloc(count, sizeof(int64_t));
    if (memory_ == nullptr) throw std::bad_alloc();
    char* next = static_cast<char*>(memory_);
    const auto take = [&]<class T>(T*& piece, int64_t length) {
      piece = reinterpret_cast<T*>(next);
      next += length * sizeof(T);
    };
    take(ids, top_k);
    take(kept_groups, groups);
    for (W** piece : {&x, &softmax, &scores, &keys, &dscores}) take(*piece, padded);
    for (W** piece : {&chosen_keys, &chosen, &dchosen}) take(*piece, top_k);
    take(kept_ranks, groups);
    take(ranks, groups + kLanes<W>);  // read up to a whole vector
  }
  ~Buffers() { std::free(memory_); }
  Buffers(const Buffers&) = delete;

 private:
  void* memory_;
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

// Fills scores from x, zero behind the experts; returns their sum, at least kTiny.
template <class W>
W score_each(GateScore score, int64_t experts, Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  with_own_score(score, [&](auto kind) {
    for (int64_t e = 0; e < b.padded; e += lanes) {
      store(b.scores + e, score_of<kind.value, Math<W>>(load(b.x + e)));
    }
  });
  for (int64_t e = experts; e < b.padded; ++e) b.scores[e] = 0;
  Vec<W> total = {};
  for (int64_t e = 0; e < b.padded; e += lanes) total += load(b.scores + e);
  const W sum = sum_lanes<W>(total);
  return sum < W(kTiny) ? W(kTiny) : sum;
}

// One token's logits as scores.
template <class W>
struct Scored {
  double lse;       // logsumexp of the logits
  const W* choice;  // what experts are chosen by and weighed with
  const W* shares;  // what the losses sum, once it is divided by `total`
  W total;
};

template <class T, class W>
Scored<W> score_token(GateScore score, const T* logits, int64_t experts, Buffers<W>& b) {
  const W top = widen(logits, b.x, experts);
  const double lse = soften(b.x, top, b.softmax, b.padded);
  if (is_own(score)) return {lse, b.scores, b.scores, score_each(score, experts, b)};
  const W* choice = score == GateScore::softmax_topk ? b.x : b.softmax;
  return {lse, choice, b.softmax, W(1)};
}

// Leaves keys only in the groups that rank highest; the others get -infinity.
template <class W>
void keep_groups(const GateArgs& args, Buffers<W>& b) {
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
  largest(b.ranks, args.num_groups, args.groups_kept, b.kept_ranks, b.kept_groups);
  for (int64_t g = 0; g < args.num_groups; ++g) {
    bool keep = false;
    for (int64_t i = 0; i < args.groups_kept; ++i) keep |= b.kept_groups[i] == g;
    for (int64_t e = g * size; !keep && e < (g + 1) * size; ++e) b.keys[e] = W(-INFINITY);
  }
}

// Fills keys and ids. Without a bias the logits themselves are the keys: every score grows with
// its logit.
template <class W>
void choose(const GateArgs& args, const W* scores, Buffers<W>& b) {
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
  largest(b.keys, args.experts, args.top_k, b.chosen_keys, b.ids);
}

// The sums of a chunk, over the tokens of it.
struct ChunkSums {
  double* scores;   // [E]
  int64_t* counts;  // [E]
  double z = 0;

  ChunkSums(const GateArgs& args, int64_t chunk)
      : scores(args.chunk_scores + chunk * args.experts),
        counts(args.chunk_counts + chunk * args.experts) {
    std::memset(scores, 0, args.experts * sizeof(double));
    std::memset(counts, 0, args.experts * sizeof(int64_t));
  }
};

template <class T, class W = Wide<T>>
void forward_token(const GateArgs& args, int64_t t, Buffers<W>& b, ChunkSums& sums) {
  const int64_t experts = args.experts, top_k = args.top_k;
  W* weights = static_cast<W*>(args.weights) + t * top_k;
  int32_t* ids = args.ids + t * top_k;
  if (args.valid != nullptr && !args.valid[t]) {
    for (int64_t k = 0; k < top_k; ++k) {
      weights[k] = 0;
      ids[k] = -1;
    }
    return;
  }
  const Scored<W> scored =
      score_token(args.score, static_cast<const T*>(args.logits) + t * experts, experts, b);
  choose(args, scored.choice, b);
  weigh(scored.choice, b.ids, top_k, args.score == GateScore::softmax_topk, args.renormalize,
        b.chosen);
  for (int64_t k = 0; k < top_k; ++k) {
    weights[k] = b.chosen[k] * W(args.scale);
    ids[k] = static_cast<int32_t>(b.ids[k]);
    ++sums.counts[b.ids[k]];
  }
  for (int64_t e = 0; e < experts; ++e) sums.scores[e] += scored.shares[e] / scored.total;
  sums.z += scored.lse * scored.lse;
}

template <class T>
void forward(const GateArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  Buffers<Wide<T>> buffers(args.experts, args.top_k, args.num_groups);
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    ChunkSums sums(args, c);
    for (int64_t t = args.chunk_begin[c]; t < args.chunk_begin[c + 1]; ++t) {
      forward_token<T>(args, t, buffers, sums);
    }
    args.chunk_z[c] = sums.z;
  }
}

template <class W>
void reduce(const GateArgs& args) {
  const int64_t experts = args.experts;
  Buffers<double> buffers(experts, 0, 0);
  double* totals = buffers.x;
  int64_t c = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    int64_t* counts = args.counts + s * experts;
    std::memset(counts, 0, experts * sizeof(int64_t));
    std::memset(totals, 0, experts * sizeof(double));
    double z = 0;
    while (c < args.chunks && args.chunk_segment[c] < 0) ++c;
    for (; c < args.chunks && args.chunk_segment[c] == s; ++c) {
      for (int64_t e = 0; e < experts; ++e) {
        totals[e] += args.chunk_scores[c * experts + e];
        counts[e] += args.chunk_counts[c * experts + e];
      }
      z += args.chunk_z[c];
    }
    for (int64_t e = 0; e < experts; ++e) {
      static_cast<W*>(args.score_sum)[s * experts + e] = static_cast<W>(totals[e]);
    }
    static_cast<W*>(args.z_sum)[s] = static_cast<W>(z);
  }
}

// The gradients of a segment's sums.
template <class W>
struct SegmentGradients {
  const W* scores = nullptr;  // [E] or null
  W z = 0;

  SegmentGradients(const GateBackwardArgs& args, int64_t segment) {
    if (segment < 0) return;
    if (args.dscore_sum != nullptr) {
      scores = static_cast<const W*>(args.dscore_sum) + segment * args.experts;
    }
    if (args.dz_sum != nullptr) z = static_cast<const W*>(args.dz_sum)[segment];
  }
};

// dscores, from the score sums: through the division by the token's total.
template <class W>
void from_score_sum(const GateBackwardArgs& args, const W* dsum, const Scored<W>& scored,
                    Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  W* dscores = b.dscores;
  std::memset(dscores, 0, b.padded * sizeof(W));
  if (dsum == nullptr) return;
  std::memcpy(dscores, dsum, args.experts * sizeof(W));
  if (!is_own(args.score)) return;  // they add up to one as they are
  const W total = scored.total;
  W most = 0, dot = 0;
  if (total > W(kTiny)) {
    most = of_largest(b.x, dscores, args.experts);
    Vec<W> dots = {};
    for (int64_t e = 0; e < b.padded; e += lanes) {
      dots += (load(dscores + e) - most) * load(scored.shares + e);
    }
    dot = sum_lanes<W>(dots) / total;
  }
  for (int64_t e = 0; e < b.padded; e += lanes) {
    store(dscores + e, (load(dscores + e) - most - dot) / total);
  }
}

// dchosen, from the gradients of token t's weights.
template <class W>
void from_weights(const GateBackwardArgs& args, int64_t t, const W* scores, Buffers<W>& b) {
  const bool soft = args.score == GateScore::softmax_topk;
  const W divisor = weigh(scores, b.ids, args.top_k, soft, args.renormalize, b.chosen);
  weigh_backward(b.chosen, divisor, static_cast<const W*>(args.dweights) + t * args.top_k,
                 args.top_k, W(args.scale), soft, args.renormalize, b.dchosen);
}

// dscores becomes dlogits, where each score is a function of its own logit.
template <class W>
void through_each(GateScore score, W dlse, Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  W* dscores = b.dscores;
  with_own_score(score, [&](auto kind) {
    for (int64_t e = 0; e < b.padded; e += lanes) {
      const Vec<W> slope = score_slope<kind.value, Math<W>, W>(load(b.x + e), load(b.scores + e));
      store(dscores + e, load(dscores + e) * slope + dlse * load(b.softmax + e));
    }
  });
}

// dscores becomes dlogits, where the scores are the softmax.
template <class W>
void through_softmax(W dlse, int64_t experts, Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  W* dscores = b.dscores;
  const W* softmax = b.softmax;
  const W most = of_largest(b.x, dscores, experts);
  Vec<W> dots = {};
  for (int64_t e = 0; e < b.padded; e += lanes) {
    dots += (load(dscores + e) - most) * load(softmax + e);
  }
  const W shift = dlse - sum_lanes<W>(dots);
  for (int64_t e = 0; e < b.padded; e += lanes) {
    store(dscores + e, load(softmax + e) * (load(dscores + e) - most + shift));
  }
}

template <class T, class W = Wide<T>>
void backward_token(const GateBackwardArgs& args, int64_t t, const SegmentGradients<W>& d,
                    Buffers<W>& b) {
  constexpr int64_t lanes = kLanes<W>;
  const int64_t experts = args.experts, top_k = args.top_k;
  T* dlogits = static_cast<T*>(args.dlogits) + t * experts;
  bool valid = true;
  for (int64_t k = 0; k < top_k; ++k) {
    b.ids[k] = args.ids[t * top_k + k];
    valid &= inside(b.ids[k], experts);
  }
  if (!valid) {
    std::memset(dlogits, 0, experts * sizeof(T));
    return;
  }
  const Scored<W> scored =
      score_token(args.score, static_cast<const T*>(args.logits) + t * experts, experts, b);
  const auto add_chosen = [&] {
    for (int64_t k = 0; k < top_k; ++k) b.dscores[b.ids[k]] += b.dchosen[k];
  };
  // The weights of softmax_topk are functions of the chosen logits themselves, not of scores.
  const bool has_weights = args.dweights != nullptr;
  const bool of_logits = args.score == GateScore::softmax_topk;
  from_score_sum(args, d.scores, scored, b);
  if (has_weights) from_weights(args, t, scored.choice, b);
  if (has_weights && !of_logits) add_chosen();
  const W dlse = static_cast<W>(2 * d.z * scored.lse);
  if (is_own(args.score)) {
    through_each(args.score, dlse, b);
  } else {
    through_softmax(dlse, experts, b);
  }
  if (has_weights && of_logits) add_chosen();
  for (int64_t e = 0; e < experts; e += lanes) {
    const int64_t n = experts - e;
    const Vec<W> v = load(b.dscores + e);
    n >= lanes ? store(dlogits + e, v) : store_tail(dlogits + e, v, n);
  }
}

template <class T>
void backward(const GateBackwardArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  Buffers<Wide<T>> buffers(args.experts, args.top_k, 0);
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    const SegmentGradients<Wide<T>> gradients(args, args.chunk_segment[c]);
    for (int64_t t = args.chunk_begin[c]; t < args.chunk_begin[c + 1]; ++t) {
      backward_token<T>(args, t, gradients, buffers);
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
