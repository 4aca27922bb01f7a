// Packing: a block of a matrix becomes a panel that a register tile reads from front to back.
#pragma once

#include <algorithm>
#include <utility>

#include "gemm.h"
#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {  // one copy a file: the compiler inlines or drops it

// Two bf16 of neighbouring k, the unit of the bf16 dot-product instructions.
using Pair = uint32_t;

template <class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & 1) ? n + I / 2 : I / 2)...);
}
template <class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & 1) ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
}

// Transposes a square of lanes: log2(lanes) perfect shuffles.
template <class Unit>
inline void transpose(Vec<Unit> (&x)[kLanes<Unit>]) {
  constexpr int n = kLanes<Unit>;
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 8
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<Unit> y[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + n / 2], lanes);
      y[2 * i + 1] = interleave_high(x[i], x[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
}

inline const char* stored_row(const Operand& from, int64_t row, int64_t row_bytes) {
  if (from.token_of != nullptr) {
    const int64_t token = from.token_of[row];
    if (token < 0 || token >= from.tokens) return nullptr;
    if (from.gather) row = token;
  }
  return static_cast<const char*>(from.data) + row * row_bytes;
}

// A vector of units along k, from `count` elements of one row.
template <class Unit, class T>
inline Vec<Unit> units_along_k(const T* p, int64_t count) {
  constexpr int64_t whole = kLanes<Unit> * static_cast<int64_t>(std::is_same_v<Unit, Pair> ? 2 : 1);
  if constexpr (std::is_same_v<Unit, Pair>) {
    if (count >= whole) return load_unaligned<Vec<Pair>>(p);
    T part[whole] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load_unaligned<Vec<Pair>>(part);
  } else {
    return count >= whole ? load(p) : load(p, count);
  }
}

// to [units][width] from rows that run along k: squares of lanes are transposed.
template <class Unit, class T>
void pack_transposed(Unit* to, const Operand& from, int64_t i0, int64_t ni, int64_t width,
                     int64_t k0, int64_t nk) {
  constexpr int lanes = kLanes<Unit>;
  constexpr int per_unit = std::is_same_v<Unit, Pair> ? 2 : 1;
  constexpr int max_squares = 8;  // a panel is never wider: 128 rows of AMX, read directly
  const T* rows[max_squares * lanes];
  const int64_t squares = (width + lanes - 1) / lanes;
  for (int64_t i = 0; i < squares * lanes; ++i) {
    const char* row = i < ni ? stored_row(from, i0 + i, from.ld * sizeof(T)) : nullptr;
    rows[i] = row ? reinterpret_cast<const T*>(row) + k0 : nullptr;
  }
  for (int64_t k = 0; k < nk; k += lanes * per_unit) {
    Vec<Unit> x[max_squares][lanes];
    for (int64_t s = 0; s < squares; ++s) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const T* row = rows[s * lanes + i];
        x[s][i] = row ? units_along_k<Unit>(row + k, nk - k) : Vec<Unit>{};
      }
      transpose<Unit>(x[s]);
    }
    const int64_t units = std::min<int64_t>(lanes, (nk - k + per_unit - 1) / per_unit);
    // Ascending, so that what a store spills past the width is overwritten by the next one.
    for (int64_t u = 0; u < units; ++u, to += width) {
      for (int64_t s = 0; s < squares; ++s) store_unaligned(to + s * lanes, x[s][u]);
    }
  }
}

template <class T>
inline const T* along_i(const Operand& from, int64_t k, int64_t i0) {
  const char* row = stored_row(from, k, from.ld * sizeof(T));
  return row ? reinterpret_cast<const T*>(row) + i0 : nullptr;
}

