// Where a thread is, and sums whose order is fixed.
#pragma once

#include <cstdint>

namespace moekernels::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x & 31; }
__device__ inline int64_t warp_of_grid() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> 5;
}
__device__ inline bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}

// The sum over the lanes, the same bits on every lane.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

}  // namespace moekernels::cuda
