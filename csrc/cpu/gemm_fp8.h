// Blocks of products of e4m3 operands, whose sums every machine adds alike: 32 products exactly and
// rounded to fp32, four of those sums in fp32, and each 128 of k, times both scales, to C by a
// fused multiply and add. 32 products of 8 bits each are exact in fp64, in any order.
#pragma once

#include <algorithm>
#include <cmath>

#include "moekernels/float8.h"
#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {  // one copy a file

// Rows along k, and the scales of their blocks of 128; so many rows share a scale.
struct ScaledOperand {
  const uint8_t* data;  // [outer, depth]
  const float* scales;  // [outer / rows_of_scale, scale_blocks(depth)]
  int64_t rows_of_scale;
};

inline const double* e4m3_values() {
  struct Table {
    double of[256];
    Table() {
      for (int code = 0; code < 256; ++code) {
        const int exponent = (code >> 3) & 15, mantissa = code & 7;
        double x =
            exponent == 0 ? mantissa * 0x1p-9 : (8 + mantissa) * std::ldexp(1.0, exponent - 10);
        if ((code & 127) == 127) x = std::nan("");
        of[code] = code & 128 ? -x : x;
      }
    }
  };
  static const Table table;
  return table.of;
}

class ScaledBlocks {
 public:
  static constexpr int64_t kLanesOf = kLanes<double>, kVectors = 4, kRows = 4;
  static constexpr int64_t kColumns = kVectors * kLanesOf;  // of a panel
  static constexpr int64_t kMostRows = 384;

  // c [rows, columns] fp32 = rows [m0, m0 + rows) of a times rows [n0, n0 + columns) of b.
  void multiply(const ScaledOperand& a, const ScaledOperand& b, int64_t depth, int64_t m0,
                int64_t rows, int64_t n0, int64_t columns, float* c, int64_t ldc) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(c + r * ldc, columns, 0.0f);
    const int64_t blocks = scale_blocks(depth);
    for (int64_t m = 0; m < rows; m += kMostRows) {
      const int64_t some = std::min(rows - m, kMostRows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * kScaleBlock, count = std::min(depth - k, kScaleBlock);
        for (int64_t r = 0; r < some; ++r) {
          const int64_t row = m0 + m + r;
          unpack(a.data + row * depth + k, count, a_[r]);
          a_scale_[r] = a.scales[row / a.rows_of_scale * blocks + block];
        }
        for (int64_t r = some; r % kRows != 0; ++r) unpack(nullptr, 0, a_[r]);
        for (int64_t n = 0; n < columns; n += kColumns) {
          const int64_t width = std::min(columns - n, kColumns);
          pack_columns(b, depth, n0 + n, width, block, k, count);
          for (int64_t r = 0; r < some; r += kRows) {
            panel(r, std::min(some - r, kRows), width, c + (m + r) * ldc + n, ldc);
          }
        }
      }
    }
  }

 private:
  static void unpack(const uint8_t* from, int64_t count, double* to) {
    const double* table = e4m3_values();
    for (int64_t k = 0; k < count; ++k) to[k] = table[from[k]];
    for (int64_t k = count; k < kScaleBlock; ++k) to[k] = 0;
  }

  void pack_columns(const ScaledOperand& b, int64_t depth, int64_t column, int64_t width,
                    int64_t block, int64_t k0, int64_t count) {
    const double* table = e4m3_values();
    for (int64_t j = 0; j < kColumns; ++j) {
      const int64_t row = column + j;
      const uint8_t* from = b.data + row * depth + k0;
      const int64_t used = j < width ? count : 0;
      for (int64_t k = 0; k < used; ++k) b_[k][j] = table[from[k]];
      for (int64_t k = used; k < kScaleBlock; ++k) b_[k][j] = 0;
      b_scale_[j] = used > 0 ? b.scales[row / b.rows_of_scale * scale_blocks(depth) + block] : 0.0f;
    }
  }

  void panel(int64_t first, int64_t rows, int64_t width, float* c, int64_t ldc) {
    float sums[kRows][kColumns] = {};
    for (int64_t k = 0; k < kScaleBlock; k += kProductStep) {
      Vec<double> exact[kRows][kVectors] = {};
      for (int64_t i = k; i < k + kProductStep; ++i) {
        Vec<double> b[kVectors];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) b[v] = load(b_[i] + v * kLanesOf);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          const Vec<double> a = splat(a_[first + r][i]);
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) exact[r][v] += a * b[v];
        }
      }
      for (int64_t r = 0; r < kRows; ++r) {
        double step[kColumns];
        for (int64_t v = 0; v < kVectors; ++v) store(step + v * kLanesOf, exact[r][v]);
        for (int64_t j = 0; j < kColumns; ++j) sums[r][j] += static_cast<float>(step[j]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < width; ++j) {
        const float scale = a_scale_[first + r] * b_scale_[j];
        c[r * ldc + j] = std::fma(scale, sums[r][j], c[r * ldc + j]);
      }
    }
  }

  alignas(64) double a_[kMostRows][kScaleBlock];
  float a_scale_[kMostRows];
  alignas(64) double b_[kScaleBlock][kColumns];
  float b_scale_[kColumns];
};

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