// to [units][width] from rows that run along i: plain copies, for pairs two rows are zipped.
template <class Unit, class T>
void pack_copied(Unit* to, const Operand& from, int64_t i0, int64_t ni, int64_t width, int64_t k0,
                 int64_t nk) {
  constexpr int lanes = kLanes<Unit>;
  if constexpr (std::is_same_v<Unit, Pair>) {
    for (int64_t k = 0; k < nk; k += 2, to += width) {
      const T* even = along_i<T>(from, k0 + k, i0);
      const T* odd = k + 1 < nk ? along_i<T>(from, k0 + k + 1, i0) : nullptr;
      for (int64_t i = 0; i < width; i += lanes) {
        const auto half = [&](const T* row) -> Vec<Pair> {
          if (row == nullptr || i >= ni) return Vec<Pair>{};
          if (i + lanes <= ni) {
            return __builtin_convertvector(load_unaligned<Half>(row + i), Vec<Pair>);
          }
          T part[lanes] = {};
          std::memcpy(part, row + i, (ni - i) * sizeof(T));
          return __builtin_convertvector(load_unaligned<Half>(part), Vec<Pair>);
        };
        store_unaligned(to + i, half(even) | half(odd) << 16);
      }
    }
  } else {
    for (int64_t k = 0; k < nk; ++k, to += width) {
      const T* row = along_i<T>(from, k0 + k, i0);
      for (int64_t i = 0; i < width; i += lanes) {
        Vec<Unit> x{};
        if (row != nullptr && i < ni) x = i + lanes <= ni ? load(row + i) : load(row + i, ni - i);
        store_unaligned(to + i, x);
      }
    }
  }
}

// Panels of two vectors, panel_bytes apart, from rows that run along i: row after row (pair after
// pair) goes to all panels, so that memory is read in long runs.
template <class Unit, class T>
void pack_rows(void* to, int64_t panel_bytes, const Operand& from, int64_t i0, int64_t ni,
               int64_t k0, int64_t nk) {
  constexpr int lanes = kLanes<Unit>;
  constexpr bool pairs = std::is_same_v<Unit, Pair>;
  constexpr int64_t width = 2 * lanes, step = pairs ? 2 : 1;
  constexpr int64_t kRowsAhead = 4;
  const int64_t ahead = from.gather ? 0 : kRowsAhead * from.ld;
  char* unit = static_cast<char*>(to);
  for (int64_t k = 0; k < nk; k += step, unit += width * sizeof(Unit)) {
    const T* row = along_i<T>(from, k0 + k, i0);
    const T* second = pairs && k + 1 < nk ? along_i<T>(from, k0 + k + 1, i0) : nullptr;
    char* at = unit;
    int64_t i = 0;
    if (row != nullptr && (!pairs || second != nullptr)) {
      for (; i + width <= ni; i += width, at += panel_bytes) {
        Unit* panel = reinterpret_cast<Unit*>(at);
        __builtin_prefetch(row + i + ahead);
        if constexpr (pairs) {
          using Line = typename VecOf<uint16_t>::type;
          constexpr auto both = std::make_integer_sequence<int, 2 * lanes>{};
          __builtin_prefetch(second + i + ahead);
          const Line x = load_unaligned<Line>(row + i), y = load_unaligned<Line>(second + i);
          store_unaligned(panel, interleave_low(x, y, both));
          store_unaligned(panel + lanes, interleave_high(x, y, both));
        } else {
          if constexpr (width * sizeof(T) > 64) __builtin_prefetch(row + i + lanes + ahead);
          store_unaligned(panel, load(row + i));
          store_unaligned(panel + lanes, load(row + i + lanes));
        }
      }
    }
    for (; i < ni; i += width, at += panel_bytes) {
      pack_copied<Unit, T>(reinterpret_cast<Unit*>(at), from, i0 + i, std::min(width, ni - i),
                           width, k0 + k, std::min(step, nk - k));
    }
  }
}

template <class Unit, class T>
void pack(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
          int64_t nk) {
  if (from.k_contiguous) {
    pack_transposed<Unit, T>(static_cast<Unit*>(to), from, i, ni, width, k, nk);
  } else {
    pack_copied<Unit, T>(static_cast<Unit*>(to), from, i, ni, width, k, nk);
  }
}

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
