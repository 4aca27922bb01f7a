// Sums over a block in the order of its threads.
#pragma once

#include "warp.cuh"

namespace moekernels::cuda {

// The sum of v over the threads before this one; *total: over all. `scratch` holds one value a
// warp.
template <int threads>
__device__ int64_t block_exclusive_sum(int64_t v, int64_t* scratch, int64_t* total) {
  constexpr int warps = threads / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int64_t sum = v;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t lower = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += lower;
  }
  __syncthreads();  // the scratch of the call before is read
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int64_t before = 0, all = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? scratch[w] : 0;
    all += scratch[w];
  }
  *total = all;
  return before + sum - v;
}

}  // namespace moekernels::cuda
