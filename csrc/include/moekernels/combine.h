// combine: the sum of each token's rows, and its backward with weights. See
// moekernels/ops/combine.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct CombineArgs {
  const void* rows;       // [R, H]
  const int32_t* row_of;  // [T, K], outside [0, R): dropped
  const void* weights;    // [T, K] fp32 (fp64 for fp64), or null
  void* out;              // [T, H]
  int64_t num_rows, tokens, top_k, hidden;
  DType dtype;  // of rows and out
};

struct CombineBackwardArgs {
  const void* dout;         // [T, H]
  const void* rows;         // [R, H]
  const int32_t* row_of;    // [T, K]
  const int32_t* token_of;  // [R]
  const void* weights;      // [T, K]
  void* drows;              // [R, H], zero where no token claims the row
  void* dweights;           // [T, K], zero where dropped
  int64_t num_rows, tokens, top_k, hidden;
  DType dtype;
};

namespace cuda {
void combine(const CombineArgs& args, Stream stream);
void combine_backward(const CombineBackwardArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(combine, const CombineArgs& args, int64_t token_begin, int64_t token_end)
MOEKERNELS_CPU_KERNEL(combine_backward, const CombineBackwardArgs& args, int64_t token_begin,
                      int64_t token_end)
// Zeroes the rows of drows that combine_backward does not write.
MOEKERNELS_CPU_KERNEL(combine_clear, const CombineBackwardArgs& args, int64_t row_begin,
                      int64_t row_end)
