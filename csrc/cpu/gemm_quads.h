// Products of some rows with B read as it lies, four units of k at a time: a broadcast of them
// takes part in four times the products that a broadcast of one does, so that the loads do not hold
// up the products, and rows are padded to four alone. A vector of A is four rows' next four units;
// its lanes of one row are added up at the end.
#pragma once

#include <utility>

#include "gemm_dot.h"

#if defined(MOEKERNELS_ISA_avx512)

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kQuad = 4;                    // units, and rows
constexpr int kLeastQuads = 4, kMostQuads = 6;  // of A at a time: the sums fill the registers
// So many rows of B beside n vectors of A. (Measured at 16, 20 and 24 rows: 8.6, 11 and 13.3 cycles
// for a line of B; with broadcasts of one unit 10.5 and, padded to 32 rows, 17.)
constexpr int quad_rows_of(int n) { return n == 4 ? 6 : n == 5 ? 5 : 4; }

// to [units / 4][n] vectors. The first four hold 16 rows, vector v rows v, 4 + v, 8 + v and 12 + v;
// those behind hold the others alike.
template <class Unit, class T>
void pack_quads(void* to, const Operand& from, int64_t i0, int64_t ni, int64_t units) {
  constexpr int64_t bytes = kQuad * sizeof(Unit);
  const int64_t n = ceil_div(ni, kQuad);
  for (int64_t i = 0; i < n * kQuad; ++i) {
    const char* row = i < ni ? stored_row(from, i0 + i, from.ld * sizeof(T)) : nullptr;
    const int64_t first = i < 16 ? 0 : 4, of = i < 16 ? 4 : n - 4, r = i - 4 * first;
    char* at = static_cast<char*>(to) + ((first + r % of) * kQuad + r / of) * bytes;
    for (int64_t u = 0; u < units; u += kQuad, at += n * kQuad * bytes) {
      if (row != nullptr) {
        std::memcpy(at, row + u * sizeof(Unit), bytes);
      } else {
        std::memset(at, 0, bytes);
      }
    }
  }
}

template <class Unit>
inline Vec<Unit> broadcast_quad(const Unit* p) {
  return (Vec<Unit>)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The sums of n <= 4 vectors' quads of lanes, in the order of their rows.
template <int n>
inline Vec<float> sum_quads(const Vec<float>* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
  using V = Vec<float>;
  V even = x[0], odd = n > 1 ? x[1] : V{};
  const V third = n > 2 ? x[2] : V{}, fourth = n > 3 ? x[3] : V{};
  even = halves_of<V, 2, false>(even, third, lanes) + halves_of<V, 2, true>(even, third, lanes);
  odd = halves_of<V, 2, false>(odd, fourth, lanes) + halves_of<V, 2, true>(odd, fourth, lanes);
  const V all = halves_of<V, 1, false>(even, odd, lanes) + halves_of<V, 1, true>(even, odd, lanes);
  constexpr auto mask = static_cast<__mmask16>(0x1111 * ((1 << n) - 1));
  return n == 4 ? all : (V)_mm512_maskz_compress_ps(mask, (__m512)all);
}

// ct [rows of B, 4 n], and what a vector spills past the last, = MR rows of B times n vectors of A.
template <class Math, int MR, int n>
__attribute__((noinline)) void quads_of(int64_t units, const typename Math::Unit* b, int64_t ldb,
                                        const typename Math::Unit* a, float* ct) {
  using Unit = typename Math::Unit;
  constexpr int64_t lanes = kLanes<float>, line = 64 / sizeof(Unit);
  Vec<float> sum[MR][n] = {};
  const auto step = [&](int64_t u) __attribute__((always_inline)) {
    Vec<Unit> bv[MR];
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) bv[r] = broadcast_quad(b + r * ldb + u);
#pragma GCC unroll 6
    for (int v = 0; v < n; ++v) {
      const Vec<Unit> av = load_unaligned<Vec<Unit>>(a + (u / kQuad * n + v) * lanes);
#pragma GCC unroll 6
      for (int r = 0; r < MR; ++r) sum[r][v] = Math::multiply_add(sum[r][v], bv[r], av);
    }
  };
  int64_t u = 0;
  for (; u + line <= units; u += line) {
    // The next rows, one line of each ahead of time, as in direct_rows.
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) __builtin_prefetch(b + (MR + r) * ldb + u, 0, 2);
#pragma GCC unroll 4
    for (int64_t i = 0; i < line; i += kQuad) step(u + i);
  }
  for (; u < units; u += kQuad) step(u);
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
    Vec<float> x[n];
#pragma GCC unroll 6
    for (int v = 0; v < n; ++v) x[v] = sum[r][v];
    float* at = ct + r * kQuad * n;
    store(at, sum_quads<4>(x));
    if constexpr (n > 4) store(at + 16, sum_quads<n - 4>(x + 4));
  }
}

template <class Math, int n>
void quad_vectors(int64_t units, const typename Math::Unit* b, int64_t ldb, int64_t cols,
                  const typename Math::Unit* a, float* ct) {
  constexpr int rows = quad_rows_of(n);
  const auto run = [&](int64_t j) {
    quads_of<Math, rows, n>(units, b + j * ldb, ldb, a, ct + j * kQuad * n);
  };
  int64_t j = 0;
  for (; j + rows <= cols; j += rows) run(j);
  if (j < cols) run(cols - rows);  // back over rows already done
}

// ct [cols, 4 n] = B rows [cols] times packed A; n from kLeastQuads to kMostQuads.
template <class Math>
void quads(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a, int64_t n,
           float* ct) {
  using Unit = typename Math::Unit;
  using Fn = void(int64_t, const Unit*, int64_t, int64_t, const Unit*, float*);
  static constexpr Fn* of[] = {&quad_vectors<Math, 4>, &quad_vectors<Math, 5>,
                               &quad_vectors<Math, 6>};
  of[n - kLeastQuads](units, static_cast<const Unit*>(b), ldb, cols, static_cast<const Unit*>(a),
                      ct);
}

template <class Math, class T>
constexpr RowQuads row_quads() {
  using Unit = typename Math::Unit;
  return {.least_rows = kLeastQuads * kQuad - 3,
          .most_rows = kMostQuads * kQuad,
          .least_columns = quad_rows_of(kLeastQuads),
          .k_divisor = kQuad * static_cast<int64_t>(sizeof(Unit) / sizeof(T)),
          .pack = &pack_quads<Unit, T>,
          .multiply = &quads<Math>};
}

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA

#endif
