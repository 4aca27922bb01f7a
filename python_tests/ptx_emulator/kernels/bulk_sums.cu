// Tiles of 8 x 32 floats that bulk reductions add to an array.
#include <cuda.h>

#include <cstdint>

// Every block adds its numbers to rows [first[block], +8) of c.
extern "C" __global__ void add_tiles(const __grid_constant__ CUtensorMap c, const int* first) {
  __shared__ __align__(1024) float tile[8][32];
  const int lane = threadIdx.x;
  for (int row = 0; row < 8; ++row)
    tile[row][((lane / 4 ^ row) * 4 | lane % 4)] = blockIdx.x * 1000 + row * 32 + lane + 1;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (lane == 0) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
        "[%1];\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::"l"(&c),
        "r"(static_cast<uint32_t>(__cvta_generic_to_shared(tile))), "r"(0), "r"(first[blockIdx.x])
        : "memory");
  }
}
