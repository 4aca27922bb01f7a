// A row product, a gradient and one added to sums of csrc/cuda/sm90/product.cuh, as the library has
// them; tests compile it over headers with a planted bug, for the emulator to find, or as the
// watchdog and trace builds have them.
#include "sm90/add.cuh"
#include "sm90/gather.cuh"
#include "sm90/kernel.cuh"
#include "sm90/rows.cuh"
#include "sm90/segments.cuh"

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
template __global__ void product_into_sums<AddGradient<__nv_bfloat16>>(
    const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap,
    const __grid_constant__ CUtensorMap, const ProductArgs, void*, const int64_t, const int64_t,
    const Probe);
template __global__ void product_gathered<Gradient, true, true, true>(
    const __grid_constant__ CUtensorMap, const Gather, const ProductArgs, const Gradient::Args,
    const Probe);
template __global__ void product_of_segments<AddGradient<__nv_bfloat16>>(
    const __grid_constant__ Segments, const __grid_constant__ CUtensorMap, const ProductArgs, void*,
    const int64_t, const int64_t, const Probe);
}  // namespace moekernels::cuda::sm90
