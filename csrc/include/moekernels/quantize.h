// quantize: numbers as e4m3 with a scale for each block. See moekernels/ops/quantize.py for the
// meaning.
#pragma once

#include "moekernels/common.h"
#include "moekernels/float8.h"

namespace moekernels {

struct QuantizeArgs {
  DType dtype;      // f32, bf16 or f16
  const void* x;    // [matrices, rows, columns]
  uint8_t* values;  // the same, or [matrices, columns, rows]
  float* scales;    // a block each, as `values` lies: 128 columns of x's, and of its rows 1 or 128
  int64_t matrices, rows, columns;
  bool tiles;       // blocks of 128 rows, too
  bool transposed;  // with tiles

  // Work is shared by runs of rows that no block crosses.
  MOEKERNELS_BOTH int64_t run() const { return tiles ? kScaleBlock : 1; }
  MOEKERNELS_BOTH int64_t runs_of_matrix() const { return (rows + run() - 1) / run(); }
  MOEKERNELS_BOTH int64_t runs() const { return matrices * runs_of_matrix(); }
};

namespace cuda {
void quantize(const QuantizeArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(quantize, const QuantizeArgs& args, int64_t run_begin, int64_t run_end)
