// Vectors of N elements, and what their elements are as fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>

#include "moekernels/common.h"

namespace moekernels::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Calls f with a null pointer of the dtype's type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16: return f(static_cast<__half*>(nullptr));
    default: throw std::runtime_error("float64 has no CUDA kernels");
  }
}

// Whether every pointer and size is a multiple of 16 bytes.
template <class... Values>
bool aligned16(const Values&... values) {
  return (((uintptr_t)(values) % 16 == 0) && ...);
}

}  // namespace moekernels::cuda
