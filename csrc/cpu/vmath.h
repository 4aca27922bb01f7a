// Elementary functions on the vectors of vec.h: about 1 ulp in fp32, the C library's in fp64.
#pragma once

#include "vec.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// 0 below -87.3, where fp32 has no normal result; infinite above 88.3, a little before fp32 is; NaN
// stays NaN.
inline Float exp(Float x) {
  const Float low = Float{} - 87.33654f, high = Float{} + 88.37626f;
  const Int vanishes = x < low;
  Float y = x > high ? high : x;
  y = vanishes ? low : y;
  const Float shift = Float{} + 12582912.f;  // adding and taking it away rounds to an integer
  const Float n = (y * 1.44269504088896341f + shift) - shift;
  const Float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
  return vanishes ? Float{} : x > high ? Float{} + INFINITY : p * bits_as<Float>(power);
}

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)), a series in squares of at most 1/9.
inline Float log1p_unit(Float u) {
  const Float s = u / (u + 2.f), z = s * s;
  Float p = z * (1.f / 15) + 1.f / 13;
  p = p * z + 1.f / 11;
  p = p * z + 1.f / 9;
  p = p * z + 1.f / 7;
  p = p * z + 1.f / 5;
  p = p * z + 1.f / 3;
  return 2.f * (s + s * z * p);
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}
inline Vec<double> log1p_unit(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = ::log1p(u[i]);
  return u;
}

inline float exp_of(float x) { return ::expf(x); }
inline double exp_of(double x) { return ::exp(x); }

template <class V>
inline V square_root(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

template <class W>
inline Vec<W> sigmoid(Vec<W> x) {
  return 1 / (1 + exp(-x));
}

// Below this softplus is exp to rounding, and its square root exp(x / 2), which has a value where
// exp itself has none.
template <class W>
inline constexpr W kFarBelow = sizeof(W) == 4 ? W(-18) : W(-38);

template <class W>
inline Vec<W> sqrt_softplus(Vec<W> x) {
  const Vec<W> zero = {}, size = x < zero ? -x : x;
  const Vec<W> near = square_root((x > zero ? x : zero) + log1p_unit(exp(-size)));
  return x < kFarBelow<W> ? exp(x * W(0.5)) : near;
}

// The slope of sqrt_softplus at x, given its value there.
template <class W>
inline Vec<W> sqrt_softplus_slope(Vec<W> x, Vec<W> value) {
  return x < kFarBelow<W> ? value * W(0.5) : sigmoid<W>(x) / (2 * value);
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
