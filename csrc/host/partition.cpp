#include "partition.h"

#include <algorithm>
#include <queue>
#include <utility>

namespace moekernels::host {
namespace {

// The items of a part are a linked list through `next`, so that joining two parts costs nothing.
struct Part {
  double sum;
  int first, last;
};

// A partial partition: its non-empty parts in falling order of their sums.
struct Partial {
  double lightest_minus_heaviest;
  int tie;
  std::vector<Part> parts;
};

struct MoreEven {
  bool operator()(const Partial& a, const Partial& b) const {
    return std::pair(a.lightest_minus_heaviest, a.tie) >
           std::pair(b.lightest_minus_heaviest, b.tie);
  }
};

}  // namespace

std::vector<std::vector<int>> karmarkar_karp(const std::vector<double>& costs, int parts) {
  const int items = static_cast<int>(costs.size());
  std::vector<int> next(items, -1);
  std::vector<Partial> heap;
  heap.reserve(items);
  for (int item = 0; item < items; ++item)
    heap.push_back({-costs[item], item, {{costs[item], item, item}}});
  std::make_heap(heap.begin(), heap.end(), MoreEven{});
  const auto pop = [&] {
    std::pop_heap(heap.begin(), heap.end(), MoreEven{});
    Partial most_uneven = std::move(heap.back());
    heap.pop_back();
    return most_uneven;
  };

  int tie = items;
  while (heap.size() > 1) {
    std::vector<Part> merged = pop().parts;
    const std::vector<Part> other = pop().parts;
    // Part i meets part parts-1-i of the other: the heaviest meets the lightest, which may be an
    // empty one.
    const int mine = static_cast<int>(merged.size()), others = static_cast<int>(other.size());
    const int met = std::max(mine + others - parts, 0);
    for (int i = 0; i < met; ++i) {
      Part& heavy = merged[mine - met + i];
      const Part& light = other[others - 1 - i];
      next[heavy.last] = light.first;
      heavy = {heavy.sum + light.sum, heavy.first, light.last};
    }
    for (int i = others - 1 - met; i >= 0; --i) merged.push_back(other[i]);
    std::stable_sort(merged.begin(), merged.end(),
                     [](const Part& a, const Part& b) { return a.sum > b.sum; });
    const double lightest = static_cast<int>(merged.size()) == parts ? merged.back().sum : 0.0;
    const double heaviest = merged.front().sum;
    heap.push_back({lightest - heaviest, tie++, std::move(merged)});
    std::push_heap(heap.begin(), heap.end(), MoreEven{});
  }

  std::vector<std::vector<int>> groups(parts);
  if (heap.empty()) return groups;
  const std::vector<Part>& final_parts = heap.front().parts;
  for (size_t part = 0; part < final_parts.size(); ++part) {
    for (int item = final_parts[part].first; item >= 0; item = next[item])
      groups[part].push_back(item);
    std::sort(groups[part].begin(), groups[part].end());
  }
  return groups;
}

}  // namespace moekernels::host
