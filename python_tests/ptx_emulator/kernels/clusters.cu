// Two blocks of a cluster bring halves of a tile to each other by multicast, several times over one
// stage, and tell each other when it has been read. PLANTED is a bug for the emulator to find.
#include <cuda.h>

#include <cstdint>

#ifndef PLANTED
#define PLANTED none
#endif
enum class Planted { none, no_first_sync, no_last_sync, own_arrivals, own_bytes, own_half };
constexpr Planted kPlanted = Planted::PLANTED;

__device__ uint32_t at(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// map: [rounds * 2, 256] int32 in boxes of one row; out [rounds, 2 blocks, 2 halves, 256].
extern "C" __global__ void exchange(const __grid_constant__ CUtensorMap map, int* out, int rounds) {
  __shared__ __align__(128) int stage[2][256];
  __shared__ __align__(8) uint64_t full, empty;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at(&full)));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(&empty)),
                 "r"(kPlanted == Planted::own_arrivals ? 2 : 4));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (kPlanted != Planted::no_first_sync) cluster_sync();
  for (int i = 0; i < rounds; ++i) {
    const uint32_t phase = i & 1;
    if (threadIdx.x == 0) {
      wait(at(&empty), phase ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(&full)),
                   "r"(kPlanted == Planted::own_bytes ? 1024 : 2048));
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
          ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
              at(stage[kPlanted == Planted::own_half ? 0 : rank])),
          "l"(&map), "r"(at(&full)), "r"(0), "r"(int(2 * i + rank)), "h"(static_cast<uint16_t>(3))
          : "memory");
    }
    wait(at(&full), phase);
    for (int half = 0; half < 2; ++half)
      for (int j = threadIdx.x; j < 256; j += blockDim.x)
        out[((i * 2 + rank) * 2 + half) * 256 + j] = stage[half][j];
    __syncwarp();
    if (threadIdx.x % 32 < (kPlanted == Planted::own_arrivals ? 1 : 2)) {  // 2 warps of 2 blocks
      asm volatile(
          "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
          "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(at(&empty)),
          "r"(kPlanted == Planted::own_arrivals ? rank : threadIdx.x % 32)
          : "memory");
    }
  }
  if (kPlanted != Planted::no_last_sync) cluster_sync();
}
