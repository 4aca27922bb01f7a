// The matrix product that grouped_gemm and experts share: C [m, n] = A [m, k] B [k, n], packed
// panels, register tiles. Every sum over k runs in one fixed order whatever the tiling, so results
// do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moekernels/common.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// One side of a product, seen as [outer, k]: A's rows or B's columns against the summed index.
struct Operand {
  const void* data;
  int64_t ld;         // elements from one stored row to the next
  bool k_contiguous;  // element (i, k) is data[row(i) * ld + k], otherwise data[row(k) * ld + i]
  // With a token list, stored row j is a row of zeros where token_of[j] lies outside [0, tokens),
  // else row token_of[j] (gather) or row j itself.
  const int32_t* token_of = nullptr;
  int64_t tokens = 0;
  bool gather = false;
};

// What becomes of a tile: written, added to what is there, written past the caches (aligned, not
// read again soon), or that rounded to B's dtype, which c and ldc then are of (Workspace::narrows).
enum class Store { set, add, stream, narrow };

// Memory that will be packed next, brought into the second cache in small bursts while tiles are
// computed: otherwise the cores would wait for memory while they pack, and memory for the cores
// while they multiply.
struct Ahead {
  const char* at = nullptr;  // the row whose lines are next
  int64_t ld = 0;            // bytes from row to row
  int64_t lines = 0;         // of a row
  int64_t rows = 0;          // still to come
  int64_t burst = 0;         // lines at a time
  int64_t line = 0;

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < burst && rows > 0; ++i) {
      __builtin_prefetch(at + 64 * line, 0, 2);
      if (++line == lines) line = 0, at += ld, --rows;
    }
  }
};

// The usual way: A and B are packed into panels, and multiplied in register tiles.
struct PackedTiles {
  int64_t mr, nr;       // the largest tile
  int64_t row_granule;  // panels of A are padded to this many rows
  int64_t k_block;      // how many k are summed before a tile goes back to memory
  int64_t fetch_units;  // a fetch of memory ahead every so many units; 0: none
  bool narrows;         // knows Store::narrow
  void (*pack_a)(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
                 int64_t nk);
  void (*pack_b)(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
                 int64_t nk);
  // All panels of B, where it runs along n.
  void (*pack_rows)(void* to, int64_t panel_bytes, const Operand& from, int64_t i, int64_t ni,
                    int64_t k, int64_t nk);
  // c [rows, cols] = or += a b over the units.
  void (*multiply)(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t rows,
                   int64_t cols, Store mode, Ahead& ahead);
};

// For few rows of A against a B that runs along k: packing B would cost as much as its products. So
// A is packed as columns and B is read as it lies, each element once: ct [cols, width] = B rows
// [cols] times panels of A [units][width].
struct DirectRows {
  int64_t passes = 1, rows_per_pass = 0;  // at most so many rows
  int64_t granule = 1;                    // to whose multiple they are padded
  int64_t most_over = 0;  // so many rows past a multiple are left to RowDots rather than padded
  int64_t k_divisor = 1;  // what the depth must be a multiple of
  int64_t least_columns = 1;
  void (*multiply)(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a,
                   int64_t width, float* ct) = nullptr;
};

// For very few rows of A against such a B: neither is packed, c [rows, cols] = or += a b, `a`
// pointing at A's rows.
struct RowDots {
  int64_t most_rows = 0;
  void (*multiply)(int64_t depth, const void* const* a, int64_t rows, const void* b, int64_t ldb,
                   int64_t cols, void* c, int64_t ldc, bool add) = nullptr;
};

// For more rows of A than RowDots takes and fewer than fill DirectRows' vectors, against such a B:
// ct [cols, 4 n] = B rows [cols] times A packed in quads (gemm_quads.h), four times n rows of it.
struct RowQuads {
  int64_t least_rows = 1, most_rows = 0;
  int64_t least_columns = 1;
  int64_t k_divisor = 1;  // what the depth must be a multiple of
  void (*pack)(void* to, const Operand& from, int64_t i, int64_t ni, int64_t units) = nullptr;
  void (*multiply)(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a,
                   int64_t n, float* ct) = nullptr;
};

// How products of one dtype are computed on this machine.
struct Engine {
  int64_t k_unit;         // how many k a packed unit holds
  int64_t unit_bytes;     // of a packed unit
  int64_t acc_bytes;      // of an element of C: float, double for f64
  int64_t element_bytes;  // of A and B as they are stored
  PackedTiles tiles;
  DirectRows direct{};
  RowDots dots{};
  RowQuads quads{};
  // Around a run of tiles, where the unit has a state to set up.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

const Engine& engine_for(DType dtype);
#if defined(MOEKERNELS_ISA_avx512)
const Engine& bf16_engine(Bf16Unit unit);
#endif

// A block of C: rows [m0, m1), columns [n0, n1) of A B.
struct Block {
  int64_t m0, m1, n0, n1;

