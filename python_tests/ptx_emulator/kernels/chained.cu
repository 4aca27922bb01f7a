// A product of csrc/cuda/sm90 in a chain of launches; tests compile it over headers with a planted
// bug, for the emulator to find.
#include "sm90/chained.cuh"

namespace moekernels::cuda::sm90 {
template __global__ void chained_product<StoreRows<__nv_bfloat16, 128>, false, false>(
    const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap, const ProductArgs,
    const StoreRows<__nv_bfloat16, 128>::Args, const Probe);
template __global__ void chained_product<StoreRows<__nv_bfloat16, 128>, false, true>(
    const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap, const ProductArgs,
    const StoreRows<__nv_bfloat16, 128>::Args, const Probe);
}  // namespace moekernels::cuda::sm90
