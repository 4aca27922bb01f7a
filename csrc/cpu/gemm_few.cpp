// Products of few rows, with B read as it lies (gemm.h: RowDots, RowQuads, DirectRows).
#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "gemm_dot.h"
#include "gemm_pack.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

namespace {

// c [rows, columns] = or += ct [columns, width] transposed.
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

}  // namespace

void Workspace::multiply_dots(const Engine& engine, const Product& p, int64_t m, int64_t count,
                              int64_t j, int64_t columns) {
  const void* rows[kDotRows];
  const int64_t bytes = p.depth * engine.element_bytes;
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = stored_row(p.a, p.block.m0 + m + i, p.a.ld * engine.element_bytes);
    if (rows[i] == nullptr) rows[i] = std::memset(room(Room::zero_row, bytes), 0, bytes);
  }
  const char* b =
      static_cast<const char*>(p.b.data) + (p.block.n0 + j) * p.b.ld * engine.element_bytes;
  char* c = static_cast<char*>(p.c) + (m * p.ldc + j) * engine.acc_bytes;
  engine.dots.multiply(p.depth, rows, count, b, p.b.ld, columns, c, p.ldc, p.mode == Store::add);
}

void Workspace::multiply_quads(const Engine& engine, const Product& p) {
  const int64_t rows = p.block.rows(), columns = p.block.columns();
  const int64_t units = p.depth / engine.k_unit, n = ceil_div(rows, 4);
  void* panel = room(Room::a_panels, units * 4 * n * engine.unit_bytes);
  float* ct = static_cast<float*>(room(Room::transposed_c, columns * 4 * n * sizeof(float)));
  if (!claim_panels(p, -1)) engine.quads.pack(panel, p.a, p.block.m0, rows, units);
  const char* b = static_cast<const char*>(p.b.data) + p.block.n0 * p.b.ld * engine.element_bytes;
  engine.quads.multiply(units, b, p.b.ld / engine.k_unit, columns, panel, n, ct);
  transpose_block(ct, 4 * n, rows, columns, static_cast<float*>(p.c), p.ldc, p.mode == Store::add);
}

void Workspace::multiply_directly(const Engine& engine, const Product& p) {
  const DirectRows& direct = engine.direct;
  const int64_t all_rows = p.block.rows(), columns = p.block.columns();
  const int64_t granule = direct.granule, past = all_rows % granule;
  const int64_t units = p.depth / engine.k_unit;
  // Rows past a whole granule, where they are few: dot by dot, while B is in the second cache. In
  // less depth adding up their lanes would cost more than a granule's products.
  const bool dots = past <= direct.most_over && past < all_rows && units >= 4 * granule;
  const int64_t over = dots ? past : 0;
  const int64_t rows = all_rows - over, width = ceil_div(rows, granule) * granule;
  const int64_t passes = ceil_div(rows, direct.rows_per_pass);
  const auto pass_begin = [&](int64_t i) { return width / granule * i / passes * granule; };
  char* panels = static_cast<char*>(room(Room::a_panels, units * width * engine.unit_bytes));
  const bool packed = claim_panels(p, 0);
  // In several passes the second one finds B in the second cache. The registers hold 4, 5, 6 or 12
  // of its rows at a time: 120 are whole numbers of all, but for a few.
  constexpr int64_t kCache = 1 << 20, kRowsOfB = 120;
  const int64_t row_bytes = std::max(p.depth, int64_t{1}) * engine.element_bytes;
  const int64_t fitting = kCache / row_bytes / kRowsOfB * kRowsOfB;
  const int64_t columns_at_once = passes == 1 && over == 0 ? columns : std::max(kRowsOfB, fitting);
  float* ct = static_cast<float*>(room(Room::transposed_c, columns * width * sizeof(float)));
  if (engine.enter != nullptr) engine.enter();
  for (int64_t j = 0; j < columns; j += columns_at_once) {
    const int64_t count = std::min(columns_at_once, columns - j);
    for (int64_t i = 0; i < passes; ++i) {
      const int64_t m = pass_begin(i), m_width = pass_begin(i + 1) - m;
      const int64_t m_rows = std::min(m_width, rows - m);
      char* panel = panels + m * units * engine.unit_bytes;
      if (j == 0 && !packed) {
        engine.tiles.pack_b(panel, p.a, p.block.m0 + m, m_rows, m_width, 0, p.depth);
      }
      // A unit of B holds k_unit elements, so its leading dimension counts ld / k_unit of them.
      const char* b =
          static_cast<const char*>(p.b.data) + (p.block.n0 + j) * p.b.ld * engine.element_bytes;
      direct.multiply(units, b, p.b.ld / engine.k_unit, count, panel, m_width, ct);
      float* c = static_cast<float*>(p.c) + m * p.ldc + j;
      transpose_block(ct, m_width, m_rows, count, c, p.ldc, p.mode == Store::add);
    }
    if (over > 0) multiply_dots(engine, p, rows, over, j, count);
  }
  if (engine.leave != nullptr) engine.leave();
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
