// Products of e4m3 operands on CUDA devices: of sm_90 alone, which multiplies them at twice the
// rate of 16 bits (grouped_gemm_fp8_sm90.cu).
#include "moekernels/grouped_gemm.h"

#include "mma/launch.cuh"

namespace moekernels::cuda {
namespace {

// Why the kernel of sm_90a cannot take a product; null: it can.
const char* why_not(const GroupedGemmFp8Args& args) {
  if (capability() != 90) return "they are of sm_90 alone; give fp8=False on this device";
  if (!sm90::kBuilt) return "this build holds none; rebuild with 90a-real in MOEKERNELS_CUDA_ARCHS";
  if (args.dtype != DType::bf16 && args.dtype != DType::f16)
    return "their results are bfloat16 or float16; give one of the two";
  if (args.in == 0 || args.experts == 0) return "there is nothing to multiply";
  const int64_t alignment = gemm_alignment(args.rows, args.w, args.in, args.out, args.bias,
                                           args.out_width * size_of(args.dtype));
  if (alignment < 16) return "TMA needs rows and addresses of whole 16 bytes; give such widths";
  const GemmProblem problem{.op = GemmOp::forward,
                            .dtype = args.dtype,
                            .m = args.num_rows,
                            .n = args.out_width,
                            .k = args.in,
                            .experts = args.experts,
                            .alignment = alignment,
                            .tf32 = false};
  return wgmma_counts(problem) ? nullptr : "they count up to 4096 experts and 2^30 tiles";
}

}  // namespace

void grouped_gemm_fp8(const GroupedGemmFp8Args& args, Stream stream) {
  if (args.num_rows == 0 || args.out_width == 0) return;
  if (const char* why = why_not(args)) {
    throw std::runtime_error(std::string("grouped_gemm: no product in FP8 on CUDA: ") + why);
  }
  if constexpr (sm90::kBuilt) sm90::grouped_gemm_fp8(args, stream);
}

}  // namespace moekernels::cuda
