// Small kernels, each right or with one planted bug, for the tests of the emulator's checks.
#include <assert.h>
#include <stdint.h>

// y[t] = x[last - t] through shared memory; without the barrier other warps' stores may come later.
template <bool kSynchronise>
__device__ void reverse_block(const int* x, int* y) {
  __shared__ int staged[256];
  staged[threadIdx.x] = x[threadIdx.x];
  if (kSynchronise) __syncthreads();
  y[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void reverse(const int* x, int* y) { reverse_block<true>(x, y); }
extern "C" __global__ void reverse_without_syncthreads(const int* x, int* y) {
  reverse_block<false>(x, y);
}

template <bool kSynchronise>
__device__ void swap_neighbours_in_warp(const int* x, int* y) {
  __shared__ int staged[256];
  staged[threadIdx.x] = x[threadIdx.x];
  if (kSynchronise) __syncwarp();
  y[threadIdx.x] = staged[threadIdx.x ^ 1];
}
extern "C" __global__ void swap_neighbours(const int* x, int* y) {
  swap_neighbours_in_warp<true>(x, y);
}
extern "C" __global__ void swap_without_syncwarp(const int* x, int* y) {
  swap_neighbours_in_warp<false>(x, y);
}

// Two rounds over one buffer: the second round's stores need a barrier behind the first one's
// loads.
template <bool kSynchronise>
__device__ void rotate_twice_block(const int* x, int* y) {
  __shared__ int staged[256];
  int value = x[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    staged[threadIdx.x] = value;
    __syncthreads();
    value = staged[(threadIdx.x + 32) % blockDim.x];
    if (kSynchronise) __syncthreads();
  }
  y[threadIdx.x] = value;
}
extern "C" __global__ void rotate_twice(const int* x, int* y) { rotate_twice_block<true>(x, y); }
extern "C" __global__ void rotate_without_second_barrier(const int* x, int* y) {
  rotate_twice_block<false>(x, y);
}

extern "C" __global__ void shared_index(int* y, int shift) {
  __shared__ int staged[64];
  staged[threadIdx.x + shift] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = staged[threadIdx.x + shift];
}

extern "C" __global__ void global_index(const int* x, int* y, int shift) {
  y[threadIdx.x] = x[threadIdx.x + shift];
}

extern "C" __global__ void vector_load(const float* x, float* y, int shift) {
  float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + shift);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

extern "C" __global__ void warp_sum(const int* x, int* y, unsigned mask, int lanes) {
  if ((int)threadIdx.x >= lanes) return;
  int sum = x[threadIdx.x];
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(mask, sum, offset);
  y[threadIdx.x] = sum;
}

extern "C" __global__ void barrier_for_some(int* y, int threads) {
  __shared__ int staged[256];
  staged[threadIdx.x] = 1;
  if ((int)threadIdx.x < threads) {
    __syncthreads();
    y[threadIdx.x] = staged[threadIdx.x];
  }
}

template <bool kAtomic>
__device__ void count(const int* x, int* histogram) {
  if (kAtomic) {
    atomicAdd(&histogram[x[blockIdx.x * blockDim.x + threadIdx.x]], 1);
  } else {
    histogram[x[blockIdx.x * blockDim.x + threadIdx.x]] += 1;
  }
}
extern "C" __global__ void histogram(const int* x, int* counts) { count<true>(x, counts); }
extern "C" __global__ void histogram_without_atomics(const int* x, int* counts) {
  count<false>(x, counts);
}

template <bool kAtomic>
__device__ void shared_count(const int* x, int* counts) {
  __shared__ int local[8];
  if (threadIdx.x < 8) local[threadIdx.x] = 0;
  __syncthreads();
  count<kAtomic>(x, local);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}
extern "C" __global__ void shared_histogram(const int* x, int* counts) {
  shared_count<true>(x, counts);
}
extern "C" __global__ void shared_histogram_without_atomics(const int* x, int* counts) {
  shared_count<false>(x, counts);
}

extern "C" __global__ void uninitialized_shared(int* y, int written) {
  __shared__ int staged[64];
  if ((int)threadIdx.x < written) staged[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = staged[threadIdx.x];
}

extern "C" __global__ void accumulate(const float* x, float* y) {
  y[threadIdx.x] += x[threadIdx.x];
}

// Every block writes the row of its index modulo `rows`.
extern "C" __global__ void write_rows(int* y, int rows) {
  y[blockIdx.x % rows * blockDim.x + threadIdx.x] = blockIdx.x;
}

// The block that arrives last sums what all blocks have written.
template <bool kFence>
__device__ void last_block_sums(const int* x, int* partial, unsigned* ticket, int* y) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (kFence) {
      __threadfence();
      last = atomicAdd(ticket, 1) == gridDim.x - 1;
    } else {
      last = blockIdx.x == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < (int)gridDim.x; ++i) sum += *(partial + i);
    *y = sum;
  }
}
extern "C" __global__ void grid_sum(const int* x, int* p, unsigned* t, int* y) {
  last_block_sums<true>(x, p, t, y);
}
extern "C" __global__ void grid_sum_without_ticket(const int* x, int* p, unsigned* t, int* y) {
  last_block_sums<false>(x, p, t, y);
}

// Two halves of a block hand a value over through named barriers.
extern "C" __global__ void named_barriers(const int* x, int* y, int count) {
  __shared__ int staged[64];
  const int lane = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    staged[lane] = x[lane];
    asm volatile("bar.arrive 1, %0;" ::"r"(count) : "memory");
  } else {
    asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory");
    y[lane] = staged[63 - lane];
  }
}

extern "C" __global__ void spin(volatile int* flag) {
  while (*flag == 0) {
  }
}

extern "C" __global__ void assert_positive(const int* x) { assert(x[threadIdx.x] > 0); }

// An mbarrier for `expected` arrivals of which `arriving` come.
extern "C" __global__ void wait_for_arrivals(int* y, int expected, int arriving) {
  __shared__ uint64_t barrier;
  __shared__ int staged[64];
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(&barrier);
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(expected) : "memory");
  __syncthreads();
  staged[threadIdx.x] = threadIdx.x;
  if ((int)threadIdx.x < arriving)
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address) : "memory");
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], 0;\n"
      "@!p bra again;\n}" ::"r"(address)
      : "memory");
  y[threadIdx.x] = staged[(threadIdx.x + 32) % 64];
}