  int64_t rows() const { return m1 - m0; }
  int64_t columns() const { return n1 - n0; }
};

// One block of a product: c, where (m0, n0) goes, [rows, columns] = or += A B over `depth` of k.
struct Product {
  Operand a, b;
  Block block;
  int64_t depth;
  void* c;
  int64_t ldc;
  Store mode = Store::set;
};

// One of several products that are added to one block.
struct Term {
  Operand a, b;
  int64_t depth;
};

// One thread's memory: packed panels and a block of C, kept from call to call.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace();
  static Workspace& mine();
  // Forget which rows are packed: their contents may have changed since.
  void reset() { packed_ = {}; }
  // Room for `count` accumulators of C.
  void* block(const Engine& engine, int64_t count) {
    return room(Room::c, count * engine.acc_bytes);
  }
  void multiply(const Engine& engine, const Product& product);
  // Whether a product of this depth, neither side running along k, may be stored rounded: its tiles
  // hold whole sums.
  static bool narrows(const Engine& engine, int64_t depth, int64_t columns);
  // c += the terms' products, one after the other, none of which has both sides run along k. The
  // bits of as many calls of `multiply`, but c goes by once: each tile of it takes all terms while
  // it is near.
  void accumulate(const Engine& engine, const Block& block, const Term* terms, int64_t count,
                  void* c, int64_t ldc);

 private:
  enum class Room : int { a_panels, b_panels, c, transposed_c, zero_row, count };
  static constexpr int kRooms = static_cast<int>(Room::count);

  struct Packed {
    const void* data = nullptr;
    int64_t m0 = 0, m1 = 0;
    const int32_t* token_of = nullptr;
    int64_t units = 0;  // of a block along k; 0: for DirectRows, -1: for RowQuads
    bool operator==(const Packed&) const = default;
  };
  void* room(Room which, int64_t bytes);
  // Whether the panels hold these rows of A already; from now on they are to.
  bool claim_panels(const Product& product, int64_t units);
  // Rows [m, m + count) of the block's, times columns [j, j + columns) of its.
  void multiply_dots(const Engine& engine, const Product& product, int64_t m, int64_t count,
                     int64_t j, int64_t columns);
  void multiply_quads(const Engine& engine, const Product& product);
  void multiply_directly(const Engine& engine, const Product& product);
  void multiply_packed(const Engine& engine, const Product& product);
  struct Piece;
  void accumulate_pieces(const Engine& engine, const Block& block, const Piece* pieces,
                         int64_t count, void* c, int64_t ldc);
  void* memory_[kRooms] = {};
  int64_t bytes_[kRooms] = {};
  Packed packed_;
};

struct Extent {
  int64_t m, n, k;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a product costs, in units of which only the ratios matter: they divide the work, and no bit
// of a result depends on them. Reading a weight and packing it costs about as much as 16 rows of
// products, writing an element of C as much as 8 of k. Nothing that has rows is free.
inline int64_t cost_of(const Extent& x) {
  constexpr int64_t kReading = 16, kWriting = 8, kUnit = 64;
  return x.m == 0 ? 0 : (x.m + kReading) * x.n * (x.k + kWriting) / kUnit + 1;
}

// How one expert's product is cut into blocks, for any number of workers alike.
struct Cut {
  Extent extent;
  int64_t row_blocks, columns_per_block, column_blocks;

  // Where B runs along n, few rows get blocks of four times the columns, so that its rows are read
  // by the page rather than a quarter of one.
  Cut(const Engine& engine, const Extent& x, int64_t columns, bool b_along_n) : extent(x) {
    constexpr int64_t kElementsOfA = 1 << 19, kMostRows = 384;  // 2 MiB packed as fp32
    const int64_t rows = std::clamp<int64_t>(kElementsOfA / std::max<int64_t>(x.k, 1),
                                             8 * engine.tiles.mr, kMostRows);
    row_blocks = ceil_div(x.m, rows);
    const int64_t pages = !b_along_n ? 1 : x.m <= 128 ? 4 : x.m <= 256 ? 2 : 1;
    columns_per_block = columns * pages;
    column_blocks = ceil_div(x.n, columns_per_block);
  }
  int64_t blocks() const { return row_blocks * column_blocks; }
  Block operator[](int64_t i) const {
    const int64_t rb = i / column_blocks, cb = i % column_blocks;
    return {.m0 = extent.m * rb / row_blocks,
            .m1 = extent.m * (rb + 1) / row_blocks,
            .n0 = cb * columns_per_block,
            .n1 = std::min(extent.n, (cb + 1) * columns_per_block)};
  }
};

// Walks the blocks of one worker: `extent(e)` is expert e's product, body(e, block) computes a
// block of it. Workers take contiguous shares of about equal cost.
template <class ExtentOf, class Body>
void for_blocks(const Engine& engine, int64_t experts, int64_t columns, bool b_along_n,
                int64_t worker, int64_t workers, const ExtentOf& extent, const Body& body) {
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) total += cost_of(extent(e));
  const int64_t begin = total / workers * worker;
  const int64_t end = worker + 1 == workers ? total + experts : total / workers * (worker + 1);
  int64_t done = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const Extent x = extent(e);
    const int64_t cost = cost_of(x);
    if (cost > 0 && x.n > 0 && done + cost > begin && done < end) {
      const Cut cut(engine, x, columns, b_along_n);
      const int64_t blocks = cut.blocks();
      for (int64_t i = 0; i < blocks; ++i) {
        // A block belongs to the worker in whose share its middle lies.
        const int64_t middle = done + cost * (2 * i + 1) / (2 * blocks);
        if (middle >= begin && middle < end) body(e, cut[i]);
      }
    }
    done += cost;
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
