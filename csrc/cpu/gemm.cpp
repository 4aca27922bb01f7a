// The engines for fp32, fp64 and what widens to fp32, and the blocked product over any engine.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "gemm_pack.h"
#include "gemm_tile.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

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
  if (engine.leave != nullptr) engine.leave();
  packed_ = wanted;
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
