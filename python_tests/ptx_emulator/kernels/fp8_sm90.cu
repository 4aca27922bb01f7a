// The product in FP8 of csrc/cuda/sm90/fp8.cuh, as the library has it; tests compile it over
// headers with a planted bug, for the emulator to find.
#include "sm90/fp8.cuh"

namespace moekernels::cuda::sm90 {
template __global__ void fp8_product<__nv_bfloat16>(const __grid_constant__ CUtensorMap,
                                                    const __grid_constant__ CUtensorMap,
                                                    const ProductArgs, const BlockScales,
                                                    const StoreRows<__nv_bfloat16, 128>::Args,
                                                    const Probe);
}  // namespace moekernels::cuda::sm90
