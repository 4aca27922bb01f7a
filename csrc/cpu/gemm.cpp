// The engines for fp32, fp64 and what widens to fp32, and the blocked product over any engine.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "gemm_dot.h"
#include "gemm_pack.h"
#include "gemm_quads.h"
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
  Engine engine{
      .k_unit = 1,
      .unit_bytes = sizeof(Unit),
      .acc_bytes = sizeof(typename Math::Acc),
      .element_bytes = sizeof(T),
      .tiles = {.mr = kRows,
                .nr = kVectors * kLanes<Unit>,
                .row_granule = 1,
                .k_block = 256,
                .fetch_units = kFetchUnits,
                .narrows = false,
                .pack_a = &pack<Unit, T>,
                .pack_b = &pack<Unit, T>,
                .pack_rows = &pack_rows<Unit, T>,
                .multiply = &tile<Math>},
      .dots = {.most_rows = kDotRows, .multiply = &dot<Math, T>},
  };
  if constexpr (std::is_same_v<T, float>) {
    engine.direct = {.passes = 2,
                     .rows_per_pass = kDirectVectors * kLanes<float>,
                     .granule = kLanes<float>,
                     .most_over = kDotTail,
                     .multiply = &direct<Math, 256>};
#if defined(MOEKERNELS_ISA_avx512)
    engine.quads = row_quads<Math, T>();
#endif
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

void* Workspace::room(Room which, int64_t bytes) {
  const int slot = static_cast<int>(which);
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

bool Workspace::claim_panels(const Product& p, int64_t units) {
  const Packed wanted{p.a.data, p.block.m0, p.block.m1, p.a.token_of, units};
  const bool packed = packed_ == wanted;
  packed_ = wanted;
  return packed;
}

namespace {

// Row tiles of nearly equal height, in whole granules.
struct RowTiles {
  int64_t rows, granule, padded, count;

  RowTiles(const PackedTiles& tiles, int64_t m)
      : rows(m),
        granule(tiles.row_granule),
        padded(ceil_div(m, granule) * granule),
        count(ceil_div(padded, tiles.mr)) {}
  int64_t begin(int64_t i) const { return std::min(rows, padded / granule * i / count * granule); }
  int64_t height(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t padded_height(int64_t i) const { return ceil_div(height(i), granule) * granule; }
};

// The depth that is packed at a time. Panels of many columns are cut shorter, so that they stay in
// the second cache beside C and the rows to come.
int64_t units_at_once(const Engine& engine, int64_t columns) {
  constexpr int64_t kManyColumns = 512;
  return engine.tiles.k_block / engine.k_unit / (columns > kManyColumns ? 2 : 1);
}

// Past the caches only where whole lines are written, and once.
Store mode_of(const Engine& engine, const Product& p, bool in_one_go) {
  if (p.mode != Store::stream) return p.mode;
  const bool aligned =
      reinterpret_cast<uintptr_t>(p.c) % 64 == 0 && p.ldc * engine.acc_bytes % 64 == 0;
  return aligned && in_one_go ? Store::stream : Store::set;
}

// The block of B that is packed after the one at k: the same columns further down, then the next
// columns, then the next expert.
Ahead next_of(const Engine& engine, const Product& p, int64_t k, int64_t k_block) {
  const Operand& b = p.b;
  if (b.token_of != nullptr) return {};
  int64_t i = p.block.n0;
  const int64_t columns = p.block.columns(), out = b.k_contiguous ? INT64_MAX : b.ld;
  k += k_block;
  if (k >= p.depth) {
    k = 0;
    i = p.block.n1;
    if (i >= out) {
      i = 0;
      k = p.depth;
    }
  }
  const int64_t nk = std::min(k_block, p.depth);
  const int64_t width = (b.k_contiguous ? nk : columns) * engine.element_bytes;
  return {.at = static_cast<const char*>(b.data) +
                (b.k_contiguous ? i * b.ld + k : k * b.ld + i) * engine.element_bytes,
          .ld = b.ld * engine.element_bytes,
          .lines = ceil_div(width, 64),
          .rows = b.k_contiguous ? columns : nk};
}

void pack_columns(const Engine& engine, const Product& p, char* panels, int64_t panel_bytes,
                  int64_t k, int64_t nk) {
  const int64_t nr = engine.tiles.nr, columns = p.block.columns();
  if (!p.b.k_contiguous) {
    engine.tiles.pack_rows(panels, panel_bytes, p.b, p.block.n0, columns, k, nk);
    return;
  }
  for (int64_t n = 0; n < columns; n += nr) {
    engine.tiles.pack_b(panels + n / nr * panel_bytes, p.b, p.block.n0 + n,
                        std::min(nr, columns - n), nr, k, nk);
  }
}

}  // namespace

void Workspace::multiply_packed(const Engine& engine, const Product& p) {
  const PackedTiles& tiles = engine.tiles;
  const int64_t columns = p.block.columns(), panels = ceil_div(columns, tiles.nr);
  const RowTiles heights(tiles, p.block.rows());
  const int64_t all_units = ceil_div(p.depth, engine.k_unit);
  const int64_t block_units = units_at_once(engine, columns);
  const Store mode = mode_of(engine, p, all_units <= block_units);
  const int64_t c_bytes = mode == Store::narrow ? engine.element_bytes : engine.acc_bytes;
  const auto bytes = [&](int64_t units) { return units * engine.unit_bytes; };
  char* a_panels = static_cast<char*>(room(Room::a_panels, bytes(all_units * heights.padded)));
  char* b_panels = static_cast<char*>(room(Room::b_panels, bytes(panels * block_units * tiles.nr)));
  const bool packed = claim_panels(p, block_units);
  if (engine.enter != nullptr) engine.enter();
  for (int64_t u = 0; u < all_units; u += block_units) {
    const int64_t units = std::min(block_units, all_units - u),
                  panel_bytes = bytes(units * tiles.nr);
    const int64_t k = u * engine.k_unit, nk = std::min(p.depth - k, units * engine.k_unit);
    char* const a_block = a_panels + bytes(u * heights.padded);
    for (int64_t i = 0; i < heights.count && !packed; ++i) {
      const int64_t m = heights.begin(i);
      tiles.pack_a(a_block + bytes(m * units), p.a, p.block.m0 + m, heights.height(i),
                   heights.padded_height(i), k, nk);
    }
    pack_columns(engine, p, b_panels, panel_bytes, k, nk);
    Ahead ahead;
    if (tiles.fetch_units > 0) {
      ahead = next_of(engine, p, k, block_units * engine.k_unit);
      const int64_t fetches = panels * heights.count * ceil_div(units, tiles.fetch_units);
      ahead.burst = ceil_div(ahead.rows * ahead.lines, fetches);
    }
    for (int64_t n = 0; n < columns; n += tiles.nr) {
      for (int64_t i = 0; i < heights.count; ++i) {
        const int64_t m = heights.begin(i);
        tiles.multiply(units, a_block + bytes(m * units), b_panels + n / tiles.nr * panel_bytes,
                       static_cast<char*>(p.c) + (m * p.ldc + n) * c_bytes, p.ldc,
                       heights.height(i), std::min(tiles.nr, columns - n),
                       u > 0 ? Store::add : mode, ahead);
      }
    }
  }
  if (engine.leave != nullptr) engine.leave();
}

bool Workspace::narrows(const Engine& engine, int64_t depth, int64_t columns) {
  return engine.tiles.narrows && ceil_div(depth, engine.k_unit) <= units_at_once(engine, columns);
}

// A term's k from `k` on, `nk` of them, or as many units; it lies behind `before` units of those
// that are packed beside it.
struct Workspace::Piece {
  const Term* term;
  int64_t k, nk, units, before;
};

void Workspace::accumulate(const Engine& engine, const Block& block, const Term* terms,
                           int64_t count, void* c, int64_t ldc) {
  // Packed at a time: of few rows each many terms, of many rows one block of k, as ever.
  constexpr int64_t kUnits = 512, kPieces = 64;
  const int64_t block_units = units_at_once(engine, block.columns());
  packed_ = {};
  Piece pieces[kPieces];
  int64_t before = 0, waiting = 0;
  for (const Term* term = terms; term != terms + count; ++term) {
    const int64_t all_units = ceil_div(term->depth, engine.k_unit);
    for (int64_t u = 0; u < all_units; u += block_units) {
      const int64_t units = std::min(block_units, all_units - u), k = u * engine.k_unit;
      if (before + units > kUnits || waiting == kPieces) {
        accumulate_pieces(engine, block, pieces, waiting, c, ldc);
        before = waiting = 0;
      }
      const int64_t nk = std::min(term->depth - k, units * engine.k_unit);
      pieces[waiting++] = {.term = term, .k = k, .nk = nk, .units = units, .before = before};
      before += units;
    }
  }
  accumulate_pieces(engine, block, pieces, waiting, c, ldc);
}

void Workspace::accumulate_pieces(const Engine& engine, const Block& block, const Piece* pieces,
                                  int64_t count, void* c, int64_t ldc) {
  if (count == 0) return;
  const PackedTiles& tiles = engine.tiles;
  const int64_t columns = block.columns(), panels = ceil_div(columns, tiles.nr);
  const RowTiles heights(tiles, block.rows());
  const auto bytes = [&](int64_t units) { return units * engine.unit_bytes; };
  const int64_t all = pieces[count - 1].before + pieces[count - 1].units;
  char* a_panels = static_cast<char*>(room(Room::a_panels, bytes(all * heights.padded)));
  char* b_panels = static_cast<char*>(room(Room::b_panels, bytes(all * panels * tiles.nr)));
  for (int64_t p = 0; p < count; ++p) {
    const Piece& piece = pieces[p];
    const Product product{.a = piece.term->a,
                          .b = piece.term->b,
                          .block = block,
                          .depth = piece.term->depth,
                          .c = c,
                          .ldc = ldc};
    char* a_block = a_panels + bytes(piece.before * heights.padded);
    for (int64_t i = 0; i < heights.count; ++i) {
      const int64_t m = heights.begin(i);
      tiles.pack_a(a_block + bytes(m * piece.units), product.a, block.m0 + m, heights.height(i),
                   heights.padded_height(i), piece.k, piece.nk);
    }
    pack_columns(engine, product, b_panels + bytes(piece.before * panels * tiles.nr),
                 bytes(piece.units * tiles.nr), piece.k, piece.nk);
  }
  const auto tile_at = [&](int64_t i, int64_t n) {
    return static_cast<char*>(c) + (heights.begin(i) * ldc + n) * engine.acc_bytes;
  };
  // The next tile comes from memory while the terms of this one are summed.
  const auto fetch = [&](int64_t i, int64_t n) {
    if (n >= columns) return;
    for (int64_t r = 0; r < heights.height(i); ++r) {
      const char* row = tile_at(i, n) + r * ldc * engine.acc_bytes;
      for (int64_t b = 0; b < std::min(tiles.nr, columns - n) * engine.acc_bytes; b += 64)
        __builtin_prefetch(row + b, 1);
    }
  };
  if (engine.enter != nullptr) engine.enter();
  Ahead nothing;
  for (int64_t n = 0; n < columns; n += tiles.nr) {
    const int64_t cols = std::min(tiles.nr, columns - n);
    for (int64_t i = 0; i < heights.count; ++i) {
      const bool last = i + 1 == heights.count;
      fetch(last ? 0 : i + 1, last ? n + tiles.nr : n);
      for (int64_t p = 0; p < count; ++p) {
        const Piece& piece = pieces[p];
        const char* a = a_panels + bytes(piece.before * heights.padded);
        const char* b = b_panels + bytes(piece.before * panels * tiles.nr);
        tiles.multiply(piece.units, a + bytes(heights.begin(i) * piece.units),
                       b + bytes(n * piece.units), tile_at(i, n), ldc, heights.height(i), cols,
                       Store::add, nothing);
      }
    }
  }
  if (engine.leave != nullptr) engine.leave();
}

void Workspace::multiply(const Engine& engine, const Product& p) {
  const int64_t rows = p.block.rows(), columns = p.block.columns();
  if (p.depth == 0) {  // there is nothing to sum
    const int64_t bytes = p.mode == Store::narrow ? engine.element_bytes : engine.acc_bytes;
    for (int64_t r = 0; r < rows && p.mode != Store::add; ++r)
      std::memset(static_cast<char*>(p.c) + r * p.ldc * bytes, 0, columns * bytes);
    return;
  }
  const DirectRows& direct = engine.direct;
  if (rows <= engine.dots.most_rows && p.a.k_contiguous && p.b.k_contiguous) {
    multiply_dots(engine, p, 0, rows, 0, columns);
  } else if (rows >= engine.quads.least_rows && rows <= engine.quads.most_rows &&
             columns >= engine.quads.least_columns && p.b.k_contiguous && p.a.k_contiguous &&
             p.depth % engine.quads.k_divisor == 0 && p.b.ld % engine.k_unit == 0) {
    multiply_quads(engine, p);
  } else if (rows <= direct.passes * direct.rows_per_pass && columns >= direct.least_columns &&
             p.b.k_contiguous && p.depth % direct.k_divisor == 0 &&
             p.b.ld % direct.k_divisor == 0) {
    multiply_directly(engine, p);
  } else {
    multiply_packed(engine, p);
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
