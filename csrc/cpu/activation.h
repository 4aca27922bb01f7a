// The functions behind the experts' nonlinearities and the router's scores
// (moekernels/activation.h, score.h), on vectors.
#pragma once

#include "moekernels/activation.h"
#include "simd.h"
#include "vmath.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// Within 1 ulp.
inline Vec<float> erf(Vec<float> x) {
  using F = Vec<float>;
  const F t = x < 0.0f ? -x : x, s = x * x;
  // Above 0.9277: 1 - exp(polynomial); below: x + x polynomial(x^2).
  F r = t * -1.72853470e-5f + 3.83197126e-4f;
  const F u = t * -3.88396438e-3f + 2.42546219e-2f;
  r = r * s + u;
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  r = 1.0f - exp(r);
  const F large = x < 0.0f ? -r : r;
  F q = s * -5.96761703e-4f + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  q = q * x + x;
  return t > 0.927734375f ? large : q;
}

inline Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::erf(x[i]);
  return x;
}

// What the shared formulas ask of this level. A type of this level's namespace, so that no two
// levels share an instance.
template <class S>
struct Math {
  static Vec<S> exp(Vec<S> x) { return MOEKERNELS_ISA::exp(x); }
  static Vec<S> erf(Vec<S> x) { return MOEKERNELS_ISA::erf(x); }
  static Vec<S> sigmoid(Vec<S> x) { return MOEKERNELS_ISA::sigmoid<S>(x); }
  static Vec<S> sqrt_softplus(Vec<S> x) { return MOEKERNELS_ISA::sqrt_softplus<S>(x); }
  static Vec<S> sqrt_softplus_slope(Vec<S> x, Vec<S> value) {
    return MOEKERNELS_ISA::sqrt_softplus_slope<S>(x, value);
  }
};

}  // namespace moekernels::cpu::MOEKERNELS_ISA
