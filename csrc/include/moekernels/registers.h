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

// The registers of scores, and of what a group of experts ranks by: its best choice score, or the
// sum of its two best. Own scores are functions of their own logit alone, rather than of a token's
// all; their formulas are in score.h.
#define MOEKERNELS_JOINT_SCORES(X) X(softmax) X(softmax_topk)
#define MOEKERNELS_OWN_SCORES(X) X(sigmoid) X(sqrtsoftplus)
#define MOEKERNELS_GATE_SCORES(X) MOEKERNELS_JOINT_SCORES(X) MOEKERNELS_OWN_SCORES(X)
#define MOEKERNELS_GROUP_SCORES(X) X(max) X(sum2)

enum class GateScore : int { MOEKERNELS_GATE_SCORES(MOEKERNELS_ENTRY) };
inline constexpr const char* kGateScores[] = {MOEKERNELS_GATE_SCORES(MOEKERNELS_NAME)};
MOEKERNELS_BOTH constexpr bool is_own(GateScore score) {
  constexpr int kJoint = MOEKERNELS_JOINT_SCORES(MOEKERNELS_ONE);
  return static_cast<int>(score) >= kJoint;
}
#undef MOEKERNELS_ONE
enum class GroupScore : int { MOEKERNELS_GROUP_SCORES(MOEKERNELS_ENTRY) };
inline constexpr const char* kGroupScores[] = {MOEKERNELS_GROUP_SCORES(MOEKERNELS_NAME)};

}  // namespace moekernels
