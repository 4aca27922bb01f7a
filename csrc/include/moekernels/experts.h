// experts: the whole expert FFN over routed rows. See moekernels/ops/experts.py for the meaning.
#pragma once

#include "moekernels/common.h"
#include "moekernels/registers.h"

namespace moekernels {

struct ExpertsArgs {
  DType dtype;
  Activation activation;
  double alpha, limit;
  bool interleaved, transposed;
  const void* x;            // [R, H], or [T, H] seen through token_of (CUDA: where `gather`)
  const int32_t* token_of;  // [R] or null; outside [0, T): an unused row
  const void* weights;      // [R] fp32 (fp64 for fp64) or null
  const void* w1;           // [E, G, H], transposed [E, H, G]; G = 2F gated, F not
  const void* w2;           // [E, H, F], transposed [E, F, H]
  const void* b1;           // [E, G] or null
  const void* b2;           // [E, H] or null
  const int64_t* offsets;   // [E+1]
  int64_t num_rows, tokens, hidden, ffn, experts;
  bool tf32 = false;    // CUDA: fp32 inputs may be rounded to tf32
  bool gather = false;  // CUDA: experts_up sees x through token_of
};

// Where a product was computed before, in FP8, experts_act and experts_dact do the rest: a =
// act(h), and the gradients from da [R, F].

// a [R, F] = act(h), h [R, G] = x w1 + b1; either of h and a may be null.
struct ExpertsUpArgs {
  ExpertsArgs of;
  void* h;
  void* a;
};

// y [R, H] = weights (a w2 + b2); unused rows are zero.
struct ExpertsDownArgs {
  ExpertsArgs of;
  const void* a;
  void* y;
};

// From dy [R, H] and the kept h [R, G]: dh [R, G] (which may be h's own memory), the weighted
// activation [R, F] that dw2 needs, and the parts of <da, a> [R, chunks] that sum to dweights. The
// last two may be null.
struct ExpertsDActArgs {
  ExpertsArgs of;
  const void* dy;
  const void* h;
  void* dh;
  void* weighted_a;
  void* dweights_parts;
  const void* da = nullptr;  // dy w2, if it is there already; dy is not read then
};

// a [R, F] = act(h [R, G]).
struct ExpertsActArgs {
  ExpertsArgs of;
  const void* h;
  void* a;
};

// dweights [R] = sum of the parts + <dy, b2>.
struct ExpertsDWeightsArgs {
  ExpertsArgs of;
  const void* dy;
  const void* dweights_parts;
  void* dweights;
};

// out [E, N] (=|+=) sum over an expert's rows of (weights[r]) rows[r], unused rows left out.
struct ExpertsDBiasArgs {
  DType dtype;
  const int32_t* token_of;  // [R] or null
  const void* weights;      // [R] or null
  const int64_t* offsets;   // [E+1]
  int64_t num_rows, tokens, experts;
  const void* rows;  // [R, N]
  int64_t width;
  void* out;  // dtype, or fp32 (fp64 for fp64) when accumulating
  bool accumulate;
};

// So many columns of F make one part of <da, a>, whatever the tile: the parts of a row are fixed by
// F alone, and their sum has one order.
namespace cpu {
constexpr int64_t kDWeightsColumns = 256;
inline int64_t experts_dweights_parts(int64_t ffn) {
  return (ffn + kDWeightsColumns - 1) / kDWeightsColumns;
}
}  // namespace cpu

// Rows past offsets[E] of h, y, dh and weighted_a are set to zero. On CUDA x is [R, H] unless
// `gather`: the binding has permuted the rows, and token_of only says which of them are used.
namespace cuda {
constexpr int64_t kDWeightsColumns = 64;
MOEKERNELS_BOTH inline int64_t experts_dweights_parts(int64_t ffn) {
  return (ffn + kDWeightsColumns - 1) / kDWeightsColumns;
}

// Whether experts_up is to see x [T, H] through token_of by itself: `gather` may be set then.
bool experts_up_gathers(const ExpertsUpArgs& args);
void experts_up(const ExpertsUpArgs& args, Stream stream);
void experts_down(const ExpertsDownArgs& args, Stream stream);
void experts_dact(const ExpertsDActArgs& args, Stream stream);
void experts_act(const ExpertsActArgs& args, Stream stream);
void experts_dweights(const ExpertsDWeightsArgs& args, Stream stream);
void experts_dbias(const ExpertsDBiasArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

// Each of `workers` calls does its share; the shares are independent and the result is the same for
// any number of them.
MOEKERNELS_CPU_KERNEL(experts_up, const ExpertsUpArgs& args, int64_t worker, int64_t workers)
MOEKERNELS_CPU_KERNEL(experts_down, const ExpertsDownArgs& args, int64_t worker, int64_t workers)
MOEKERNELS_CPU_KERNEL(experts_dact, const ExpertsDActArgs& args, int64_t worker, int64_t workers)
MOEKERNELS_CPU_KERNEL(experts_act, const ExpertsActArgs& args, int64_t row_begin, int64_t row_end)
MOEKERNELS_CPU_KERNEL(experts_dweights, const ExpertsDWeightsArgs& args, int64_t worker,
                      int64_t workers)
MOEKERNELS_CPU_KERNEL(experts_dbias, const ExpertsDBiasArgs& args, int64_t worker, int64_t workers)
