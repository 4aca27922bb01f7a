// A token's logits at a time, which stay in the first cache. Compiled once for each ISA level.
#include "moekernels/cross_entropy.h"

#include <cmath>

#include "simd.h"
#include "vmath.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// Where a token's label lies in this shard; -1: elsewhere, or nowhere.
inline int64_t place_of(const CrossEntropyArgs& args, int64_t token) {
  const int64_t at = args.labels[token] - args.first;
  return args.labels[token] >= 0 && at >= 0 && at < args.width ? at : -1;
}

template <class W>
void sums(const CrossEntropyArgs& args, int64_t token) {
  W* row = static_cast<W*>(args.logits) + token * args.width;
  W* stats = static_cast<W*>(args.stats) + token;
  Vec<W> most = splat<W>(-INFINITY);
  int64_t j = 0;
  for (; j + kLanes<W> <= args.width; j += kLanes<W>) {
    const Vec<W> x = load(row + j);
    most = x > most ? x : most;
  }
  W largest = max_lanes<W>(most);
  for (; j < args.width; ++j) largest = row[j] > largest ? row[j] : largest;
  // The others are summed without the label: of a confident token 1 - p would leave nothing.
  const int64_t at = place_of(args, token);
  W target = 0;
  if (at >= 0) {
    target = row[at];
    row[at] = -INFINITY;
  }
  Vec<W> total{};
  for_vectors<W>(args.width, [&](int64_t i, auto n) {
    store(row + i, exp(load(row + i, n) - largest), n);
    total = total + load(row + i, n);
  });
  stats[0] = largest;
  stats[args.tokens] = sum_lanes<W>(total);
  stats[2 * args.tokens] = target;
}

template <class W>
void losses(const CrossEntropyArgs& args, int64_t token) {
  const auto shard = [&](int64_t peer, int64_t which) {
    return static_cast<const W*>(args.shards)[(3 * peer + which) * args.tokens + token];
  };
  W largest = shard(0, 0), others = 0, target = 0;
  for (int64_t p = 1; p < args.peers; ++p) largest = std::fmax(largest, shard(p, 0));
  for (int64_t p = 0; p < args.peers; ++p) {
    others += shard(p, 1) * exp_of(shard(p, 0) - largest);
    target += shard(p, 2);
  }
  const bool counted = args.labels[token] >= 0;
  const W label = exp_of(target - largest), total = others + label, odds = others / label;
  const W loss = odds < 1 ? std::log1p(odds) : std::log(total) + (largest - target);
  static_cast<W*>(args.losses)[token] = counted ? loss : 0;
  const W factor = counted ? exp_of(shard(args.rank, 0) - largest) / total : W(0);
  W* row = static_cast<W*>(args.logits) + token * args.width;
  for_vectors<W>(args.width,
                 [&](int64_t j, auto n) { store(row + j, load(row + j, n) * factor, n); });
  const int64_t at = place_of(args, token);
  if (at >= 0) row[at] = -(others / total);
}

template <class F>
void with_width(DType dtype, const F& f) {
  dtype == DType::f64 ? f(double{}) : f(float{});
}

}  // namespace

void cross_entropy_sums(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  with_width(args.dtype, [&]<class W>(W) {
    for (int64_t token = begin; token < end; ++token) sums<W>(args, token);
  });
}

void cross_entropy_losses(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  with_width(args.dtype, [&]<class W>(W) {
    for (int64_t token = begin; token < end; ++token) losses<W>(args, token);
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
