// The engines of bf16's own instructions: dot products of pairs (avx512_bf16) and tiles (AMX). Only
// the avx512 level has them; the instructions are written out, so that the file needs no more than
// that level's flags.
#include "gemm.h"

#if defined(MOEKERNELS_ISA_avx512)

#include "amx.h"
#include "gemm_dot.h"
#include "gemm_pack.h"
#include "gemm_quads.h"
#include "gemm_tile.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// The first `count` of 32 sums as bf16, past the caches where they are a line of memory. Sums too
// small for a normal number become zero, as the products' own.
inline void store_line(bf16* to, Vec<float> low, Vec<float> high, int64_t count) {
  __m512i line;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(line) : "v"(high), "v"(low));
  if (count == 2 * kLanes<float> && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  } else {
    std::memcpy(to, &line, count * sizeof(bf16));
  }
}

struct PairDot {
  using Unit = Pair;
  using Acc = float;
  using Narrow = bf16;
  static void narrow(bf16* to, const Vec<float> (&sum)[kVectors], int64_t count) {
    store_line(to, sum[0], sum[1], count);
  }
  static Vec<float> multiply_add(Vec<float> sum, Vec<Pair> a, Vec<Pair> b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

// ---- AMX (amx.h): tiles 0-3 hold C, 4-5 A, 6-7 B. A block is 2 x 2 tiles of C.

// C [16 * row_tiles, 16 * column_tiles] to `to`.
template <int row_tiles, int column_tiles>
inline void store_tiles(float* to, int64_t ld) {
  const int64_t stride = ld * sizeof(float);
  tile_store<0>(to, stride);
  if constexpr (column_tiles == 2) tile_store<1>(to + 16, stride);
  if constexpr (row_tiles == 2) tile_store<2>(to + 16 * ld, stride);
  if constexpr (row_tiles == 2 && column_tiles == 2) tile_store<3>(to + 16 * ld + 16, stride);
}

template <int row_tiles, int column_tiles>
void amx_block(int64_t units, const char* a, const char* b, void* c_at, int64_t ldc, int64_t rows,
               int64_t cols, Store mode) {
  auto* c = static_cast<float*>(c_at);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t u = 0; u < units; ++u) {
    tile_load<6>(b, kColumns * sizeof(Pair));
    tile_load<4>(a, kTileBytes);
    tile_dot<0, 4, 6>();
    if constexpr (column_tiles == 2) {
      tile_load<7>(b + kTileBytes, kColumns * sizeof(Pair));
      tile_dot<1, 4, 7>();
    }
    if constexpr (row_tiles == 2) {
      tile_load<5>(a + kTileRows * kTileBytes, kTileBytes);
      tile_dot<2, 5, 6>();
      if constexpr (column_tiles == 2) tile_dot<3, 5, 7>();
    }
    a += row_tiles * kTileRows * kTileBytes;
    b += kTileRows * kColumns * sizeof(Pair);
  }
  if ((mode == Store::set || mode == Store::stream) && rows == row_tiles * kTileRows &&
      cols == column_tiles * kTileRows) {
    store_tiles<row_tiles, column_tiles>(c, ldc);
    return;
  }
  alignas(64) float whole[2 * kTileRows][kColumns];
  store_tiles<row_tiles, column_tiles>(&whole[0][0], kColumns);
  if (mode == Store::narrow) {
    bf16* to = static_cast<bf16*>(c_at);
    for (int64_t r = 0; r < rows; ++r)
      store_line(to + r * ldc, load(whole[r]), load(whole[r] + kTileRows), cols);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for_vectors<float>(cols, [&](int64_t j, auto n) {
      const Vec<float> sum = load(&whole[r][j]);
      store(c + r * ldc + j, mode == Store::add ? load(c + r * ldc + j, n) + sum : sum, n);
    });
  }
}

void amx_tile(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t rows,
              int64_t cols, Store mode, Ahead&) {
  using Block = void(int64_t, const char*, const char*, void*, int64_t, int64_t, int64_t, Store);
  static constexpr Block* blocks[2][2] = {{amx_block<1, 1>, amx_block<1, 2>},
                                          {amx_block<2, 1>, amx_block<2, 2>}};
  blocks[rows > kTileRows][cols > kTileRows](units, static_cast<const char*>(a),
                                             static_cast<const char*>(b), c, ldc, rows, cols, mode);
}

// to [units][width rows][32 k].
void pack_amx_a(void* to, const Operand& from, int64_t i0, int64_t ni, int64_t width, int64_t k0,
                int64_t nk) {
  char* out = static_cast<char*>(to);
  if (from.k_contiguous) {
    for (int64_t i = 0; i < width; ++i) {
      const char* row = i < ni ? stored_row(from, i0 + i, from.ld * sizeof(bf16)) : nullptr;
      for (int64_t k = 0; k < nk; k += kTileK) {
        char* at = out + (k / kTileK * width + i) * kTileBytes;
        Vec<Pair> x{};
        if (row) x = units_along_k<Pair>(reinterpret_cast<const bf16*>(row) + k0 + k, nk - k);
        store_unaligned(at, x);
      }
    }
    return;
  }
  // Rows run along i: zip pairs of them, then turn squares of pairs.
  for (int64_t k = 0; k < nk; k += kTileK) {
    for (int64_t i = 0; i < width; i += kTileRows, out += kTileRows * kTileBytes) {
      Vec<Pair> x[kTileRows];
      Pair zipped[kTileRows * kTileRows] = {};
      pack_copied<Pair, bf16>(zipped, from, i0 + i, std::max<int64_t>(ni - i, 0), kTileRows, k0 + k,
                              std::min(kTileK, nk - k));
      for (int64_t p = 0; p < kTileRows; ++p)
        x[p] = load_unaligned<Vec<Pair>>(zipped + p * kTileRows);
      transpose<Pair>(x);
      for (int64_t r = 0; r < kTileRows; ++r) store_unaligned(out + r * kTileBytes, x[r]);
    }
  }
}

// to [units][16 pairs][width columns].
void pack_amx_b(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
                int64_t nk) {
  Pair* out = static_cast<Pair*>(to);
  pack<Pair, bf16>(out, from, i, ni, width, k, nk);
  const int64_t pairs = ceil_div(nk, 2), padded = ceil_div(nk, kTileK) * kTileRows;
  std::memset(out + pairs * width, 0, (padded - pairs) * width * sizeof(Pair));
}

void pack_amx_rows(void* to, int64_t panel_bytes, const Operand& from, int64_t i, int64_t ni,
                   int64_t k, int64_t nk) {
  pack_rows<Pair, bf16>(to, panel_bytes, from, i, ni, k, nk);
  const int64_t pairs = ceil_div(nk, 2), padded = ceil_div(nk, kTileK) * kTileRows;
  constexpr int64_t pair_row = kColumns * sizeof(Pair);
  for (int64_t p = 0; p < ceil_div(ni, kColumns) && pairs < padded; ++p) {
    std::memset(static_cast<char*>(to) + p * panel_bytes + pairs * pair_row, 0,
                (padded - pairs) * pair_row);
  }
}

// Tiles 0 to `tiles` - 1, side by side, from or to 16 rows of ct.
template <int tiles>
inline void load_row_of_tiles(const float* ct, int64_t stride) {
  tile_load<0>(ct, stride);
  if constexpr (tiles > 1) tile_load<1>(ct + 16, stride);
  if constexpr (tiles > 2) tile_load<2>(ct + 32, stride);
  if constexpr (tiles > 3) tile_load<3>(ct + 48, stride);
}
template <int tiles>
inline void store_row_of_tiles(float* ct, int64_t stride) {
  tile_store<0>(ct, stride);
  if constexpr (tiles > 1) tile_store<1>(ct + 16, stride);
  if constexpr (tiles > 2) tile_store<2>(ct + 32, stride);
  if constexpr (tiles > 3) tile_store<3>(ct + 48, stride);
}

// ct [16, 16 tiles] = or += 16 rows of B, `apart` units from each other and read as they lie, times
// `tiles` column tiles of packed A; rows of ct lie ct_apart apart.
template <int tiles>
void amx_direct_rows(int64_t units, const char* b, int64_t ldb, int64_t apart, const char* a,
                     int64_t width, float* ct, int64_t ct_apart, bool add) {
  const int64_t pair_row = width * sizeof(Pair), row_bytes = apart * kTileBytes;
  const int64_t stride = ct_apart * sizeof(float);
  if (add) {
    load_row_of_tiles<tiles>(ct, stride);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t u = 0; u < units; ++u) {
    tile_load<4>(b + u * kTileBytes, row_bytes);
    const char* panel = a + u * kTileRows * pair_row;
    tile_load<6>(panel, pair_row);
    tile_dot<0, 4, 6>();
    if constexpr (tiles > 1) {
      tile_load<7>(panel + kTileBytes, pair_row);
      tile_dot<1, 4, 7>();
    }
    if constexpr (tiles > 2) {
      tile_load<5>(panel + 2 * kTileBytes, pair_row);
      tile_dot<2, 4, 5>();
    }
    if constexpr (tiles > 3) {
      tile_load<6>(panel + 3 * kTileBytes, pair_row);
      tile_dot<3, 4, 6>();
    }
    // The next rows, also past the last one: another block begins there.
    const char* ahead = b + (ldb + u) * kTileBytes;
    for (int64_t r = 0; r < kTileRows; ++r) __builtin_prefetch(ahead + r * row_bytes, 0, 2);
  }
  store_row_of_tiles<tiles>(ct, stride);
}

void amx_direct(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a,
                int64_t width, float* ct) {
  using Rows =
      void(int64_t, const char*, int64_t, int64_t, const char*, int64_t, float*, int64_t, bool);
  static constexpr Rows* of[] = {amx_direct_rows<1>, amx_direct_rows<2>, amx_direct_rows<3>,
                                 amx_direct_rows<4>};
  const int64_t all = width / kTileRows, groups = ceil_div(all, 4);
  // Units [u, u + count) of 16 rows of B.
  const auto tile_of_rows = [&](int64_t j, int64_t apart, int64_t u, int64_t count) {
    const char* rows = static_cast<const char*>(b) + (j * ldb + u) * kTileBytes;
    const char* panel = static_cast<const char*>(a) + u * width * kTileBytes;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t t0 = all * g / groups, t1 = all * (g + 1) / groups;
      of[t1 - t0 - 1](count, rows, ldb, apart * ldb, panel + t0 * kTileBytes, width,
                      ct + j * width + t0 * kTileRows, apart * width, u > 0);
    }
  };
  // Each row of a tile runs through its own sixteenth of B: the hardware's prefetcher follows one
  // stream a page. So much of packed A is multiplied by all of them before what follows: it stays
  // in the first cache. Tiles of C are taken up again as they were left, no bit depends on it.
  constexpr int64_t kFirstCache = 32 << 10;
  const int64_t each = cols / kTileRows, block = kFirstCache / (width * kTileBytes);
  for (int64_t u = 0; u < units; u += block) {
    const int64_t count = std::min(block, units - u);
    for (int64_t j = 0; j < each; ++j) tile_of_rows(j, each, u, count);
  }
  // The last tile reaches back over rows already done.
  if (each * kTileRows < cols) tile_of_rows(cols - kTileRows, 1, 0, units);
}

}  // namespace

