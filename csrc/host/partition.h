// Partitions of equal cost, for packing sequences into microbatches.
#pragma once

#include <vector>

namespace moekernels::host {

// Largest differencing (Karmarkar-Karp): the indices of `costs` in `parts` groups, each in rising
// order.
std::vector<std::vector<int>> karmarkar_karp(const std::vector<double>& costs, int parts);

}  // namespace moekernels::host
