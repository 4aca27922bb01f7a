// Compiles the plain SIMT kernels with g++, so that its sanitizers see every access (`make
// sanitize`). Included ahead of a .cu file it gives CUDA's words a meaning on the CPU: every thread
// is a fiber, and runtime.cpp runs the blocks in turn. It holds what the kernels use and no more:
// another built-in does not compile until it has a meaning here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

// One block runs at a time, so a static is its block's own.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define MOEKERNELS_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())

namespace simt {

uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
void* dynamic_shared();
void block_barrier();

// Where all lanes of the mask have called: what each of the 32 gave.
enum class Collective : int { sync, shuffle, match, reduce };
const uint64_t* meet(Collective kind, uint32_t mask, uint64_t mine);
// The lane's value; a lane that the mask leaves out has none.
uint64_t value_of(const uint64_t* values, uint32_t mask, int lane);

void run(const char* name, unsigned blocks, unsigned threads, size_t shared,
         void (*body)(const void*), const void* context);

template <class F>
void launch(const char* name, unsigned blocks, unsigned threads, size_t shared, const F& body) {
  run(name, blocks, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

template <class T>
uint64_t bits_of(T v) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T v;
  memcpy(&v, &bits, sizeof(T));
  return v;
}

template <class T>
T shuffle(uint32_t mask, T v, int source) {
  const uint64_t* values = meet(Collective::shuffle, mask, bits_of(v));
  return from_bits<T>(value_of(values, mask, source));
}

template <class F>
uint32_t reduce(uint32_t mask, uint32_t v, const F& f) {
  const uint64_t* values = meet(Collective::reduce, mask, v);
  uint32_t result = v;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) result = f(result, static_cast<uint32_t>(values[i]));
  }
  return result;
}

inline int lane() { return static_cast<int>(thread_index().x & 31); }

}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = ~0u) { simt::meet(simt::Collective::sync, mask, 0); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int flip) {
  return simt::shuffle(mask, v, simt::lane() ^ flip);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned up) {
  const int source = simt::lane() - static_cast<int>(up);
  return simt::shuffle(mask, v, source < 0 ? simt::lane() : source);
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T v) {
  const uint64_t* values = simt::meet(simt::Collective::match, mask, simt::bits_of(v));
  uint32_t same = 0;
  for (int i = 0; i < 32; ++i)
    same |= static_cast<uint32_t>((mask >> i & 1) && values[i] == simt::bits_of(v)) << i;
  return same;
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t v) {
  return simt::reduce(mask, v, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t v) {
  return simt::reduce(mask, v, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}

inline int32_t atomicAdd(int32_t* to, int32_t v) {
  return __atomic_fetch_add(to, v, __ATOMIC_RELAXED);
}

inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
