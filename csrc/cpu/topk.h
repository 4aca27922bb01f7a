// The largest keys of a row, in order.
#pragma once

#include <type_traits>
#include <utility>

#include "vec.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// A bit for each lane that is true.
inline uint32_t lane_bits(Int mask) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512());
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// The vector moved up by one lane; `first` enters at the bottom.
template <class V, class S, int... lane>
inline V moved_up(V v, S first, std::integer_sequence<int, lane...>) {
  V moved = __builtin_shufflevector(v, v, (lane > 0 ? lane - 1 : 0)...);
  moved[0] = first;
  return moved;
}
template <class V, class S>
inline V moved_up(V v, S first) {
  return moved_up(v, first, std::make_integer_sequence<int, kLanes<float>>{});
}

// Keeps the best in one register, sorted: a key enters without a branch, and most are turned away a
// vector at a time.
inline void largest_in_register(const float* keys, int64_t n, int64_t count, float* best,
                                int64_t* order) {
  constexpr int64_t lanes = kLanes<float>;
  Float values = Float{} + NAN;  // NaN: a free place, which any key takes
  Int ids = {};
  for (int64_t begin = 0; begin < n; begin += lanes) {
    const Float block = load(keys + begin);
    uint32_t bits = lane_bits(~(block <= values[count - 1]));
    if (n - begin < lanes) bits &= (1u << (n - begin)) - 1;
    for (; bits != 0; bits &= bits - 1) {
      const int64_t i = begin + __builtin_ctz(bits);
      const Float key = Float{} + keys[i];
      const Int id = Int{} + static_cast<int32_t>(i);
      const Float above = moved_up(values, INFINITY);
      const Int above_ids = moved_up(ids, 0);
      const Int stays = values >= key, enters = above >= key;
      values = stays ? values : enters ? key : above;
      ids = stays ? ids : enters ? id : above_ids;
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    best[k] = values[k];
    order[k] = ids[k];
  }
}

// The `count` <= n largest keys in descending order, the smaller index where keys tie; no key is
// NaN. `keys` can be read up to a whole vector. Always fills `best` and `order`.
template <class W>
void largest(const W* keys, int64_t n, int64_t count, W* best, int64_t* order) {
  if constexpr (std::is_same_v<W, float>) {
    if (count <= kLanes<float>) return largest_in_register(keys, n, count, best, order);
  }
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const W key = keys[i];
    if (found == count && !(key > best[count - 1])) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && key > best[at - 1]; --at) {
      best[at] = best[at - 1];
      order[at] = order[at - 1];
    }
    best[at] = key;
    order[at] = i;
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
