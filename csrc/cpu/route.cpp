// Compiled once for each ISA level: CMake sets MOEKERNELS_ISA to the level's namespace.
#include "moekernels/route.h"

#include <cstring>

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

inline bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}

// Where chunk c of the slots begins.
inline int64_t chunk_start(const RouteArgs& args, int64_t c) {
  return args.slots * c / args.chunks;
}

template <class Id>
void count(const RouteArgs& args, int64_t chunk) {
  const Id* ids = static_cast<const Id*>(args.ids);
  int32_t* counts = args.begins + chunk * args.experts;
  std::memset(counts, 0, args.experts * sizeof(int32_t));
  const int64_t end = chunk_start(args, chunk + 1);
  for (int64_t s = chunk_start(args, chunk); s < end; ++s) {
    if (inside(ids[s], args.experts)) ++counts[ids[s]];
  }
}

template <class Id>
void place(const RouteArgs& args, int64_t chunk) {
  const Id* ids = static_cast<const Id*>(args.ids);
  int32_t* next = args.begins + chunk * args.experts;
  const int64_t end = chunk_start(args, chunk + 1);
  int64_t s = chunk_start(args, chunk);
  if (s == end) return;  // with K = 0 there is nothing to divide by
  int64_t token = s / args.top_k, k = s % args.top_k;
  for (; s < end; ++s) {
    int32_t row = -1;
    if (inside(ids[s], args.experts)) {
      const int64_t e = ids[s], r = next[e]++;
      if (r < args.offsets[e] + args.counts[e]) {
        row = static_cast<int32_t>(r);
        args.slot_of[r] = static_cast<int32_t>(s);
        args.token_of[r] = static_cast<int32_t>(token);
      }
    }
    args.row_of[s] = row;
    if (++k == args.top_k) {
      k = 0;
      ++token;
    }
  }
}

// A key that orders like the weight: integer order is float order, NaN above all, both zeros alike.
inline uint64_t key_of(const RouteArgs& args, int64_t slot) {
  uint64_t bits;
  double w = args.wide_weights ? static_cast<const double*>(args.weights)[slot]
                               : static_cast<const float*>(args.weights)[slot];
  if (w != w) return ~uint64_t{0};
  w += 0.0;
  std::memcpy(&bits, &w, sizeof(bits));
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// The slots of one expert, in order: keeps the `capacity` heaviest, the earlier where weights tie;
// returns how many.
int64_t keep_heaviest(const RouteArgs& args, int32_t* slots, int64_t n) {
  // The largest threshold that at least `capacity` keys reach, bit by bit.
  uint64_t threshold = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t trial = threshold | (uint64_t{1} << bit);
    int64_t reach = 0;
    for (int64_t i = 0; i < n; ++i) reach += key_of(args, slots[i]) >= trial;
    if (reach >= args.capacity) threshold = trial;
  }
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += key_of(args, slots[i]) > threshold;
  int64_t ties = args.capacity - above, kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = key_of(args, slots[i]);
    if (key > threshold || (key == threshold && ties-- > 0)) slots[kept++] = slots[i];
  }
  return kept;
}

template <class Id>
void place_by_weight(const RouteArgs& args) {
  const Id* ids = static_cast<const Id*>(args.ids);
  // begins of the one chunk count from 0 here: all slots by expert, whatever the capacity.
  int64_t begin = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    const int32_t n = args.begins[e];
    args.begins[e] = static_cast<int32_t>(begin);
    begin += n;
  }
  for (int64_t s = 0; s < args.slots; ++s) {
    args.row_of[s] = -1;
    if (inside(ids[s], args.experts)) args.order[args.begins[ids[s]]++] = static_cast<int32_t>(s);
  }
  begin = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    int32_t* slots = args.order + begin;
    const int64_t n = args.begins[e] - begin;  // begins[e] has moved to the end
    begin += n;
    const int64_t kept = n > args.capacity ? keep_heaviest(args, slots, n) : n;
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t r = args.offsets[e] + i;
      args.row_of[slots[i]] = static_cast<int32_t>(r);
      args.slot_of[r] = slots[i];
      args.token_of[r] = static_cast<int32_t>(slots[i] / args.top_k);
    }
  }
}

}  // namespace

void route_count(const RouteArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    args.wide_ids ? count<int64_t>(args, c) : count<int32_t>(args, c);
  }
}

void route_scan(const RouteArgs& args) {
  int64_t begin = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    int64_t total = 0;
    for (int64_t c = 0; c < args.chunks; ++c) {
      int32_t& here = args.begins[c * args.experts + e];
      const int32_t n = here;
      if (args.order == nullptr) here = static_cast<int32_t>(begin + total);
      total += n;
    }
    const int64_t kept = args.capacity >= 0 && total > args.capacity ? args.capacity : total;
    args.counts[e] = kept;
    args.offsets[e] = begin;
    const int64_t end = begin + (kept + args.alignment - 1) / args.alignment * args.alignment;
    for (int64_t r = begin + kept; r < end; ++r) args.token_of[r] = args.slot_of[r] = -1;
    begin = end;
  }
  args.offsets[args.experts] = begin;
  for (int64_t r = begin; r < args.num_rows; ++r) args.token_of[r] = args.slot_of[r] = -1;
}

void route_place(const RouteArgs& args, int64_t chunk_begin, int64_t chunk_end) {
  if (args.order != nullptr) {
    args.wide_ids ? place_by_weight<int64_t>(args) : place_by_weight<int32_t>(args);
    return;
  }
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    args.wide_ids ? place<int64_t>(args, c) : place<int32_t>(args, c);
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
