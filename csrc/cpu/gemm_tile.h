// Register tiles of vectors: C [rows, 2 vectors] = packed A times packed B, for any arithmetic
// `Math`.
#pragma once

#include <utility>

#include "gemm.h"
#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kFetchUnits = 16;

template <class Math, int MR, int NV>
inline __attribute__((always_inline)) void tile_body(int64_t units, const void* a_panel,
                                                     const void* b_panel, void* c_at, int64_t ldc,
                                                     int64_t cols, Store mode, Ahead& ahead) {
  using Unit = typename Math::Unit;
  using Acc = typename Math::Acc;
  constexpr int lanes = kLanes<Acc>;
  const Unit* a = static_cast<const Unit*>(a_panel);
  const Unit* b = static_cast<const Unit*>(b_panel);
  Acc* c = static_cast<Acc*>(c_at);
  if (mode == Store::add) {
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < NV; ++v) __builtin_prefetch(c + r * ldc + v * lanes, 1);
    }
  }
  Vec<Acc> sum[MR][NV] = {};
  for (int64_t left = units; left > 0; left -= kFetchUnits) {
    ahead.fetch();
    for (int64_t u = std::min(left, kFetchUnits); u > 0; --u) {
      Vec<Unit> bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load_unaligned<Vec<Unit>>(b + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = Math::multiply_add(sum[r][v], splat(a[r]), bv[v]);
      }
      a += MR;
      b += NV * lanes;
    }
  }
  if constexpr (requires { Math::narrow; }) {
    if (mode == Store::narrow) {
      auto* to = static_cast<typename Math::Narrow*>(c_at);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) Math::narrow(to + r * ldc, sum[r], cols);
      return;
    }
  }
  const auto each = [&](const auto& put) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) put(c + r * ldc + v * lanes, sum[r][v]);
    }
  };
  if (cols == NV * lanes) {
    switch (mode) {
      case Store::set: return each([](Acc* at, Vec<Acc> x) { store(at, x); });
      case Store::add: return each([](Acc* at, Vec<Acc> x) { store(at, load(at) + x); });
      case Store::stream: return each([](Acc* at, Vec<Acc> x) { stream(at, x); });
      case Store::narrow: return;  // done
    }
  }
  // Through a copy: sums with an address would be cleared in memory for every tile.
  const bool add = mode == Store::add;
  Acc copy[MR][NV * lanes];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(copy[r] + v * lanes, sum[r][v]);
  }
  for (int r = 0; r < MR; ++r) {
    for (int64_t j = 0; j < cols; ++j)
      c[r * ldc + j] = add ? c[r * ldc + j] + copy[r][j] : copy[r][j];
  }
}

using TileFn = void(int64_t, const void*, const void*, void*, int64_t, int64_t, Store, Ahead&);

template <class Math, int MR, int NV>
void tile_of(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t cols,
             Store mode, Ahead& ahead) {
  tile_body<Math, MR, NV>(units, a, b, c, ldc, cols, mode, ahead);
}

template <class Math, int NV, int... MR>
void dispatch_tile(std::integer_sequence<int, MR...>, int64_t units, const void* a, const void* b,
                   void* c, int64_t ldc, int64_t rows, int64_t cols, Store mode, Ahead& ahead) {
  static constexpr TileFn* tiles[] = {&tile_of<Math, MR + 1, NV>...};
  tiles[rows - 1](units, a, b, c, ldc, cols, mode, ahead);
}

// 14 x 2 vectors fill the 32 registers of AVX-512, 6 x 2 the 16 of the levels below.
#if defined(MOEKERNELS_ISA_avx512)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

template <class Math>
void tile(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t rows,
          int64_t cols, Store mode, Ahead& ahead) {
  dispatch_tile<Math, kVectors>(std::make_integer_sequence<int, kRows>{}, units, a, b, c, ldc, rows,
                                cols, mode, ahead);
}

// ---- products with B read as it lies: MR of its rows times NV vectors of packed A, into [rows of
// B, width]

