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

// What becomes of a tile: written, added to what is there, or written past the caches (aligned, not
// read again soon).
enum class Store { set, add, stream };

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

// A register tile and its panels, for one dtype on this machine.
struct Engine {
  int64_t mr, nr;         // the largest tile
  int64_t row_granule;    // panels of A are padded to this many rows
  int64_t k_unit;         // how many k a packed unit holds
  int64_t k_block;        // how many k are summed before a tile goes back to memory
  int64_t unit_bytes;     // of a packed unit
  int64_t acc_bytes;      // of an element of C: float, double for f64
  int64_t element_bytes;  // of A and B as they are stored
  void (*pack_a)(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
                 int64_t nk);
  void (*pack_b)(void* to, const Operand& from, int64_t i, int64_t ni, int64_t width, int64_t k,
                 int64_t nk);
  // All panels of B, where it runs along n.
  void (*pack_rows)(void* to, int64_t panel_bytes, const Operand& from, int64_t i, int64_t ni,
                    int64_t k, int64_t nk);
  // c [rows, cols] = or += a b over the units, with a fetch every `fetch_units` (0: none).
  void (*tile)(int64_t units, const void* a, const void* b, void* c, int64_t ldc, int64_t rows,
               int64_t cols, Store mode, Ahead& ahead);
  int64_t fetch_units;
  // For few rows of A against a B that runs along k: packing B would cost as much as its products.
  // So A is packed as columns and B is read as it lies, each element once: ct [cols, width] = B
  // rows [cols] times panels of A [units][width]. For at most `direct_rows` rows in a pass, at
  // least `direct_cols` columns, a depth that direct_k divides.
  int64_t direct_passes = 1, direct_rows = 0, direct_granule = 1, direct_k = 1, direct_cols = 1;
  void (*direct)(int64_t units, const void* b, int64_t ldb, int64_t cols, const void* a,
                 int64_t width, float* ct) = nullptr;
  // For very few rows of A against such a B: neither is packed, c [rows, cols] = or += a b, `a`
  // pointing at A's rows.
  int64_t dot_rows = 0;
  void (*dot)(int64_t depth, const void* const* a, int64_t rows, const void* b, int64_t ldb,
              int64_t cols, void* c, int64_t ldc, bool add) = nullptr;
  // Around a run of tiles, where the unit has a state to set up.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

const Engine& engine_for(DType dtype);
#if defined(MOEKERNELS_ISA_avx512)
const Engine& bf16_engine(Bf16Unit unit);
#endif

// A block of C: rows [m0, m1), columns [n0, n1) of A B. `c` is where (m0, n0) goes.
struct Block {
  int64_t m0, m1, n0, n1;
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
  void* block(const Engine& engine, int64_t count) { return room(2, count * engine.acc_bytes); }
  void multiply(const Engine& engine, const Operand& a, const Operand& b, const Block& block,
                int64_t depth, void* c, int64_t ldc, Store mode);

 private:
  struct Packed {
    const void* data = nullptr;
    int64_t m0 = 0, m1 = 0;
    const int32_t* token_of = nullptr;
    int64_t units = 0;  // of a block along k; 0: read directly
    bool operator==(const Packed&) const = default;
  };
  void* room(int slot, int64_t bytes);
  static Ahead next_of(const Engine& engine, const Operand& b, const Block& block, int64_t depth,
                       int64_t k, int64_t k_block);
  void multiply_dots(const Engine& engine, const Operand& a, const Operand& b, const Block& block,
                     int64_t depth, void* c, int64_t ldc, bool add);
  void multiply_directly(const Engine& engine, const Operand& a, const Operand& b,
                         const Block& block, int64_t depth, float* c, int64_t ldc, Store mode);
  void* memory_[5] = {};
  int64_t bytes_[5] = {};
  Packed packed_;
};

struct Extent {
  int64_t m, n, k;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Walks the blocks of one worker: `extent(e)` is expert e's product, body(e, block) computes a
// block of it. Where B runs along n, few rows get blocks of four times the columns, so that its
// rows are read by the page rather than a quarter of one. The cut into blocks is the same for any
// number of workers, who take contiguous shares of about equal cost.
template <class ExtentOf, class Body>
void for_blocks(const Engine& engine, int64_t experts, int64_t few_columns, bool b_along_n,
                int64_t worker, int64_t workers, const ExtentOf& extent, const Body& body) {
  // Reading a weight and packing it costs about as much as this many rows of products.
  constexpr int64_t kReading = 16;
  const auto cost = [&](int64_t m, int64_t n, int64_t k) {
    return m == 0 ? 0 : (m + kReading) * n * (k + 8) / 64 + 1;
  };
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const Extent x = extent(e);
    total += cost(x.m, x.n, x.k);
  }
  const int64_t begin = total / workers * worker;
  const int64_t end = worker + 1 == workers ? total + experts : total / workers * (worker + 1);
  int64_t done = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const Extent x = extent(e);
    const int64_t whole = cost(x.m, x.n, x.k);
    if (whole == 0 || x.n == 0 || done + whole <= begin || done >= end) {
      done += whole;
      continue;
    }
    const int64_t rows_wanted =
        std::clamp<int64_t>((1 << 19) / std::max<int64_t>(x.k, 1), 8 * engine.mr, 384);
    const int64_t row_blocks = ceil_div(x.m, rows_wanted);
    const int64_t columns_a_block = few_columns * (!b_along_n   ? 1
                                                   : x.m <= 128 ? 4
                                                   : x.m <= 256 ? 2
                                                                : 1);
    const int64_t column_blocks = ceil_div(x.n, columns_a_block);
    const int64_t blocks = row_blocks * column_blocks;
    for (int64_t i = 0; i < blocks; ++i) {
      // A block belongs to the worker in whose share its middle lies.
      const int64_t middle = done + whole * (2 * i + 1) / (2 * blocks);
      if (middle < begin || middle >= end) continue;
      const int64_t rb = i / column_blocks, cb = i % column_blocks;
      body(e, Block{.m0 = x.m * rb / row_blocks,
                    .m1 = x.m * (rb + 1) / row_blocks,
                    .n0 = cb * columns_a_block,
                    .n1 = std::min(x.n, (cb + 1) * columns_a_block)});
    }
    done += whole;
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
