// The scores that are functions of their own logit alone, and their slopes, in terms of functions
// that each backend has of its own: a Math type with static sigmoid and sqrt_softplus. V is a
// number or a vector of them, S its element. Plain functions, so that the CPU kernels and those of
// CUDA compute the same formulas.
//
// A score must grow with its logit (where nothing else moves the choice, logits are what it is made
// by) and must not be negative (the losses see each score's share of their sum).
#pragma once

#include "moekernels/registers.h"

namespace moekernels {

template <GateScore kind, class Math, class V>
MOEKERNELS_BOTH inline V score_of(V x) {
  if constexpr (kind == GateScore::sigmoid) {
    return Math::sigmoid(x);
  } else {
    return Math::sqrt_softplus(x);
  }
}

// The score's slope at x, given its value there.
template <GateScore kind, class Math, class S, class V>
MOEKERNELS_BOTH inline V score_slope(V x, V value) {
  if constexpr (kind == GateScore::sigmoid) {
    return value * Math::sigmoid(-x);  // 1 - value would leave nothing of a large x
  } else {
    return Math::sqrt_softplus_slope(x, value);
  }
}

template <GateScore kind>
struct ScoreConstant {
  static constexpr GateScore value = kind;
};

// Calls f with the score as a compile-time constant, f(ScoreConstant<kind>{}); one of those that
// are functions of their own logit.
template <class F>
MOEKERNELS_BOTH inline void with_own_score(GateScore score, const F& f) {
#define MOEKERNELS_CASE(name) \
  case GateScore::name: return f(ScoreConstant<GateScore::name>{});
  switch (score) {
    MOEKERNELS_OWN_SCORES(MOEKERNELS_CASE)
    default: return;
  }
#undef MOEKERNELS_CASE
}

}  // namespace moekernels
