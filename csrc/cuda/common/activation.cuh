// The experts' nonlinearities (moekernels/activation.h) on one fp32 number, for the epilogues.
#pragma once

#include <cmath>

#include "moekernels/activation.h"

namespace moekernels::cuda {

struct Math {
  __host__ __device__ static float exp(float x) { return ::expf(x); }
  __host__ __device__ static float erf(float x) { return ::erff(x); }
  __host__ __device__ static float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
};

// a = act(g, u) and its slopes; ungated activations ignore u.
template <Activation kind>
__host__ __device__ inline Activated<float> activate(float g, float u, float alpha, float limit) {
  return moekernels::activate<kind, Math>(g, u, alpha, limit);
}

}  // namespace moekernels::cuda
