// One product of csrc/cuda/sm90 with a hidden epilogue, or in ping-pong (SwiGLU alone, as a test's
// headers have it); tests compile it over headers with a planted bug, for the emulator to find.
#ifdef PINGPONG
#include "sm90/pingpong.cuh"
#define KERNEL pingpong_product<StoreDAct<__nv_bfloat16, 128>, true>
#define ARGS StoreDAct<__nv_bfloat16, 128>::Args
#else
#include "sm90/hidden.cuh"
#define KERNEL hidden_product<Hidden<StoreRows<__nv_bfloat16, 256>>, false>
#define ARGS StoreRows<__nv_bfloat16, 256>::Args
#endif

namespace moekernels::cuda::sm90 {
template __global__ void KERNEL(const __grid_constant__ CUtensorMap,
                                const __grid_constant__ CUtensorMap, const ProductArgs,
                                const GemmPair, const ARGS, const Probe);
}  // namespace moekernels::cuda::sm90
