// rms_norm: rows over their root mean square, alone or behind a sum, and its backward. See
// moekernels/ops/rms_norm.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct RmsNormArgs {
  const void* x;       // [R, H]
  const void* added;   // [R, H], or null: x is normalised as it is
  const void* weight;  // [H]
  void* sum;           // [R, H], x + added; null without `added`
  void* y;             // [R, H]
  void* rstd;          // [R] fp32 (fp64 for fp64)
  int64_t num_rows, hidden;
  double eps;
  DType dtype;
};

// The weight's gradient is a sum over rows: of pieces of so many, and then of those.
inline constexpr int64_t kRmsNormPiece = 64;

inline int64_t rms_norm_pieces(int64_t num_rows) {
  return (num_rows + kRmsNormPiece - 1) / kRmsNormPiece;
}

struct RmsNormBackwardArgs {
  const void* dy;      // [R, H]
  const void* dsum;    // [R, H], the gradient of what was normalised for itself, or null
  const void* x;       // [R, H], what was normalised
  const void* weight;  // [H]
  const void* rstd;    // [R]
  void* dx;            // [R, H]
  void* parts;         // [pieces, H] fp32 (fp64 for fp64)
  void* dweight;       // [H]
  int64_t num_rows, hidden;
  DType dtype;
};

namespace cuda {
void rms_norm(const RmsNormArgs& args, Stream stream);
void rms_norm_backward(const RmsNormBackwardArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(rms_norm, const RmsNormArgs& args, int64_t row_begin, int64_t row_end)
// dx and the parts of dweight, by pieces of rows.
MOEKERNELS_CPU_KERNEL(rms_norm_backward, const RmsNormBackwardArgs& args, int64_t piece_begin,
                      int64_t piece_end)
MOEKERNELS_CPU_KERNEL(rms_norm_dweight, const RmsNormBackwardArgs& args, int64_t column_begin,
                      int64_t column_end)
