// Tiles of 8 x 32 floats that bulk reductions add to an array.
#include <cuda.h>

#include <cstdint>

__device__ void fill(float (&tile)[8][32], int lane, int first) {
  for (int row = 0; row < 8; ++row)
    tile[row][((lane / 4 ^ row) * 4 | lane % 4)] = first + row * 32 + lane + 1;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
}

__device__ void add(const CUtensorMap* c, const float (&tile)[8][32], int row) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
      "[%1];\ncp.async.bulk.commit_group;" ::"l"(c),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(tile))), "r"(0), "r"(row)
      : "memory");
}

// Every block adds its numbers to rows [first[block], +8) of c.
extern "C" __global__ void add_tiles(const __grid_constant__ CUtensorMap c, const int* first) {
  __shared__ __align__(1024) float tile[8][32];
  fill(tile, threadIdx.x, blockIdx.x * 1000);
  if (threadIdx.x == 0) {
    add(&c, tile, first[blockIdx.x]);
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

struct Maps {
  int count;
  CUtensorMap of[2];
};

// Adds the same tile to each map's array; where `waits`, one after the other.
extern "C" __global__ void add_to_each(const __grid_constant__ Maps maps, int waits) {
  __shared__ __align__(1024) float tile[8][32];
  fill(tile, threadIdx.x, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < maps.count; ++i) {
      add(maps.of + i, tile, 0);
      if (waits) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
