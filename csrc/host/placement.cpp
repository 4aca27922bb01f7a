#include "placement.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace moekernels::host {
namespace {

constexpr double kLeast = 1e-12;   // an improvement below this one is rounding
constexpr int kMostSplits = 1000;  // ways to share two ranks' experts that are all tried

// Experts in `parts` parts, part p of them holding `room[p]`.
using Parts = std::vector<std::vector<int>>;

std::vector<int> by_falling_load(const std::vector<double>& loads, std::vector<int> experts) {
  std::stable_sort(experts.begin(), experts.end(),
                   [&](int a, int b) { return loads[a] > loads[b]; });
  return experts;
}

// Longest first, each to the part that is lightest for its room and has some left.
Parts longest_first(const std::vector<double>& loads, const std::vector<int>& experts,
                    const std::vector<int>& room) {
  Parts parts(room.size());
  std::vector<double> sums(room.size(), 0.0);
  for (int x : by_falling_load(loads, experts)) {
    int best = -1;
    for (int p = 0; p < static_cast<int>(room.size()); ++p) {
      if (static_cast<int>(parts[p].size()) == room[p]) continue;
      if (best < 0 || sums[p] * room[best] < sums[best] * room[p]) best = p;
    }
    parts[best].push_back(x);
    sums[best] += loads[x];
  }
  return parts;
}

// Nodes grown one after the other: each begins with the expert that is bound most to what is left
// and takes whatever is bound most to what it holds.
Parts grown(const PlacementProblem& problem, const std::vector<int>& room) {
  const int experts = static_cast<int>(problem.loads.size());
  std::vector<char> taken(experts, 0);
  std::vector<double> loose(experts, 0.0), bound(experts);
  for (int x = 0; x < experts; ++x)
    for (int y = 0; y < experts; ++y) loose[x] += x == y ? 0.0 : problem.parting[x * experts + y];
  Parts parts(room.size());
  for (size_t node = 0; node < room.size(); ++node) {
    std::fill(bound.begin(), bound.end(), 0.0);
    while (static_cast<int>(parts[node].size()) < room[node]) {
      const std::vector<double>& wish = parts[node].empty() ? loose : bound;
      int best = -1;
      for (int x = 0; x < experts; ++x)
        if (!taken[x] && (best < 0 || wish[x] > wish[best])) best = x;
      taken[best] = 1;
      parts[node].push_back(best);
      for (int x = 0; x < experts; ++x) {
        if (x == best) continue;
        bound[x] += problem.parting[x * experts + best];
        loose[x] -= problem.parting[x * experts + best];
      }
    }
  }
  return parts;
}

// Experts on nodes: loads and bonds are kept up to date while two experts change places.
class Nodes {
 public:
  Nodes(const PlacementProblem& problem, const std::vector<int>& room, const Parts& parts)
      : problem_(problem),
        room_(room),
        experts_(static_cast<int>(problem.loads.size())),
        count_(static_cast<int>(room.size())),
        node_of_(experts_),
        sums_(count_, 0.0),
        bonds_(static_cast<size_t>(experts_) * count_, 0.0) {
    for (int n = 0; n < count_; ++n)
      for (int x : parts[n]) node_of_[x] = n, sums_[n] += problem.loads[x];
    const double total = std::accumulate(sums_.begin(), sums_.end(), 0.0);
    mean_ = total > 0 ? total / experts_ : 1.0;
    for (int x = 0; x < experts_; ++x)
      for (int y = 0; y < experts_; ++y)
        if (x != y) bonds_[x * count_ + node_of_[y]] += problem.parting[x * experts_ + y];
  }

  // Exchanges of two experts until none pays.
  void improve() {
    for (bool again = true; again;) {
      again = false;
      for (int x = 0; x < experts_; ++x) {
        double best = kLeast;
        int with = -1;
        const double now = busiest(-1, -1, 0.0);
        for (int y = 0; y < experts_; ++y) {
          if (node_of_[y] == node_of_[x]) continue;
          const double gain = parting_saved(x, y);
          // The load can fall by no more than its excess over the mean.
          if (gain + now - 1.0 <= best) continue;
          const double delta = problem_.loads[x] - problem_.loads[y];
          const double saved = gain + now - busiest(node_of_[x], node_of_[y], delta);
          if (saved > best) best = saved, with = y;
        }
        if (with >= 0) exchange(x, with), again = true;
      }
    }
  }

