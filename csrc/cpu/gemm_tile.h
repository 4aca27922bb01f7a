// Register tiles of vectors: C [rows, 2 vectors] = packed A times packed B, for any arithmetic `Math`.
#pragma once

#include <utility>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

template <class Math, int MR, int NV>
inline __attribute__((always_inline)) void tile_body(int64_t units, const void* a_panel,
                                                     const void* b_panel, void* c_at, int64_t ldc,
                                                     int64_t cols, bool add) {
  using Unit = typename Math::Unit;
  using Acc = typename Math::Acc;
  constexpr int lanes = kLanes<Acc>;
  const Unit* a = static_cast<const Unit*>(a_panel);
  const Unit* b = static_cast<const Unit*>(b_panel);
  Acc* c = static_cast<Acc*>(c_at);
  Vec<Acc> sum[MR][NV] = {};
  for (int64_t u = 0; u < units; ++u) {
    Vec<Unit> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load_unaligned<Vec<Unit>>(b + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = Math::multiply_add(sum[r][v], a[r], bv[v]);
    }
    a += MR;
    b += NV * lanes;
  }
  if (cols == NV * lanes) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Acc* at = c + r * ldc + v * lanes;
        store_unaligned(at, add ? load_unaligned<Vec<Acc>>(at) + sum[r][v] : sum[r][v]);
      }
    }
    return;
  }
  for (int r = 0; r < MR; ++r) {
    const Acc* from = reinterpret_cast<const Acc*>(sum[r]);
    for (int64_t j = 0; j < cols; ++j) c[r * ldc + j] = add ? c[r * ldc + j] + from[j] : from[j];
  }
}

using TileFn = void(int64_t, const void*, const void*, void*, int64_t, int64_t, bool);

template <class Math, int MR, int NV>
void tile_of(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t cols, bool add) {
  tile_body<Math, MR, NV>(units, a, b, c, ldc, cols, add);
}

template <class Math, int NV, int... MR>
void dispatch_tile(std::integer_sequence<int, MR...>, int64_t units, const void* a, const void* b, void* c,
                   int64_t ldc, int64_t rows, int64_t cols, bool add) {
  static constexpr TileFn* tiles[] = {&tile_of<Math, MR + 1, NV>...};
  tiles[rows - 1](units, a, b, c, ldc, cols, add);
}

// 14 x 2 vectors fill the 32 registers of AVX-512, 6 x 2 the 16 of the levels below.
#if defined(MOEKERNELS_ISA_avx512)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

template <class Math>
void tile(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t rows, int64_t cols,
          bool add) {
  dispatch_tile<Math, kVectors>(std::make_integer_sequence<int, kRows>{}, units, a, b, c, ldc, rows, cols,
                                add);
}

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
