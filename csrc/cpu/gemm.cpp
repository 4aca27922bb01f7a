// The engines for fp32, fp64 and what widens to fp32, and the blocked product over any engine.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "gemm_dot.h"
#include "gemm_pack.h"
#include "gemm_tile.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

struct PlainFloat {
  using Unit = float;
  using Acc = float;
  static Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
};
struct PlainDouble {
  using Unit = double;
  using Acc = double;
  static Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) {
    return sum + a * b;
  }
};

template <class Math, class T>
constexpr Engine plain_engine() {
  using Unit = typename Math::Unit;
  Engine engine{.mr = kRows,
                .nr = kVectors * kLanes<Unit>,
                .row_granule = 1,
                .k_unit = 1,
                .k_block = 256,
                .unit_bytes = sizeof(Unit),
                .acc_bytes = sizeof(typename Math::Acc),
                .element_bytes = sizeof(T),
                .pack_a = &pack<Unit, T>,
                .pack_b = &pack<Unit, T>,
                .pack_rows = &pack_rows<Unit, T>,
                .tile = &tile<Math>,
                .fetch_units = kFetchUnits,
                .dot_rows = kDotRows,
                .dot = &dot<Math, T>};
  if constexpr (std::is_same_v<T, float>) {
    engine.direct_rows = kDirectVectors * kLanes<float>;
    engine.direct_passes = 2;
    engine.direct_granule = kLanes<float>;
    engine.direct = &direct<Math, 256>;
  }
  return engine;
}

}  // namespace

