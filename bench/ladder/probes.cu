// The smallest kernels that use one instruction family of the Hopper products each, through the
// library's own wrappers. Host code gives layouts, strides and counts as arguments, so a wrong one
// can be planted without another build.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/sm90/ptx.cuh"

using namespace moekernels::cuda::sm90;

extern __shared__ __align__(1024) char shared[];  // the swizzle counts from multiples of 1024

namespace {

__device__ bool phase_over(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

__device__ void copy_out(uint4* out, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    out[i] = reinterpret_cast<const uint4*>(shared)[i];
}

__device__ void copy_in(char* to, const uint4* from, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(to)[i] = from[i];
}

}  // namespace

// Two warps hand a number back and forth. seen [2 + rounds]: whether a fresh barrier's parity 1 is
// over (1), its parity 0 (0), then the number of each round.
extern "C" __global__ void mbarrier_probe(int expected, int rounds, uint32_t* seen) {
  __shared__ uint64_t barriers[2];
  __shared__ uint32_t value;
  const uint32_t full = shared_address(&barriers[0]), empty = shared_address(&barriers[1]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barrier(full, expected);
    init_barrier(empty, 1);
    publish_barriers();
    seen[0] = phase_over(full, 1);
    seen[1] = phase_over(full, 0);
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      wait(empty, (round & 1) ^ 1);
      if (lane == 0) value = round * 3 + 7;
      __syncwarp();
      if (lane < 8) arrive(full);
    } else {
      wait(full, round & 1);
      if (lane == 0) {
        seen[2 + round] = value;
        arrive(empty);
      }
      __syncwarp();
    }
  }
}

// One box, as TMA leaves it in shared memory. bytes: what it announces.
extern "C" __global__ void tma_2d_probe(const __grid_constant__ CUtensorMap map, int x, int y,
                                        int bytes, uint4* out) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    init_barrier(shared_address(&barrier), 1);
    publish_barriers();
    arrive_and_expect(shared_address(&barrier), bytes);
    load_tile(shared_address(shared), &map, x, y, shared_address(&barrier));
  }
  __syncthreads();
  wait(shared_address(&barrier), 0);
  copy_out(out, bytes);
}
extern "C" __global__ void tma_3d_probe(const __grid_constant__ CUtensorMap map, int x, int y,
                                        int z, int bytes, uint4* out) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    init_barrier(shared_address(&barrier), 1);
    publish_barriers();
    arrive_and_expect(shared_address(&barrier), bytes);
    load_tile(shared_address(shared), &map, x, y, z, shared_address(&barrier));
  }
  __syncthreads();
  wait(shared_address(&barrier), 0);
  copy_out(out, bytes);
}

// d [64, columns] = A [64, 64] B [columns, 64]^T from images of shared memory, four products of 16
// of K one after another. What the products' descriptors hold comes from the host: the bytes from
// step to step, and leading and stride.
struct Layout {
  uint32_t step, leading, stride;
};
template <class T, int kColumns, int kTransposedA, int kTransposedB>
__device__ void wgmma(const uint4* image_a, const uint4* image_b, Layout a, Layout b, float* out) {
  copy_in(shared, image_a, 64 * 128);
  copy_in(shared + 64 * 128, image_b, kColumns * 128);
  fence_async_proxy();
  __syncthreads();
  const uint64_t from_a = operand(shared_address(shared), a.leading, a.stride);
  const uint64_t from_b = operand(shared_address(shared) + 64 * 128, b.leading, b.stride);
  float d[kColumns / 2];
  fence_products();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    multiply<T, kTransposedA, kTransposedB>(d, from_a + k * (a.step >> 4),
                                            from_b + k * (b.step >> 4), k > 0);
  }
  commit_products();
  wait_products<0>();
  pin(d);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* at = out + (row + 8 * half) * kColumns + j * 8 + threadIdx.x % 4 * 2;
      at[0] = d[4 * j + 2 * half];
      at[1] = d[4 * j + 2 * half + 1];
    }
  }
}
#define WGMMA_PROBE(name, type, columns, transposed_a, transposed_b)                           \
  extern "C" __global__ void __launch_bounds__(128, 1) name(                                   \
      const uint4* image_a, const uint4* image_b, uint32_t step_a, uint32_t leading_a,         \
      uint32_t stride_a, uint32_t step_b, uint32_t leading_b, uint32_t stride_b, float* out) { \
    wgmma<type, columns, transposed_a, transposed_b>(                                          \
        image_a, image_b, {step_a, leading_a, stride_a}, {step_b, leading_b, stride_b}, out);  \
  }
WGMMA_PROBE(wgmma_bf16_n256_kk, __nv_bfloat16, 256, 0, 0)
WGMMA_PROBE(wgmma_bf16_n256_mk, __nv_bfloat16, 256, 1, 0)
WGMMA_PROBE(wgmma_bf16_n256_kn, __nv_bfloat16, 256, 0, 1)
WGMMA_PROBE(wgmma_bf16_n256_mn, __nv_bfloat16, 256, 1, 1)
WGMMA_PROBE(wgmma_bf16_n128_kk, __nv_bfloat16, 128, 0, 0)
WGMMA_PROBE(wgmma_f16_n256_kk, __half, 256, 0, 0)

// The products' ring: one producer thread, eight consumer warps that copy every stage's 8 KiB out.
extern "C" __global__ void __launch_bounds__(384, 1)
    ring_probe(const __grid_constant__ CUtensorMap map, int stages, int steps, int arrivals,
               int waits, uint4* out) {
  constexpr int kBytes = 64 * 128;
  __shared__ uint64_t barriers[2 * 8];
  const uint32_t full = shared_address(barriers), empty = full + 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, arrivals);
    }
    publish_barriers();
  }
  __syncthreads();
  int stage = 0;
  uint32_t phase = 0;
  if (warp >= 8) {
    if (threadIdx.x != 256) return;
    for (int step = 0; step < steps; ++step) {
      if (waits != 0) wait(empty + 8 * stage, phase ^ 1);
      arrive_and_expect(full + 8 * stage, kBytes);
      load_tile(shared_address(shared) + stage * kBytes, &map, 0, step * 64, full + 8 * stage);
      if (++stage == stages) stage = 0, phase ^= 1;
    }
    return;
  }
  for (int step = 0; step < steps; ++step) {
    wait(full + 8 * stage, phase);
    const uint4* from = reinterpret_cast<const uint4*>(shared + stage * kBytes);
    for (int i = threadIdx.x; i < kBytes / 16; i += 256) out[step * (kBytes / 16) + i] = from[i];
    __syncwarp();
    if (lane == 0) arrive(empty + 8 * stage);
    if (++stage == stages) stage = 0, phase ^= 1;
  }
}

// Registers change hands as in the products; a consumer then holds more than a launch gives. out
// [256, 200].
extern "C" __global__ void __launch_bounds__(384, 1) setmaxnreg_probe(const float* in, float* out) {
  constexpr int kHeld = 200;
  if (threadIdx.x >= 256) {
    give_registers<40>();
    return;
  }
  take_registers<232>();
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = in[i * 256 + threadIdx.x];
  sync_named<256>(1);
  pin(held);
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    out[threadIdx.x * kHeld + i] = held[i] + held[kHeld - 1 - i] * 2.0f;
}