const Engine& bf16_engine(Bf16Unit unit) {
  static constexpr Engine pairs{
      .k_unit = 2,
      .unit_bytes = sizeof(Pair),
      .acc_bytes = sizeof(float),
      .element_bytes = sizeof(bf16),
      .tiles = {.mr = kRows,
                .nr = kVectors * kLanes<float>,
                .row_granule = 1,
                .k_block = 512,
                .fetch_units = kFetchUnits,
                .narrows = true,
                .pack_a = &pack<Pair, bf16>,
                .pack_b = &pack<Pair, bf16>,
                .pack_rows = &pack_rows<Pair, bf16>,
                .multiply = &tile<PairDot>},
      .direct = {.rows_per_pass = kDirectVectors * kLanes<float>,
                 .granule = kLanes<float>,
                 .most_over = kDotTail,
                 .k_divisor = 2,
                 .multiply = &direct<PairDot, 256>},
      .dots = {.most_rows = kDotRows, .multiply = &dot<PairDot, bf16>},
      .quads = row_quads<PairDot, bf16>(),
  };
  static constexpr Engine tiles{
      .k_unit = kTileK,
      .unit_bytes = kTileBytes,
      .acc_bytes = sizeof(float),
      .element_bytes = sizeof(bf16),
      .tiles = {.mr = 2 * kTileRows,
                .nr = kColumns,
                .row_granule = kTileRows,
                .k_block = 512,
                .fetch_units = 0,  // done before memory is: a fetch would only hold them up
                .narrows = true,
                .pack_a = &pack_amx_a,
                .pack_b = &pack_amx_b,
                .pack_rows = &pack_amx_rows,
                .multiply = &amx_tile},
      .direct = {.rows_per_pass = 8 * kTileRows,
                 .granule = kTileRows,
                 .k_divisor = kTileK,
                 .least_columns = kTileRows,
                 .multiply = &amx_direct},
      .dots = {.most_rows = kDotRows, .multiply = &dot<PairDot, bf16>},
      .enter = &enter_tiles,
      .leave = &leave_tiles,
  };
  return unit == Bf16Unit::tiles ? tiles : pairs;
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA

#endif
