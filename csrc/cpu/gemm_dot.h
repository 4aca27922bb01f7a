// Products of very few rows: rows of A and of B, both running along k and read as they lie, are
// multiplied vector by vector. One element of B costs as many products as A has rows, where a
// column of packed A costs a whole vector of them: so B's way from memory is all that takes time.
#pragma once

#include <utility>

#include "gemm_pack.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

#if defined(MOEKERNELS_ISA_avx512)
constexpr int kDotSums = 24, kDotRows = 12;
#else
constexpr int kDotSums = 10, kDotRows = 5;
#endif
// So many rows past a whole vector of them cost less dot by dot than a vector padded with zeros.
constexpr int kDotTail = 3 * kLanes<float> / 8;
// Rows of B at a time. Four streams read memory fastest (measured: 1, 4, 12 streams 30.5, 32, 31.5
// GB/s).
constexpr int dot_streams(int rows) { return std::min(4, kDotSums / rows); }
// How far ahead of its use a line is fetched, in bytes (measured: 1 to 4 KB alike, 8 KB and the
// hardware alone 5 % slower).
constexpr int64_t kDotLead = 2048;

// Half `high` of each 2 s lanes of u and v, in turns: what the sums of s lanes are made of.
template <class V, int s, bool high, int... I>
inline V halves_of(V u, V v, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(u, v, (I / s % 2 * n + I / s / 2 * 2 * s + I % s + high * s)...);
}

// x[0] [i] = sum_lanes(x[i]): two vectors' lanes are added by halves into one, and so on.
template <class Acc, int s = kLanes<Acc> / 2>
inline void sum_lanes_of(Vec<Acc>* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Acc>>{};
#pragma GCC unroll 8
  for (int i = 0; i < s; ++i) {
    x[i] = halves_of<Vec<Acc>, s, false>(x[i], x[i + s], lanes) +
           halves_of<Vec<Acc>, s, true>(x[i], x[i + s], lanes);
  }
  if constexpr (s > 1) sum_lanes_of<Acc, s / 2>(x);
}

// c [i, j c_apart] = or += the lanes of sums [streams, rows, lanes], behind which is memory.
template <class Acc>
__attribute__((noinline)) void put_sums(const Acc* sums, int64_t streams, int64_t rows, Acc* c,
                                        int64_t ldc, int64_t c_apart, bool add) {
  constexpr int lanes = kLanes<Acc>;
  int64_t i = 0, j = 0;
  for (int64_t left = streams * rows; left > 0; left -= lanes, sums += lanes * lanes) {
    Vec<Acc> x[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) x[l] = load(sums + l * lanes);
    sum_lanes_of<Acc>(x);
    const int64_t count = std::min<int64_t>(left, lanes);
    alignas(64) Acc total[lanes];
    store(total, x[0]);
    for (int64_t l = 0; l < count; ++l) {
      Acc* at = c + i * ldc + j * c_apart;
      *at = add ? *at + total[l] : total[l];
      if (++i == rows) i = 0, ++j;
    }
  }
}

// Row b + j apart of each stream j: c [i, j c_apart] = or += A row i times it.
template <class Math, class T, int rows, int streams>
__attribute__((noinline)) void dot_of(int64_t depth, const T* const* a, const T* b, int64_t apart,
                                      typename Math::Acc* c, int64_t ldc, int64_t c_apart,
                                      bool add) {
  using Unit = typename Math::Unit;
  using Acc = typename Math::Acc;
  constexpr int64_t step = kLanes<Unit> * (std::is_same_v<Unit, Pair> ? 2 : 1);
  constexpr int64_t lead = kDotLead / static_cast<int64_t>(sizeof(T));
  const T* from[rows];
  for (int i = 0; i < rows; ++i) from[i] = a[i];
  Vec<Acc> sum[streams][rows] = {};
  const auto products = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Vec<Unit> bv[streams];
#pragma GCC unroll 4
    for (int j = 0; j < streams; ++j) bv[j] = units_along_k<Unit>(b + j * apart + k, count);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const Vec<Unit> av = units_along_k<Unit>(from[i] + k, count);
#pragma GCC unroll 4
      for (int j = 0; j < streams; ++j) sum[j][i] = Math::multiply_add(sum[j][i], av, bv[j]);
    }
  };
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
#pragma GCC unroll 4
    for (int j = 0; j < streams; ++j) __builtin_prefetch(b + j * apart + k + lead);
    products(k, step);
  }
  if (k < depth) products(k, depth - k);
  // Through a copy and a call: sums whose lanes are taken apart here would live in memory all
  // along.
  constexpr int whole = (streams * rows + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
  alignas(64) Acc copy[whole][kLanes<Acc>];
#pragma GCC unroll 4
  for (int j = 0; j < streams; ++j) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) store(copy[j * rows + i], sum[j][i]);
  }
  put_sums(&copy[0][0], streams, rows, c, ldc, c_apart, add);
}

// Each stream is a run of whole rows of B, so that the hardware, which follows one stream a page,
// helps.
template <class Math, class T, int rows>
void dot_columns(int64_t depth, const T* const* a, const T* b, int64_t ldb, int64_t cols,
                 typename Math::Acc* c, int64_t ldc, bool add) {
  constexpr int streams = dot_streams(rows);
  const int64_t each = cols / streams;
  for (int64_t j = 0; j < each; ++j) {
    dot_of<Math, T, rows, streams>(depth, a, b + j * ldb, each * ldb, c + j, ldc, each, add);
  }
  for (int64_t j = each * streams; j < cols; ++j)
    dot_of<Math, T, rows, 1>(depth, a, b + j * ldb, 0, c + j, ldc, 0, add);
}

// c [rows, cols] = or += a b over depth: `a` points at the rows of A, b [cols, ldb].
template <class Math, class T>
void dot(int64_t depth, const void* const* a, int64_t rows, const void* b, int64_t ldb,
         int64_t cols, void* c, int64_t ldc, bool add) {
  const auto run = [&]<int... R>(std::integer_sequence<int, R...>) {
    using Acc = typename Math::Acc;
    using Fn = void(int64_t, const T* const*, const T*, int64_t, int64_t, Acc*, int64_t, bool);
    static constexpr Fn* of[] = {&dot_columns<Math, T, R + 1>...};
    of[rows - 1](depth, reinterpret_cast<const T* const*>(a), static_cast<const T*>(b), ldb, cols,
                 static_cast<Acc*>(c), ldc, add);
  };
  run(std::make_integer_sequence<int, kDotRows>{});
}

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