// How many rows of B fit beside NV vectors of A in the registers.
constexpr int direct_rows_of(int vectors) {
#if defined(MOEKERNELS_ISA_avx512)
  constexpr int rows[] = {0, 12, 12, 8, 6, 5, 4};
#else
  constexpr int rows[] = {0, 6, 5, 4};
#endif
  return rows[vectors];
}
#if defined(MOEKERNELS_ISA_avx512)
constexpr int kDirectVectors = 6;
#else
constexpr int kDirectVectors = 3;
#endif

template <class Math, int MR, int NV>
inline __attribute__((always_inline)) void direct_rows(int64_t units, int64_t block,
                                                       const typename Math::Unit* b, int64_t ldb,
                                                       const typename Math::Unit* a,
                                                       typename Math::Acc* ct) {
  using Unit = typename Math::Unit;
  using Acc = typename Math::Acc;
  constexpr int lanes = kLanes<Acc>;
  constexpr int64_t line = 64 / sizeof(Unit);
  for (int64_t u0 = 0; u0 < units; u0 += block) {
    Vec<Acc> sum[MR][NV] = {};
    const auto step = [&](int64_t u) __attribute__((always_inline)) {
      Vec<Unit> av[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) av[v] = load_unaligned<Vec<Unit>>(a + (u * NV + v) * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          sum[r][v] = Math::multiply_add(sum[r][v], splat(b[r * ldb + u]), av[v]);
      }
    };
    const int64_t end = u0 + block < units ? u0 + block : units;
    int64_t u = u0;
    for (; u + line <= end; u += line) {
      // The next rows, one line of each ahead of time: every row is a stream too short for the
      // hardware to follow.
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) __builtin_prefetch(b + (MR + r) * ldb + u, 0, 2);
      for (int64_t i = 0; i < line; ++i) step(u + i);
    }
    for (; u < end; ++u) step(u);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        Acc* at = ct + (r * NV + v) * lanes;
        store(at, u0 == 0 ? sum[r][v] : load(at) + sum[r][v]);
      }
    }
  }
}

// A function of its own for each shape: the registers are allotted within it.
template <class Math, int MR, int NV>
__attribute__((noinline)) void direct_of(int64_t units, int64_t block, const void* b, int64_t ldb,
                                         const void* a, void* ct) {
  using Unit = typename Math::Unit;
  direct_rows<Math, MR, NV>(units, block, static_cast<const Unit*>(b), ldb,
                            static_cast<const Unit*>(a), static_cast<typename Math::Acc*>(ct));
}

template <class Math, int NV>
void direct_vectors(int64_t units, int64_t block, const typename Math::Unit* b, int64_t ldb,
                    int64_t cols, const void* a, typename Math::Acc* ct) {
  constexpr int rows = direct_rows_of(NV);
  int64_t j = 0;
  const auto at = [&](int64_t column) { return ct + column * NV * kLanes<typename Math::Acc>; };
  for (; j + rows <= cols; j += rows)
    direct_of<Math, rows, NV>(units, block, b + j * ldb, ldb, a, at(j));
  if (j < cols && cols >= rows) {
    // Reaching back over rows already done: one at a time they would wait for their own sums.
    direct_of<Math, rows, NV>(units, block, b + (cols - rows) * ldb, ldb, a, at(cols - rows));
    return;
  }
  for (; j < cols; ++j) direct_of<Math, 1, NV>(units, block, b + j * ldb, ldb, a, at(j));
}

// ldb counts units; `width` is a whole number of vectors.
template <class Math, int64_t block>
void direct(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a, int64_t width,
            float* ct) {
  const auto run = [&]<int... V>(std::integer_sequence<int, V...>) {
    using Fn =
        void(int64_t, int64_t, const typename Math::Unit*, int64_t, int64_t, const void*, float*);
    static constexpr Fn* of[] = {&direct_vectors<Math, V + 1>...};
    of[width / kLanes<float> - 1](units, block, static_cast<const typename Math::Unit*>(b), ldb,
                                  cols, a, ct);
  };
  run(std::make_integer_sequence<int, kDirectVectors>{});
}

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
