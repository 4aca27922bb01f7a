// A token's team: the lanes that hold one token's experts in registers, kValues each, eight
// neighbours at a time. Teams of up to 32 lanes lie within a warp, larger ones are a whole block.
#pragma once

#include "warp.cuh"

namespace moekernels::cuda {

template <int lanes_, int values_>
struct Team {
  static constexpr int lanes = lanes_, values = values_;
  static constexpr int width = 8;  // neighbouring experts
  static constexpr bool is_block = lanes > 32;
  static constexpr int warps = is_block ? lanes / 32 : 1;

  __device__ static int lane() { return threadIdx.x % lanes; }
  __device__ static int team_of_block() { return threadIdx.x / lanes; }
  // The expert of this lane's value i.
  __device__ static int expert(int i) { return (i / width * lanes + lane()) * width + i % width; }
  // The lane that holds an expert.
  __device__ static int lane_of(int e) { return e / width % lanes; }

  __device__ static void sync() {
    if constexpr (is_block) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Reductions leave the same bits on every lane. Blocks go through `scratch`, one value a warp.
  template <class V, class F>
  __device__ static V reduce(V v, V* scratch, const F& f) {
#pragma unroll
    for (int step = (is_block ? 32 : lanes) / 2; step > 0; step /= 2) {
      v = f(v, __shfl_xor_sync(kAllLanes, v, step));
    }
    if constexpr (is_block) {
      __syncthreads();  // the scratch of the call before is read
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
      __syncthreads();
      v = scratch[0];
#pragma unroll
      for (int w = 1; w < warps; ++w) v = f(v, scratch[w]);
    }
    return v;
  }
  __device__ static float sum(float v, uint32_t* scratch) {
    return reduce(v, reinterpret_cast<float*>(scratch), [](float a, float b) { return a + b; });
  }
  __device__ static float largest(float v, uint32_t* scratch) {
    return reduce(v, reinterpret_cast<float*>(scratch),
                  [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ static uint32_t largest(uint32_t v, uint32_t* scratch) {
    if constexpr (lanes == 32) {
      return __reduce_max_sync(kAllLanes, v);
    } else {
      return reduce(v, scratch, [](uint32_t a, uint32_t b) { return max(a, b); });
    }
  }
  __device__ static uint32_t smallest(uint32_t v, uint32_t* scratch) {
    if constexpr (lanes == 32) {
      return __reduce_min_sync(kAllLanes, v);
    } else {
      return reduce(v, scratch, [](uint32_t a, uint32_t b) { return min(a, b); });
    }
  }
};

}  // namespace moekernels::cuda
