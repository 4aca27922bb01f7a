// Which rank holds which expert of a layer.
#pragma once

#include <vector>

namespace moekernels::host {

// Legend: E experts, P ranks, N nodes.
struct PlacementProblem {
  std::vector<double> loads;    // [E], rows of each expert
  std::vector<int> node_of;     // [P], the node of each rank, 0 ... N-1
  std::vector<double> parting;  // [E*E] symmetric, what it costs that two experts' nodes differ;
                                // empty: nothing
};

// The rank [E] of each expert, E/P experts a rank, for a low
//
//     most loaded rank / mean  +  sum of `parting` over pairs of experts on different nodes.
//
// `start` [E] is improved by exchanges of two experts; without one the search begins from the
// longest loads first, and where parting costs from groups that are grown by it.
std::vector<int> place_experts(const PlacementProblem& problem, const std::vector<int>& start);

}  // namespace moekernels::host
