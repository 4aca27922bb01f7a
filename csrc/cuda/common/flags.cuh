// Words by which devices signal: release and acquire at system scope, waits with a budget.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moekernels::cuda {

__device__ inline uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void store_release(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline void add_release(uint32_t* word, uint32_t value) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Times of many blocks in one word: the greatest, or all of them added up.
__device__ inline void note_most(int64_t* word, int64_t time) {
  asm volatile("red.relaxed.gpu.global.max.s64 [%0], %1;" ::"l"(word), "l"(time) : "memory");
}
__device__ inline void note_sum(int64_t* word, int64_t time) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(word), "l"(time) : "memory");
}

// Waits until a word of the own slab, at `base`, has reached `least`; behind `patience` it says
// what it waited for and traps.
__device__ inline void await(const uint32_t* word, uint32_t least, const char* base, int64_t rank,
                             int64_t patience, int64_t* stuck) {
  int64_t began = 0;
  for (;;) {
    const uint32_t value = load_acquire(word);
    if (static_cast<int32_t>(value - least) >= 0) return;
    if (patience == 0) continue;
    const int64_t now = nanoseconds();
    if (began == 0) began = now;
    if (now - began < patience) continue;
    if (stuck != nullptr) {
      stuck[0] = rank;
      stuck[1] = reinterpret_cast<const char*>(word) - base;
      stuck[2] = value;
      stuck[3] = least;
      __threadfence_system();
    }
    __trap();
  }
}

// Whether this block is the last of its grid to call; then it is behind all that the others did.
// The ticket is zero again for the next launch.
__device__ inline bool last_block(uint32_t* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(ticket)
                 : "memory");
    last = before == gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

}  // namespace moekernels::cuda
