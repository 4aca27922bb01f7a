// permute: token rows into expert order. See moekernels/ops/permute.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct PermuteArgs {
  const void* x;            // [T, H]
  const int32_t* token_of;  // [R], outside [0, T): an unused row
  void* rows;               // [R, H], unused rows are set to zero
  int64_t tokens, num_rows;
  int64_t row_bytes;  // H * size of an element: permute only moves bytes
};

namespace cuda {
void permute(const PermuteArgs& args, Stream stream);
}

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(permute, const PermuteArgs& args, int64_t row_begin, int64_t row_end)
