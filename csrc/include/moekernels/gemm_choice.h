// Which kernel and tile a grouped product takes on CUDA: a function of its shape, dtype, alignment
// and device alone, so that the same call gives the same bits and the choice can be read
// (`moekernels info --explain`) and tested without a GPU. Never timed at run time.
#pragma once

#include "moekernels/common.h"
#include "moekernels/gemm_tuned.h"
#include "moekernels/tile_order.h"

namespace moekernels {

// C [m, n] = A [m, k] B. For the row products (all but wgrad) m is R, the most rows there can be,
// over all experts; for wgrad [m, n] is one expert's gradient and k is R.
struct GemmProblem {
  GemmOp op;
  DType dtype;
  int64_t m, n, k, experts;
  int64_t alignment;   // bytes that divide every pointer and row of A, B and C, see gemm_alignment
  bool tf32;           // fp32 inputs may be rounded to tf32
  int capability = 0;  // 80, 90, ...: the device's
  bool wgmma = false;  // this build holds the sm_90a kernels

  int64_t rows() const { return op == GemmOp::wgrad ? k : m; }
  int64_t rows_an_expert() const { return experts > 0 ? rows() / experts : rows(); }
};

struct GemmChoice {
  GemmKernel kernel;
  int tile_m, tile_n, tile_k, stages;
  const char* reason;    // for the tile
  const char* obstacle;  // why not wgmma; null where it is taken
  GemmOrder order = {};
};

// The largest power of two up to 16 that divides all values: addresses and row lengths in bytes.
template <class... Values>
int64_t gemm_alignment(const Values&... values) {
  const int64_t bits = (int64_t{16} | ... | (int64_t)(values));
  return bits & -bits;
}

// The wgmma kernels count tiles in 32 bits and keep two numbers an expert in shared memory.
constexpr int64_t kWgmmaExperts = 4096;
inline bool wgmma_counts(const GemmProblem& p) {
  constexpr int64_t kRows = 128, kColumns = 128, kMost = int64_t{1} << 30;
  if (p.experts > kWgmmaExperts || p.rows() >= int64_t{1} << 31 || p.k >= int64_t{1} << 31)
    return false;
  if (p.op != GemmOp::wgrad) return tile_order_fits(p.m, p.experts, p.n, kRows, kColumns);
  return p.m <= kMost && p.n <= kMost &&
         p.experts * tile_count(p.m, kRows) <= kMost / tile_count(p.n + 1, kColumns);
}

// Why the wgmma kernels cannot take a product; null: they can.
inline const char* why_not_wgmma(const GemmProblem& p) {
  if (p.capability / 10 != 9) return "wgmma is of sm_90 alone";
  if (!p.wgmma) return "this build holds no wgmma kernels";
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "wgmma takes 16-bit inputs";
  if (p.alignment < 16) return "TMA needs rows and addresses of whole 16 bytes";
  if (p.m == 0 || p.n == 0 || p.k == 0 || p.experts == 0) return "there is nothing to multiply";
  if (!wgmma_counts(p)) return "wgmma counts up to 4096 experts and 2^30 tiles";
  return nullptr;
}

inline GemmChoice choose_gemm(const GemmProblem& p) {
  const char* obstacle = why_not_wgmma(p);
  if (p.dtype == DType::f32) {
    return {GemmKernel::fma,
            64,
            64,
            16,
            3,
            p.tf32 ? "rounded to tf32 as torch's matmul precision allows: tensor cores"
                   : "exact products as torch's matmul precision asks: no tensor cores",
            obstacle};
  }
  const GemmKernel wanted = obstacle == nullptr ? GemmKernel::wgmma : GemmKernel::mma;
  for (const GemmTuned& entry : kGemmTuned) {
    const bool fits = entry.kernel == wanted && (entry.ops & gemm_op_bit(p.op)) != 0 &&
                      p.n >= entry.least_n && p.m >= entry.least_m && p.k <= entry.most_k &&
                      p.rows_an_expert() >= entry.least_rows_an_expert;
    if (fits)
      return {wanted,       entry.tile_m, entry.tile_n, entry.tile_k,
              entry.stages, entry.reason, obstacle,     entry.order};
  }
  return {GemmKernel::mma,
          64,
          64,
          32,
          3,
          "the smallest tile",
          obstacle ? obstacle : "no tile of wgmma fits"};
}

}  // namespace moekernels