  double cost() const {
    double cut = 0.0;
    for (int x = 0; x < experts_; ++x)
      for (int n = 0; n < count_; ++n)
        if (n != node_of_[x]) cut += bonds_[x * count_ + n];
    return busiest(-1, -1, 0.0) + cut / 2;
  }

  Parts parts() const {
    Parts out(count_);
    for (int x = 0; x < experts_; ++x) out[node_of_[x]].push_back(x);
    return out;
  }

 private:
  // The most loaded node over the mean, after `delta` went from node a to node b.
  double busiest(int a, int b, double delta) const {
    double most = 0.0;
    for (int n = 0; n < count_; ++n) {
      const double sum = sums_[n] + (n == b ? delta : 0.0) - (n == a ? delta : 0.0);
      most = std::max(most, sum / room_[n]);
    }
    return most / mean_;
  }

  double parting_saved(int x, int y) const {
    const int a = node_of_[x], b = node_of_[y];
    const double *of_x = &bonds_[x * count_], *of_y = &bonds_[y * count_];
    return of_x[b] - of_x[a] + of_y[a] - of_y[b] - 2 * problem_.parting[x * experts_ + y];
  }

  void exchange(int x, int y) {
    const int a = node_of_[x], b = node_of_[y];
    const double delta = problem_.loads[x] - problem_.loads[y];
    sums_[a] -= delta;
    sums_[b] += delta;
    for (int z = 0; z < experts_; ++z) {
      const double with_x = z == x ? 0.0 : problem_.parting[z * experts_ + x];
      const double with_y = z == y ? 0.0 : problem_.parting[z * experts_ + y];
      bonds_[z * count_ + a] += with_y - with_x;
      bonds_[z * count_ + b] += with_x - with_y;
    }
    std::swap(node_of_[x], node_of_[y]);
  }

  const PlacementProblem& problem_;
  const std::vector<int>& room_;
  const int experts_, count_;
  std::vector<int> node_of_;
  std::vector<double> sums_, bonds_;  // [N] loads; [E, N] what binds an expert to each node's
  double mean_ = 1.0;
};

double ways_to_split(int each) {
  double ways = 1.0;
  for (int i = 1; i <= each; ++i) ways *= static_cast<double>(each + i) / i;
  return ways;
}

double sum_of(const std::vector<double>& loads, const std::vector<int>& experts) {
  double sum = 0.0;
  for (int x : experts) sum += loads[x];
  return sum;
}

// The exchange of one expert each that leaves the heavier of two ranks lightest; whether it helps.
bool exchange_one(const std::vector<double>& loads, std::vector<int>& a, std::vector<int>& b,
                  double& sum_a, double& sum_b) {
  const double most = std::max(sum_a, sum_b);
  double best = most * (1 - kLeast);
  int *from = nullptr, *to = nullptr;
  for (int& x : a) {
    for (int& y : b) {
      const double delta = loads[x] - loads[y];
      const double heavier = std::max(sum_a - delta, sum_b + delta);
      if (heavier < best) best = heavier, from = &x, to = &y;
    }
  }
  if (from == nullptr) return false;
  std::swap(*from, *to);
  sum_a = sum_of(loads, a);
  sum_b = sum_of(loads, b);
  return true;
}

// The best of all ways to share two ranks' experts; whether it helps.
bool share_anew(const std::vector<double>& loads, std::vector<int>& a, std::vector<int>& b,
                double& sum_a, double& sum_b) {
  std::vector<int> all(a);
  all.insert(all.end(), b.begin(), b.end());
  const int count = static_cast<int>(all.size()), each = static_cast<int>(a.size());
  const double total = sum_a + sum_b;
  double best = std::max(sum_a, sum_b) * (1 - kLeast);
  std::vector<char> chosen(count, 0), found;
  std::fill(chosen.begin(), chosen.begin() + each, 1);
  do {
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum += chosen[i] ? loads[all[i]] : 0.0;
    const double heavier = std::max(sum, total - sum);
    if (heavier < best) best = heavier, found = chosen;
  } while (chosen[0] && std::prev_permutation(chosen.begin(), chosen.end()));
  if (found.empty()) return false;
  a.clear();
  b.clear();
  for (int i = 0; i < count; ++i) (found[i] ? a : b).push_back(all[i]);
  sum_a = sum_of(loads, a);
  sum_b = sum_of(loads, b);
  return true;
}

// Evens out ranks that hold equally many experts, two at a time, until no two can be evener.
void even_out(const std::vector<double>& loads, Parts& ranks) {
  const int count = static_cast<int>(ranks.size());
  const bool small = count > 1 && ways_to_split(static_cast<int>(ranks[0].size())) <= kMostSplits;
  std::vector<double> sums;
  for (const auto& rank : ranks) sums.push_back(sum_of(loads, rank));
  for (auto* step : {&exchange_one, &share_anew}) {
    if (step == &share_anew && !small) break;
    for (bool again = true; again;) {
      again = false;
      for (int a = 0; a < count; ++a)
        for (int b = a + 1; b < count; ++b)
          while (step(loads, ranks[a], ranks[b], sums[a], sums[b])) again = true;
    }
  }
}

}  // namespace

