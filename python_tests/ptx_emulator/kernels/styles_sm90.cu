// One product of csrc/cuda/sm90 with a hidden epilogue, or in ping-pong (SwiGLU alone, as a test's
// headers have it), or a gradient added to sums in ping-pong; tests compile it over headers with a
// planted bug, for the emulator to find.
#if defined(PINGPONG)
#include "sm90/pingpong.cuh"
#define KERNEL pingpong_product<StoreDAct<__nv_bfloat16, 128>, true>
#define ARGS StoreDAct<__nv_bfloat16, 128>::Args
#elif defined(SUMS)
#include "sm90/sums_in_turn.cuh"
#else
#include "sm90/hidden.cuh"
#define KERNEL hidden_product<Hidden<StoreRows<__nv_bfloat16, 256>>, false>
#define ARGS StoreRows<__nv_bfloat16, 256>::Args
#endif

namespace moekernels::cuda::sm90 {
#ifdef SUMS
template __global__ void pingpong_product_into_sums<AddGradientInTurn<__nv_bfloat16>>(
    const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap,
    const __grid_constant__ CUtensorMap, const ProductArgs, const GemmPair, void*, const int64_t,
    const int64_t, const Probe);
#else
template __global__ void KERNEL(const __grid_constant__ CUtensorMap,
                                const __grid_constant__ CUtensorMap, const ProductArgs,
                                const GemmPair, const ARGS, const Probe);
#endif
}  // namespace moekernels::cuda::sm90
