// The gradients of the routing weights: what a warp does for its row.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "common/warp.cuh"
#include "mma/h_chunk.cuh"
#include "moekernels/experts.h"

namespace moekernels::cuda {

// The expert of a row, or -1: by bisection, whatever the offsets hold.
__device__ inline int64_t expert_of(const ExpertsArgs& of, int64_t row) {
  int64_t low = 0, high = of.experts;  // offsets[low] <= row is to be found last
  if (of.experts == 0 || row < of.offsets[0] || row >= of.offsets[of.experts]) return -1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (of.offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Sums the parts that the row's tiles left, and what its bias adds.
template <class T>
__device__ __forceinline__ void sum_dweight(const ExpertsDWeightsArgs& args) {
  const ExpertsArgs& of = args.of;
  const int64_t row = warp_of_grid();
  if (row >= of.num_rows) return;
  const int64_t expert = expert_of(of, row), parts = experts_dweights_parts(of.ffn);
  float total = 0;
  if (expert >= 0 && is_used(of, row)) {
    const float* part = static_cast<const float*>(args.dweights_parts) + row * parts;
    for (int64_t i = lane_id(); i < parts; i += kWarp) total += part[i];
    if (of.b2 != nullptr) {
      const T* dy = static_cast<const T*>(args.dy) + row * of.hidden;
      const T* bias = static_cast<const T*>(of.b2) + expert * of.hidden;
      for (int64_t i = lane_id(); i < of.hidden; i += kWarp)
        total = fmaf(to_float(dy[i]), to_float(bias[i]), total);
    }
  }
  total = warp_sum(total);
  if (lane_id() == 0) static_cast<float*>(args.dweights)[row] = total;
}

}  // namespace moekernels::cuda