std::vector<int> place_experts(const PlacementProblem& problem, const std::vector<int>& start) {
  const int experts = static_cast<int>(problem.loads.size());
  const int ranks = static_cast<int>(problem.node_of.size()), each = experts / ranks;
  const bool flat = problem.parting.empty();
  const int nodes =
      flat ? 1 : 1 + *std::max_element(problem.node_of.begin(), problem.node_of.end());
  Parts ranks_of(nodes);
  for (int r = 0; r < ranks; ++r) ranks_of[flat ? 0 : problem.node_of[r]].push_back(r);
  std::vector<int> room(nodes), everyone(experts);
  for (int n = 0; n < nodes; ++n) room[n] = each * static_cast<int>(ranks_of[n].size());
  std::iota(everyone.begin(), everyone.end(), 0);

  std::vector<Parts> begins;
  if (!start.empty()) {
    begins.emplace_back(nodes);
    for (int x = 0; x < experts; ++x) begins[0][flat ? 0 : problem.node_of[start[x]]].push_back(x);
  } else {
    begins.push_back(longest_first(problem.loads, everyone, room));
    if (nodes > 1) begins.push_back(grown(problem, room));
  }
  Parts best = begins[0];
  if (nodes > 1) {
    double cost = 0.0;
    for (size_t i = 0; i < begins.size(); ++i) {
      Nodes state(problem, room, begins[i]);
      state.improve();
      if (i == 0 || state.cost() < cost) cost = state.cost(), best = state.parts();
    }
  }

  std::vector<int> rank_of(experts);
  for (int n = 0; n < nodes; ++n) {
    const int here = static_cast<int>(ranks_of[n].size());
    Parts parts = longest_first(problem.loads, best[n], std::vector<int>(here, each));
    if (!start.empty()) {  // whoever stays on its node keeps its rank, newcomers fill up
      parts.assign(here, {});
      std::vector<int> rest;
      for (int x : best[n]) {
        const auto place = std::find(ranks_of[n].begin(), ranks_of[n].end(), start[x]);
        if (place == ranks_of[n].end())
          rest.push_back(x);
        else
          parts[place - ranks_of[n].begin()].push_back(x);
      }
      for (int x : by_falling_load(problem.loads, rest)) {
        int lightest = -1;
        for (int p = 0; p < here; ++p) {
          if (static_cast<int>(parts[p].size()) == each) continue;
          if (lightest < 0 ||
              sum_of(problem.loads, parts[p]) < sum_of(problem.loads, parts[lightest]))
            lightest = p;
        }
        parts[lightest].push_back(x);
      }
    }
    even_out(problem.loads, parts);
    for (int p = 0; p < here; ++p)
      for (int x : parts[p]) rank_of[x] = ranks_of[n][p];
  }
  return rank_of;
}

}  // namespace moekernels::host
