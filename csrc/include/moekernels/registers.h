// What the ops know by name, each listed once: enums, names and dispatch are made of these lists,
// and _host shows them to Python.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

// A register is a macro LIST(X) that says X(name) for each of its entries; these make an enum's
// values and their names of it.
#define MOEKERNELS_ENTRY(name) name,
#define MOEKERNELS_NAME(name) #name,

// The register of activations; their formulas are in activation.h. A gated one takes two columns of
// h, gate and up.
#define MOEKERNELS_GATED_ACTIVATIONS(X) X(swiglu) X(geglu) X(reglu) X(swiglu_oai) X(swiglu_clamped)
#define MOEKERNELS_PLAIN_ACTIVATIONS(X) X(relu2) X(silu) X(gelu)
#define MOEKERNELS_ACTIVATIONS(X) MOEKERNELS_GATED_ACTIVATIONS(X) MOEKERNELS_PLAIN_ACTIVATIONS(X)

enum class Activation : int { MOEKERNELS_ACTIVATIONS(MOEKERNELS_ENTRY) };
inline constexpr const char* kActivations[] = {MOEKERNELS_ACTIVATIONS(MOEKERNELS_NAME)};

#define MOEKERNELS_ONE(name) +1
MOEKERNELS_BOTH constexpr bool is_gated(Activation activation) {
  constexpr int kGated = MOEKERNELS_GATED_ACTIVATIONS(MOEKERNELS_ONE);
  return static_cast<int>(activation) < kGated;
}
#undef MOEKERNELS_ONE

// The registers of scores, and of what a group of experts ranks by: its best choice score, or the
// sum of its two best.
#define MOEKERNELS_GATE_SCORES(X) X(softmax) X(softmax_topk) X(sigmoid) X(sqrtsoftplus)
#define MOEKERNELS_GROUP_SCORES(X) X(max) X(sum2)

enum class GateScore : int { MOEKERNELS_GATE_SCORES(MOEKERNELS_ENTRY) };
inline constexpr const char* kGateScores[] = {MOEKERNELS_GATE_SCORES(MOEKERNELS_NAME)};
// Scores that are functions of their own logit alone, rather than of a token's all.
MOEKERNELS_BOTH inline bool is_independent(GateScore score) {
  return score == GateScore::sigmoid || score == GateScore::sqrtsoftplus;
}
enum class GroupScore : int { MOEKERNELS_GROUP_SCORES(MOEKERNELS_ENTRY) };
inline constexpr const char* kGroupScores[] = {MOEKERNELS_GROUP_SCORES(MOEKERNELS_NAME)};

}  // namespace moekernels
