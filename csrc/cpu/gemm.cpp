// Packing and register tiles. Compiled once for each ISA level; avx512_bf16 and AMX are chosen within the avx512 level.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// Two bf16 of neighbouring k, the unit of the bf16 dot-product instructions.
using Pair = uint32_t;

// ---- packing

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
void pack_transposed(Unit* to, const Operand& from, int64_t i0, int64_t ni, int64_t width, int64_t k0,
                     int64_t nk) {
  constexpr int lanes = kLanes<Unit>;
  constexpr int per_unit = std::is_same_v<Unit, Pair> ? 2 : 1;
  constexpr int max_squares = 4;  // a panel is never wider than that
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

template <class Unit, class T>
void pack(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k, int64_t nk) {
  if (from.k_contiguous) {
    pack_transposed<Unit, T>(static_cast<Unit*>(to), from, i, ni, width, k, nk);
  } else {
    pack_copied<Unit, T>(static_cast<Unit*>(to), from, i, ni, width, k, nk);
  }
}

// ---- register tiles

struct PlainFloat {
  using Unit = float;
  using Acc = float;
  static Vec<float> multiply_add(Vec<float> sum, float a, Vec<float> b) { return sum + splat(a) * b; }
};
struct PlainDouble {
  using Unit = double;
  using Acc = double;
  static Vec<double> multiply_add(Vec<double> sum, double a, Vec<double> b) {
    return sum + splat(a) * b;
  }
};

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

template <class Math, class T>
constexpr Engine plain_engine() {
  using Unit = typename Math::Unit;
  return {.mr = kRows,
          .nr = kVectors * kLanes<Unit>,
          .row_granule = 1,
          .k_unit = 1,
          .k_block = 256,
          .unit_bytes = sizeof(Unit),
          .acc_bytes = sizeof(typename Math::Acc),
          .pack_a = &pack<Unit, T>,
          .pack_b = &pack<Unit, T>,
          .tile = &tile<Math>};
}

}  // namespace

const Engine& engine_for(DType dtype) {
  static constexpr Engine f32 = plain_engine<PlainFloat, float>();
  static constexpr Engine f64 = plain_engine<PlainDouble, double>();
  static constexpr Engine bf16_wide = plain_engine<PlainFloat, bf16>();
  static constexpr Engine f16_wide = plain_engine<PlainFloat, f16>();
  switch (dtype) {
    case DType::f64: return f64;
    case DType::bf16: return bf16_wide;
    case DType::f16: return f16_wide;
    default: return f32;
  }
}

Workspace& Workspace::mine() {
  static thread_local Workspace workspace;
  return workspace;
}

void* Workspace::room(int slot, int64_t bytes) {
  constexpr int64_t slack = 256;  // packing may spill a vector past the end
  if (bytes + slack > bytes_[slot]) {
    std::free(memory_[slot]);
    bytes_[slot] = (bytes + bytes / 4 + slack + 4095) / 4096 * 4096;
    memory_[slot] = std::aligned_alloc(4096, bytes_[slot]);
    if (memory_[slot] == nullptr) {
      bytes_[slot] = 0;
      throw std::bad_alloc();
    }
  }
  return memory_[slot];
}

Workspace::~Workspace() {
  for (void* memory : memory_) std::free(memory);
}

void Workspace::multiply(const Engine& engine, const Operand& a, const Operand& b, const Block& block,
                         int64_t depth, void* c, int64_t ldc, bool add) {
  const int64_t rows = block.m1 - block.m0, columns = block.n1 - block.n0;
  const int64_t granule = engine.row_granule;
  const int64_t padded = ceil_div(rows, granule) * granule;
  // Row tiles of nearly equal height, in whole granules.
  const int64_t tiles = ceil_div(padded, engine.mr);
  const auto tile_begin = [&](int64_t i) { return std::min(rows, padded / granule * i / tiles * granule); };
  const int64_t all_units = ceil_div(depth, engine.k_unit);
  const int64_t block_units = engine.k_block / engine.k_unit;

  char* a_panels = static_cast<char*>(room(0, all_units * padded * engine.unit_bytes));
  const Packed wanted{a.data, block.m0, block.m1, a.token_of};
  const bool packed = packed_ == wanted;
  char* b_panel = static_cast<char*>(room(1, block_units * engine.nr * engine.unit_bytes));

  for (int64_t u = 0; u < all_units; u += block_units) {
    const int64_t units = std::min(block_units, all_units - u);
    const int64_t k = u * engine.k_unit, nk = std::min(depth - k, units * engine.k_unit);
    char* const a_block = a_panels + u * padded * engine.unit_bytes;
    if (!packed) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t m = tile_begin(i), height = tile_begin(i + 1) - m;
        engine.pack_a(a_block + m * units * engine.unit_bytes, a, block.m0 + m, height,
                      ceil_div(height, granule) * granule, k, nk);
      }
    }
    for (int64_t n = 0; n < columns; n += engine.nr) {
      const int64_t width = std::min(engine.nr, columns - n);
      engine.pack_b(b_panel, b, block.n0 + n, width, engine.nr, k, nk);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t m = tile_begin(i), height = tile_begin(i + 1) - m;
        engine.tile(units, a_block + m * units * engine.unit_bytes, b_panel,
                    static_cast<char*>(c) + (m * ldc + n) * engine.acc_bytes, ldc, height, width, add || u > 0);
      }
    }
  }
  packed_ = wanted;
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
