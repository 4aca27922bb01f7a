// all_to_all: packing and regrouping of the rows that ranks exchange. See
// moekernels/ops/all_to_all.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct PackArgs {
  const void* x;           // [T, H]
  const void* weights;     // [T, K] fp32 (fp64 for fp64), or null
  const int32_t* slot_of;  // [R], outside [0, T*K): an unused row
  void* message;           // [R, H + w], unused rows are zero
  int64_t tokens, top_k;
  int64_t row_bytes;     // H * size of an element
  int64_t weight_bytes;  // behind each row: 0 without weights
};

// Runs of rows that stay together, in expert-major order.
struct Runs {
  const int64_t* begin;   // [runs+1] first row by expert
  const int64_t* source;  // [runs] its row by source
  int64_t runs;
};

// Makes the runs on the device, from counts that lie there.
struct RunsArgs {
  const int64_t* counts;  // [P, e] rows from each peer for each local expert
  int64_t* begin;         // [P*e+1], by expert, then peer
  int64_t* source;        // [P*e]
  int64_t* offsets;       // [e+1] where each expert's rows begin, or null
  int64_t peers, experts;
  int64_t rows;  // R': what a count exceeds of it is not counted, so that no sum overflows
};

struct RegroupArgs {
  const void* message;  // [R', H + w] by source, then expert
  void* rows;           // [R', H] by expert, then source
  void* weights;        // [R'], or null
  int64_t row_bytes, weight_bytes;
  int64_t num_rows;
  Runs runs;
};

struct UngroupArgs {
  const void* rows;     // [R', H]
  const void* weights;  // [R'], or null
  void* message;        // [R', H + w]
  int64_t row_bytes, weight_bytes;
  int64_t num_rows;
  Runs runs;
};

namespace cuda {
void pack(const PackArgs& args, int64_t num_rows, Stream stream);
void make_runs(const RunsArgs& args, Stream stream);
void regroup(const RegroupArgs& args, Stream stream);
void ungroup(const UngroupArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(pack, const PackArgs& args, int64_t row_begin, int64_t row_end)
MOEKERNELS_CPU_KERNEL(regroup, const RegroupArgs& args, int64_t row_begin, int64_t row_end)
MOEKERNELS_CPU_KERNEL(ungroup, const UngroupArgs& args, int64_t row_begin, int64_t row_end)
