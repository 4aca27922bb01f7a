// How an expert's activation is applied in the epilogues of its products on sm_90a (up.cuh,
// dact.cuh).
#pragma once

#include "moekernels/activation.h"
#include "moekernels/gemm_tiles.h"
#include "rows.cuh"

namespace moekernels::cuda::sm90 {

// As exact as 16-bit results can tell, in a third of the instructions: no care for denormal
// results, which are zero.
struct FastMath {
  __device__ static float exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
  }
  __device__ static float erf(float x) { return ::erff(x); }
  __device__ static float sigmoid(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp(-x)));
    return y;
  }
};

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

struct ExpertStyle {
  int64_t ffn;
  Activation activation;
  float alpha, limit;
  bool interleaved;
  __host__ __device__ bool gated() const { return activation <= Activation::swiglu_clamped; }
  __host__ __device__ bool apart() const {
    return gated() && !interleaved;
  }  // gate and up columns lie F apart
  __host__ __device__ int64_t width() const { return (gated() ? 2 : 1) * ffn; }
};

// Calls f with the activation, and with whether gate and up alternate, as constants: addresses and
// instructions an element are what an epilogue costs.
template <class F>
__device__ inline void with_style(const ExpertStyle& style, const F& f) {
  with_activation(style.activation, [&](auto kind) {
    if constexpr (decltype(kind)::value <= Activation::swiglu_clamped) {
      if (style.interleaved) return f(kind, Constant<true>{});
    }
    f(kind, Constant<false>{});
  });
}

// Gate and up of 8 columns of F, from two chunks of 8 elements: one of each, or both alternating.
template <class T, bool kAlternate>
__device__ inline void split_gate(const uint4& first, const uint4& second, float (&g)[8],
                                  float (&u)[8]) {
  const uint32_t a[4] = {first.x, first.y, first.z, first.w},
                 b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = unpack(a[i], T{}), q = unpack(b[i], T{});
    g[2 * i] = p.x;
    g[2 * i + 1] = p.y;
    u[2 * i] = q.x;
    u[2 * i + 1] = q.y;
  }
  if constexpr (!kAlternate) return;
  const float both[16] = {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7],
                          u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7]};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    g[i] = both[2 * i];
    u[i] = both[2 * i + 1];
  }
}

template <class T>
__device__ inline uint4 pack8(const float (&v)[8]) {
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

}  // namespace moekernels::cuda::sm90
