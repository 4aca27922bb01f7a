// Whether our kernels or CUTLASS's compute grouped_gemm and its gradients on CUDA. MOEKERNELS_GEMM
// says, at every call: own (also where it is not set) or cutlass. A product that CUTLASS cannot
// take is an error then, never silently ours, so that what is measured is what was asked for. The
// experts' fused products are always ours.
#pragma once

#include <cstdlib>
#include <string_view>

#include "device.h"
#include "moekernels/grouped_gemm_cutlass.h"

namespace moekernels::binding {

#ifdef MOEKERNELS_CUTLASS
inline constexpr bool kWithCutlass = true;
#else
inline constexpr bool kWithCutlass = false;
#endif

inline bool cutlass_wanted() {
  const char* value = std::getenv("MOEKERNELS_GEMM");
  if (value == nullptr) return false;
  const std::string_view wanted = value;
  check(wanted == "own" || wanted == "cutlass", "MOEKERNELS_GEMM must be own or cutlass, got '",
        wanted, "'");
  return wanted == "cutlass";
}

inline bool nothing_to_multiply(const GroupedGemmArgs& args) {
  return args.num_rows == 0 || args.in == 0 || args.out_width == 0 || args.experts == 0;
}
inline bool nothing_to_multiply(const GroupedWgradArgs& args) {
  return args.num_rows == 0 || args.m == 0 || args.n == 0 || args.experts == 0;
}

// Runs a product with CUTLASS where that is wanted; false: it is left to our kernels.
template <class Args>
bool by_cutlass(const char* op, const Args& args, const Tensor& like, Stream stream) {
  if (!cutlass_wanted() || nothing_to_multiply(args)) return false;
  if constexpr (!kWithCutlass) {
    check(false, op,
          ": MOEKERNELS_GEMM=cutlass, but this build leaves CUTLASS out; "
          "rebuild with MOEKERNELS_CUTLASS=1, or unset it");
  } else {
    const char* obstacle = cuda::why_not_cutlass(args);
    check(obstacle == nullptr, op,
          ": MOEKERNELS_GEMM=cutlass, but this product is not for CUTLASS: ", obstacle,
          "; unset it");
    const Tensor scratch = empty({cuda::cutlass_scratch_bytes(args)}, ScalarType::Byte, like);
    if constexpr (std::is_same_v<Args, GroupedGemmArgs>) {
      cuda::grouped_gemm_cutlass(args, scratch.mutable_data_ptr(), stream);
    } else {
      cuda::grouped_wgrad_cutlass(args, scratch.mutable_data_ptr(), stream);
    }
  }
  return true;
}

}  // namespace moekernels::binding
