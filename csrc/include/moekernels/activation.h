// The experts' nonlinearities, forward and backward, in terms of three functions that each backend
// has of its own: a Math type with static exp, erf and sigmoid over V. V is a number or a vector of
// them, S its element. Plain functions, so that the CPU kernels and the epilogues of every CUDA
// kernel compute the same formulas.
#pragma once

#include "moekernels/experts.h"

namespace moekernels {

// value and slope of a function of the gate alone, act(gate).
template <class V>
struct Curve {
  V value, slope;
};

// a = act(g, u), and the partial derivatives for g and u. Ungated forms ignore u.
template <class V>
struct Activated {
  V a, by_gate, by_up;
};

template <class V, class S>
MOEKERNELS_BOTH inline V at_most(V x, S limit) {
  return x > limit ? V{} + limit : x;
}
template <class V, class S>
MOEKERNELS_BOTH inline V clamp(V x, S limit) {
  return x < -limit ? V{} - limit : at_most(x, limit);
}

template <class Math, class S, class V>
MOEKERNELS_BOTH inline Curve<V> silu_curve(V g, S alpha) {
  const V s = Math::sigmoid(alpha * g), value = g * s;
  return {value, s + alpha * value * (S(1) - s)};
}
template <class Math, class S, class V>
MOEKERNELS_BOTH inline Curve<V> gelu_curve(V g) {
  const V cdf = S(0.5) * (S(1) + Math::erf(g * S(0.70710678118654752440)));
  const V pdf = S(0.39894228040143267794) * Math::exp(S(-0.5) * g * g);
  return {g * cdf, cdf + g * pdf};
}
template <class S, class V>
MOEKERNELS_BOTH inline Curve<V> relu_curve(V g) {
  return {g <= S(0) ? V{} : g, g <= S(0) ? V{} : V{} + S(1)};  // NaN stays NaN
}
template <class V>
MOEKERNELS_BOTH inline Activated<V> gated(Curve<V> c, V up) {
  return {c.value * up, c.slope * up, c.value};
}

template <Activation kind, class Math, class S, class V>
MOEKERNELS_BOTH inline Activated<V> activate(V g, V u, S alpha, S limit) {
  if constexpr (kind == Activation::swiglu) {
    return gated(silu_curve<Math>(g, S(1)), u);
  } else if constexpr (kind == Activation::geglu) {
    return gated(gelu_curve<Math, S>(g), u);
  } else if constexpr (kind == Activation::reglu) {
    return gated(relu_curve<S>(g), u);
  } else if constexpr (kind == Activation::swiglu_oai || kind == Activation::swiglu_clamped) {
    constexpr bool oai = kind == Activation::swiglu_oai;
    const V up = clamp(u, limit) + S(oai ? 1 : 0);
    Activated<V> out = gated(silu_curve<Math>(at_most(g, limit), oai ? alpha : S(1)), up);
    out.by_gate = g > limit ? V{} : out.by_gate;
    out.by_up = u > limit ? V{} : (u < -limit ? V{} : out.by_up);
    return out;
  } else if constexpr (kind == Activation::relu2) {
    const V r = relu_curve<S>(g).value;
    return {r * r, S(2) * r, V{}};
  } else {
    const Curve<V> c =
        kind == Activation::silu ? silu_curve<Math>(g, S(1)) : gelu_curve<Math, S>(g);
    return {c.value, c.slope, V{}};
  }
}

template <Activation kind>
struct ActivationConstant {
  static constexpr Activation value = kind;
};

// Calls f with the activation as a compile-time constant, f(ActivationConstant<kind>{}).
template <class F>
MOEKERNELS_BOTH inline void with_activation(Activation kind, const F& f) {
#define MOEKERNELS_CASE(name) \
  case Activation::name: return f(ActivationConstant<Activation::name>{});
  switch (kind) { MOEKERNELS_ACTIVATIONS(MOEKERNELS_CASE) }
#undef MOEKERNELS_CASE
}

}  // namespace moekernels