const Engine& engine_for(DType dtype) {
  static constexpr Engine f32 = plain_engine<PlainFloat, float>();
  static constexpr Engine f64 = plain_engine<PlainDouble, double>();
  static constexpr Engine bf16_wide = plain_engine<PlainFloat, bf16>();
  static constexpr Engine f16_wide = plain_engine<PlainFloat, f16>();
  switch (dtype) {
    case DType::f64: return f64;
    case DType::bf16:
#if defined(MOEKERNELS_ISA_avx512)
      if (bf16_unit() != Bf16Unit::none) return bf16_engine(bf16_unit());
#endif
      return bf16_wide;
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

// c [rows, columns] = ct [columns, width] turned.
void transpose_block(const float* ct, int64_t width, int64_t rows, int64_t columns, float* c,
                     int64_t ldc, bool add) {
  constexpr int lanes = kLanes<float>;
  for (int64_t j = 0; j < columns; j += lanes) {
    for (int64_t i = 0; i < rows; i += lanes) {
      Vec<float> x[lanes];
      for (int64_t l = 0; l < lanes; ++l)
        x[l] = j + l < columns ? load(ct + (j + l) * width + i) : Vec<float>{};
      transpose<float>(x);
      const int64_t count = std::min<int64_t>(lanes, columns - j);
      for (int64_t l = 0; l < lanes && i + l < rows; ++l) {
        float* at = c + (i + l) * ldc + j;
        if (count == lanes) {
          store(at, add ? load(at) + x[l] : x[l]);
        } else {
          store_tail(at, add ? load_tail(at, count) + x[l] : x[l], count);
        }
      }
    }
  }
}

void Workspace::multiply_dots(const Engine& engine, const Operand& a, const Operand& b,
                              const Block& block, int64_t depth, void* c, int64_t ldc, bool add) {
  const void* rows[kDotRows];
  const int64_t count = block.m1 - block.m0, bytes = depth * engine.element_bytes;
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = stored_row(a, block.m0 + i, a.ld * engine.element_bytes);
    if (rows[i] == nullptr) rows[i] = std::memset(room(4, bytes), 0, bytes);
  }
  engine.dot(depth, rows, count,
             static_cast<const char*>(b.data) + block.n0 * b.ld * engine.element_bytes, b.ld,
             block.n1 - block.n0, c, ldc, add);
}

void Workspace::multiply_directly(const Engine& engine, const Operand& a, const Operand& b,
                                  const Block& block, int64_t depth, float* c, int64_t ldc,
                                  Store mode) {
  const int64_t rows = block.m1 - block.m0, columns = block.n1 - block.n0;
  const int64_t granule = engine.direct_granule, width = ceil_div(rows, granule) * granule;
  const int64_t units = depth / engine.k_unit;
  const int64_t passes = ceil_div(rows, engine.direct_rows);
  const auto pass_begin = [&](int64_t i) { return width / granule * i / passes * granule; };
  char* panels = static_cast<char*>(room(0, units * width * engine.unit_bytes));
  const Packed wanted{a.data, block.m0, block.m1, a.token_of, 0};
  const bool packed = packed_ == wanted;
  packed_ = wanted;
  // In several passes the second one finds B in the second cache. The registers hold 4, 5, 6 or 12
  // of its rows at a time.
  constexpr int64_t kCache = 1 << 20, kRowsOfB = 120;
  const int64_t fitting =
      kCache / std::max(depth * engine.element_bytes, engine.element_bytes) / kRowsOfB * kRowsOfB;
  const int64_t columns_at_once = passes == 1 ? columns : std::max(kRowsOfB, fitting);
  float* ct = static_cast<float*>(room(3, columns * width * sizeof(float)));
  if (engine.enter != nullptr) engine.enter();
  for (int64_t j = 0; j < columns; j += columns_at_once) {
    const int64_t count = std::min(columns_at_once, columns - j);
    for (int64_t i = 0; i < passes; ++i) {
      const int64_t m = pass_begin(i), m_width = pass_begin(i + 1) - m,
                    m_rows = std::min(m_width, rows - m);
      char* panel = panels + m * units * engine.unit_bytes;
      if (j == 0 && !packed) engine.pack_b(panel, a, block.m0 + m, m_rows, m_width, 0, depth);
      // A unit of B holds k_unit elements, so its leading dimension counts ld / k_unit of them.
      const char* first =
          static_cast<const char*>(b.data) + (block.n0 + j) * b.ld * engine.element_bytes;
      engine.direct(units, first, b.ld / engine.k_unit, count, panel, m_width, ct);
      transpose_block(ct, m_width, m_rows, count, c + m * ldc + j, ldc, mode == Store::add);
    }
  }
  if (engine.leave != nullptr) engine.leave();
}

// The block of B that is packed after the one at k: the same columns further down, then the next
// columns, then the next expert.
Ahead Workspace::next_of(const Engine& engine, const Operand& b, const Block& block, int64_t depth,
                         int64_t k, int64_t k_block) {
  if (b.token_of != nullptr) return {};
  int64_t i = block.n0;
  const int64_t columns = block.n1 - block.n0, out = b.k_contiguous ? INT64_MAX : b.ld;
  k += k_block;
  if (k >= depth) {
    k = 0;
    i = block.n1;
    if (i >= out) i = 0, k = depth;
  }
  const int64_t nk = std::min(k_block, depth),
                width = (b.k_contiguous ? nk : columns) * engine.element_bytes;
  return {.at = static_cast<const char*>(b.data) +
                (b.k_contiguous ? i * b.ld + k : k * b.ld + i) * engine.element_bytes,
          .ld = b.ld * engine.element_bytes,
          .lines = ceil_div(width, 64),
          .rows = b.k_contiguous ? columns : nk};
}

void Workspace::multiply(const Engine& engine, const Operand& a, const Operand& b,
                         const Block& block, int64_t depth, void* c, int64_t ldc, Store mode) {
  const int64_t rows = block.m1 - block.m0, columns = block.n1 - block.n0;
  if (depth == 0) {  // there is nothing to sum
    for (int64_t r = 0; r < rows && mode != Store::add; ++r) {
      std::memset(static_cast<char*>(c) + r * ldc * engine.acc_bytes, 0,
                  columns * engine.acc_bytes);
    }
    return;
  }
  if (rows <= engine.dot_rows && a.k_contiguous && b.k_contiguous) {
    return multiply_dots(engine, a, b, block, depth, c, ldc, mode == Store::add);
  }
  if (rows <= engine.direct_passes * engine.direct_rows && columns >= engine.direct_cols &&
      b.k_contiguous && depth % engine.direct_k == 0 && b.ld % engine.direct_k == 0) {
    return multiply_directly(engine, a, b, block, depth, static_cast<float*>(c), ldc, mode);
  }
  const int64_t granule = engine.row_granule;
  const int64_t padded = ceil_div(rows, granule) * granule;
  // Row tiles of nearly equal height, in whole granules.
  const int64_t tiles = ceil_div(padded, engine.mr);
  const auto tile_begin = [&](int64_t i) {
    return std::min(rows, padded / granule * i / tiles * granule);
  };
  const int64_t all_units = ceil_div(depth, engine.k_unit);
  // Panels of many columns are cut shorter, so that they stay in the second cache beside C and the
  // rows to come.
  const int64_t block_units = engine.k_block / engine.k_unit / (columns > 512 ? 2 : 1);
  if (mode == Store::stream) {
    const bool aligned =
        reinterpret_cast<uintptr_t>(c) % 64 == 0 && ldc * engine.acc_bytes % 64 == 0;
    if (!aligned || all_units > block_units) mode = Store::set;
  }

  char* a_panels = static_cast<char*>(room(0, all_units * padded * engine.unit_bytes));
  const Packed wanted{a.data, block.m0, block.m1, a.token_of, block_units};
  const bool packed = packed_ == wanted;
  const int64_t panels = ceil_div(columns, engine.nr);
  char* b_panels =
      static_cast<char*>(room(1, panels * block_units * engine.nr * engine.unit_bytes));

  if (engine.enter != nullptr) engine.enter();
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
    const int64_t panel_bytes = units * engine.nr * engine.unit_bytes;
    if (b.k_contiguous) {
      for (int64_t p = 0; p < panels; ++p) {
        engine.pack_b(b_panels + p * panel_bytes, b, block.n0 + p * engine.nr,
                      std::min(engine.nr, columns - p * engine.nr), engine.nr, k, nk);
      }
    } else {
      engine.pack_rows(b_panels, panel_bytes, b, block.n0, columns, k, nk);
    }
    Ahead ahead;
    if (engine.fetch_units > 0) {
      ahead = next_of(engine, b, block, depth, k, block_units * engine.k_unit);
      ahead.burst =
          ceil_div(ahead.rows * ahead.lines, panels * tiles * ceil_div(units, engine.fetch_units));
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t n = p * engine.nr, width = std::min(engine.nr, columns - n);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t m = tile_begin(i), height = tile_begin(i + 1) - m;
        engine.tile(units, a_block + m * units * engine.unit_bytes, b_panels + p * panel_bytes,
                    static_cast<char*>(c) + (m * ldc + n) * engine.acc_bytes, ldc, height, width,
                    u > 0 ? Store::add : mode, ahead);
      }
    }
  }
  if (engine.leave != nullptr) engine.leave();
  packed_ = wanted;
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
