// The experts' nonlinearities on vectors, forward and backward.
#pragma once

#include "moekernels/experts.h"
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

template <class S>
inline Vec<S> normal_cdf(Vec<S> x) {
  return S(0.5) * (S(1) + erf(x * S(0.70710678118654752440)));
}
template <class S>
inline Vec<S> at_most(Vec<S> x, S limit) {
  return x > limit ? splat(limit) : x;
}
template <class S>
inline Vec<S> clamp(Vec<S> x, S limit) {
  return x < -limit ? splat(-limit) : at_most(x, limit);
}

// value and slope of a function of the gate alone, act(gate).
template <class S>
struct Curve {
  Vec<S> value, slope;
};

template <class S>
inline Curve<S> silu_curve(Vec<S> g, S alpha) {
  const Vec<S> s = sigmoid<S>(alpha * g);
  return {g * s, s * (S(1) + alpha * g * (S(1) - s))};
}
template <class S>
inline Curve<S> gelu_curve(Vec<S> g) {
  const Vec<S> cdf = normal_cdf<S>(g);
  const Vec<S> pdf = S(0.39894228040143267794) * exp(S(-0.5) * g * g);
  return {g * cdf, cdf + g * pdf};
}
template <class S>
inline Curve<S> relu_curve(Vec<S> g) {
  return {g > S(0) ? g : Vec<S>{}, g > S(0) ? splat(S(1)) : Vec<S>{}};
}

// a = act(g, u), and the partial derivatives for g and u. Ungated forms ignore u.
template <class S>
struct Activated {
  Vec<S> a, by_gate, by_up;
};

template <class S, Activation kind>
inline Activated<S> activate(Vec<S> g, Vec<S> u, S alpha, S limit) {
  const auto gated = [](Curve<S> c, Vec<S> up) { return Activated<S>{c.value * up, c.slope * up, c.value}; };
  if constexpr (kind == Activation::swiglu) {
    return gated(silu_curve<S>(g, S(1)), u);
  } else if constexpr (kind == Activation::geglu) {
    return gated(gelu_curve<S>(g), u);
  } else if constexpr (kind == Activation::reglu) {
    return gated(relu_curve<S>(g), u);
  } else if constexpr (kind == Activation::swiglu_oai || kind == Activation::swiglu_clamped) {
    constexpr bool oai = kind == Activation::swiglu_oai;
    const Vec<S> up = clamp<S>(u, limit) + S(oai ? 1 : 0);
    Activated<S> out = gated(silu_curve<S>(at_most<S>(g, limit), oai ? alpha : S(1)), up);
    out.by_gate = g > limit ? Vec<S>{} : out.by_gate;
    out.by_up = u > limit ? Vec<S>{} : (u < -limit ? Vec<S>{} : out.by_up);
    return out;
  } else if constexpr (kind == Activation::relu2) {
    const Vec<S> r = relu_curve<S>(g).value;
    return {r * r, S(2) * r, Vec<S>{}};
  } else {
    const Curve<S> c = kind == Activation::silu ? silu_curve<S>(g, S(1)) : gelu_curve<S>(g);
    return {c.value, c.slope, Vec<S>{}};
  }
}

// Calls f with the activation as a compile-time constant.
template <class F>
inline void with_activation(Activation kind, const F& f) {
  using A = Activation;
  switch (kind) {
    case A::swiglu: return f(std::integral_constant<A, A::swiglu>{});
    case A::geglu: return f(std::integral_constant<A, A::geglu>{});
    case A::reglu: return f(std::integral_constant<A, A::reglu>{});
    case A::swiglu_oai: return f(std::integral_constant<A, A::swiglu_oai>{});
    case A::swiglu_clamped: return f(std::integral_constant<A, A::swiglu_clamped>{});
    case A::relu2: return f(std::integral_constant<A, A::relu2>{});
    case A::silu: return f(std::integral_constant<A, A::silu>{});
    case A::gelu: return f(std::integral_constant<A, A::gelu>{});
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
