// One row product and one gradient of csrc/cuda/sm90/product.cuh, as the library has them;
// tests compile it over headers with a planted bug, for the emulator to find, or as the watchdog
// and trace builds have them.
#include "sm90/product.cuh"
#include "sm90/rows.cuh"

namespace moekernels::cuda::sm90 {
using Rows = StoreRows<__nv_bfloat16, 128>;
using Gradient = StoreGradient<__nv_bfloat16, 256, false>;
template __global__ void product<Rows, false, false>(const __grid_constant__ CUtensorMap,
                                                     const __grid_constant__ CUtensorMap,
                                                     const ProductArgs, const Rows::Args,
                                                     const Probe);
template __global__ void product<Gradient, true, true>(const __grid_constant__ CUtensorMap,
                                                       const __grid_constant__ CUtensorMap,
                                                       const ProductArgs, const Gradient::Args,
                                                       const Probe);
}  // namespace moekernels::cuda::sm90
