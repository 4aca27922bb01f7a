// From the scores of the chosen experts to a token's weights, and back to their gradients.
#pragma once

#include "vmath.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// The least that a sum of scores is divided by.
constexpr double kTiny = 1e-20;

// chosen[k]: the scores of the chosen before scaling; returns what they were divided by.
template <class W>
W weigh(const W* scores, const int64_t* ids, int64_t top_k, bool soft, bool renormalize,
        W* chosen) {
  W total = 0;
  if (soft) {
    W top = scores[ids[0]];
    for (int64_t k = 1; k < top_k; ++k) top = scores[ids[k]] > top ? scores[ids[k]] : top;
    for (int64_t k = 0; k < top_k; ++k) total += chosen[k] = exp_of(scores[ids[k]] - top);
    for (int64_t k = 0; k < top_k; ++k) chosen[k] /= total;
  } else {
    for (int64_t k = 0; k < top_k; ++k) chosen[k] = scores[ids[k]];
  }
  if (!renormalize) return 1;
  total = 0;
  for (int64_t k = 0; k < top_k; ++k) total += chosen[k];
  total = total < W(kTiny) ? W(kTiny) : total;
  for (int64_t k = 0; k < top_k; ++k) chosen[k] /= total;
  return total;
}

// The gradient of the largest of n shares. Shares add up to one, so what is subtracted from all
// their gradients changes nothing; with this one a share of nearly one gets what all others make of
// it, which 1 - share would round away.
template <class W>
W of_largest(const W* shares, const W* gradients, int64_t n) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; ++i) at = shares[i] > shares[at] ? i : at;
  return gradients[at];
}

// The gradients of the chosen scores, given chosen (from `weigh`) and the gradients of the weights.
template <class W>
void weigh_backward(const W* chosen, W divisor, const W* dweights, int64_t top_k, W scale,
                    bool soft, bool renormalize, W* dchosen) {
  for (int64_t k = 0; k < top_k; ++k) dchosen[k] = dweights[k] * scale;
  const auto less_mean = [&](W factor) {  // shares: factor * chosen
    const W most = of_largest(chosen, dchosen, top_k);
    W dot = 0;
    for (int64_t k = 0; k < top_k; ++k) dot += (dchosen[k] -= most) * chosen[k] * factor;
    for (int64_t k = 0; k < top_k; ++k) dchosen[k] -= dot;
  };
  if (renormalize) {
    if (divisor > W(kTiny)) less_mean(1);  // else the divisor is a constant
    for (int64_t k = 0; k < top_k; ++k) dchosen[k] /= divisor;
  }
  if (soft) {
    less_mean(divisor);
    for (int64_t k = 0; k < top_k; ++k) dchosen[k] *= chosen[k] * divisor;
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
