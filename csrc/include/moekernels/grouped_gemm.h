// grouped_gemm: rows of each expert times its weights. See moekernels/ops/grouped_gemm.py for the
// meaning.
#pragma once

#include "moekernels/common.h"
#include "moekernels/float8.h"

namespace moekernels {

// out [R, O] = rows [R, I] x w; dgrad is the same with the orientation of w turned.
struct GroupedGemmArgs {
  DType dtype;
  const void* rows;        // [R, I]
  const void* w;           // [E, O, I], transposed [E, I, O]
  const int64_t* offsets;  // [E+1], ascending, within [0, R]
  void* out;               // [R, O], rows past offsets[E] are set to zero
  int64_t num_rows, in, out_width, experts;
  bool transposed;
  bool tf32 = false;  // CUDA: fp32 rows and weights may be rounded to tf32
};

// Of e4m3 operands with a scale for each block (float8.h): out [R, O] = weights (rows x w + bias),
// unused rows zero. w always runs along the summed axis.
struct GroupedGemmFp8Args {
  DType dtype;              // of out and bias: f32, bf16 or f16
  const uint8_t* rows;      // [R, I]
  const float* row_scales;  // [R, scale_blocks(I)]
  const uint8_t* w;         // [E, O, I]
  const float* w_scales;    // [E, scale_blocks(O), scale_blocks(I)]
  const int64_t* offsets;   // [E+1]
  const void* bias;         // [E, O] or null
  const float* weights;     // [R] or null
  const int32_t* token_of;  // [R] or null; outside [0, tokens): an unused row
  int64_t tokens;
  void* out;  // [R, O], rows past offsets[E] are set to zero
  int64_t num_rows, in, out_width, experts;
};

// Rows of one microbatch among several whose products go to one gradient; as GroupedWgradArgs has
// them.
struct WgradRows {
  const void* a;
  const void* b;
  const int64_t* offsets;
  const int32_t* token_of;
  int64_t tokens;
  int64_t num_rows;
};

// dw [E, M, N] (=|+=) sum over an expert's rows of a[r, m] b[r, n].
struct GroupedWgradArgs {
  DType dtype;
  const void* a;  // [R, M]
  const void* b;  // [R, N], or [T, N] seen through token_of
  const int64_t* offsets;
  // Rows whose token lies outside [0, tokens) count as zero; null: every row counts, b has R rows.
  const int32_t* token_of;
  int64_t tokens;
  bool gather_a, gather_b;  // which side has one row a token
  void* dw;                 // dtype, or fp32 (fp64 for fp64) when accumulating
  bool accumulate;
  int64_t m, n, experts;
  int64_t num_rows = 0;  // CUDA: R, within which offsets are held
  bool tf32 = false;
  // Accumulating: more rows, the sum of each added behind those before it; on CUDA at most as many
  // as grouped_wgrad_joins says.
  const WgradRows* more = nullptr;
  int64_t more_count = 0;

  // The same of other rows alone.
  GroupedWgradArgs with(const WgradRows& rows) const {
    GroupedWgradArgs of = *this;
    of.a = rows.a;
    of.b = rows.b;
    of.offsets = rows.offsets;
    of.token_of = rows.token_of;
    of.tokens = rows.tokens;
    of.num_rows = rows.num_rows;
    of.more = nullptr;
    of.more_count = 0;
    return of;
  }
};

namespace cuda {
void grouped_gemm(const GroupedGemmArgs& args, Stream stream);
// On sm_90 alone; throws elsewhere, and where an address or width is no multiple of 16 bytes.
void grouped_gemm_fp8(const GroupedGemmFp8Args& args, Stream stream);
// Whether grouped_wgrad takes these arguments, in which a side is seen through token_of; else the
// binding permutes its rows. Rows whose token lies outside [0, tokens) count as zero in any case.
bool grouped_wgrad_gathers(const GroupedWgradArgs& args);
// How many of `more` grouped_wgrad takes beside the first rows. It gathers none of them: what is
// seen through token_of the binding has permuted.
int64_t grouped_wgrad_joins(const GroupedWgradArgs& args);
void grouped_wgrad(const GroupedWgradArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

// Each of `workers` calls does its share; the shares are independent and the result is the same for
// any number of them.
MOEKERNELS_CPU_KERNEL(grouped_gemm, const GroupedGemmArgs& args, int64_t worker, int64_t workers)
MOEKERNELS_CPU_KERNEL(grouped_wgrad, const GroupedWgradArgs& args, int64_t worker, int64_t workers)
MOEKERNELS_CPU_KERNEL(grouped_gemm_fp8, const GroupedGemmFp8Args& args, int64_t worker,
                      int64_t workers)
