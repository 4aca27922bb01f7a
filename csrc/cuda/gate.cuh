// What the forward and the backward of gate share: a token's logits in its team's registers,
// scores, weights.
#pragma once

#include "common/activation.cuh"
#include "common/team.cuh"
#include "common/vec.cuh"
#include "moekernels/gate.h"
#include "moekernels/score.h"

namespace moekernels::cuda {

constexpr float kTiny = 1e-20f;  // the least that a sum of scores is divided by

struct Row {
  int64_t token, experts;
  bool live;    // else it takes part in nothing but shuffles
  bool vector;  // rows begin at 16 bytes and hold whole vectors
};

template <class Tm, class T>
__device__ void load_row(const void* from, const Row& row, float (&x)[Tm::values]) {
  const T* logits = static_cast<const T*>(from) + (row.live ? row.token * row.experts : 0);
#pragma unroll
  for (int i = 0; i < Tm::values; i += Tm::width) {
    const int e = Tm::expert(i);
    if (row.vector && row.live && e < row.experts) {
      constexpr int N = 16 / sizeof(T);
#pragma unroll
      for (int j = 0; j < Tm::width; j += N) {
        const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(logits + e + j);
#pragma unroll
        for (int n = 0; n < N; ++n) x[i + j + n] = to_float(v.at[n]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tm::width; ++j) {
        x[i + j] = row.live && e + j < row.experts ? to_float(logits[e + j]) : -INFINITY;
      }
    }
  }
}

template <class Tm, class T>
__device__ void store_row(void* to, const Row& row, const float (&x)[Tm::values]) {
  T* logits = static_cast<T*>(to) + row.token * row.experts;
#pragma unroll
  for (int i = 0; i < Tm::values; i += Tm::width) {
    const int e = Tm::expert(i);
    if (row.vector && e < row.experts) {
      constexpr int N = 16 / sizeof(T);
#pragma unroll
      for (int j = 0; j < Tm::width; j += N) {
        Vec<T, N> v;
#pragma unroll
        for (int n = 0; n < N; ++n) v.at[n] = from_float<T>(x[i + j + n]);
        *reinterpret_cast<Vec<T, N>*>(logits + e + j) = v;
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tm::width; ++j) {
        if (e + j < row.experts) logits[e + j] = from_float<T>(x[i + j]);
      }
    }
  }
}

// Experts past E get -infinity.
template <class Tm>
__device__ void load_logits(const void* from, DType dtype, const Row& row, float (&x)[Tm::values]) {
  if (dtype == DType::f32) {
    load_row<Tm, float>(from, row, x);
  } else if (dtype == DType::bf16) {
    load_row<Tm, __nv_bfloat16>(from, row, x);
  } else {
    load_row<Tm, __half>(from, row, x);
  }
}

template <class Tm>
__device__ void store_logits(void* to, DType dtype, const Row& row, const float (&x)[Tm::values]) {
  if (dtype == DType::f32) {
    store_row<Tm, float>(to, row, x);
  } else if (dtype == DType::bf16) {
    store_row<Tm, __nv_bfloat16>(to, row, x);
  } else {
    store_row<Tm, __half>(to, row, x);
  }
}

template <class Tm>
__device__ float largest(const float (&x)[Tm::values], uint32_t* scratch) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < Tm::values; ++i) top = fmaxf(top, x[i]);
  return Tm::largest(top, scratch);
}

// p: softmax of x, whose largest is top; returns logsumexp.
template <class Tm>
__device__ float soften(const float (&x)[Tm::values], float top, float (&p)[Tm::values],
                        uint32_t* scratch) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) total += p[i] = expf(x[i] - top);
  total = Tm::sum(total, scratch);
  const float factor = 1.0f / total;
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) p[i] *= factor;
  return top + logf(total);
}

// What the shared formulas of scores ask of the device.
struct ScoreMath : Math {
  // Below this softplus is exp to rounding, and its square root exp(x / 2), which has a value where
  // exp itself has none.
  static constexpr float kFarBelow = -18.0f;

  __device__ static float sqrt_softplus(float x) {
    return x < kFarBelow ? expf(0.5f * x) : sqrtf(x > 20.0f ? x : log1pf(expf(x)));
  }
  // The slope of sqrt_softplus at x, given its value there.
  __device__ static float sqrt_softplus_slope(float x, float value) {
    return x < kFarBelow ? 0.5f * value : sigmoid(x) / (2 * value);
  }
};

// s: own scores of x, zero past the experts; returns their sum, at least kTiny.
template <class Tm>
__device__ float score(const float (&x)[Tm::values], GateScore kind, int64_t experts,
                       float (&s)[Tm::values], uint32_t* scratch) {
  float total = 0;
  with_own_score(kind, [&](auto own) {
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      const float value = score_of<own.value, ScoreMath>(x[i]);
      s[i] = Tm::expert(i) < experts ? value : 0.0f;
      total += s[i];
    }
  });
  total = Tm::sum(total, scratch);
  return total < kTiny ? kTiny : total;
}

// The K scores of a team's token in shared memory: from the chosen scores to the weights before
// scaling, in the order of k; returns what they were divided by.
template <class Tm>
__device__ float weigh(float* chosen, int top_k, bool soft, bool renormalize) {
  Tm::sync();
  if (soft) {
    float top = chosen[0], total = 0;
    for (int k = 1; k < top_k; ++k) top = fmaxf(top, chosen[k]);
    for (int k = 0; k < top_k; ++k) total += expf(chosen[k] - top);
    Tm::sync();
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes) chosen[k] = expf(chosen[k] - top) / total;
    Tm::sync();
  }
  if (!renormalize) return 1.0f;
  float total = 0;
  for (int k = 0; k < top_k; ++k) total += chosen[k];
  total = total < kTiny ? kTiny : total;
  Tm::sync();
  for (int k = Tm::lane(); k < top_k; k += Tm::lanes) chosen[k] /= total;
  Tm::sync();
  return total;
}

// How many of the offsets [S+1] are at most t: 0 before the first segment, S+1 behind the last.
__device__ inline int64_t offsets_up_to(const int64_t* offsets, int64_t segments, int64_t t) {
  int64_t low = 0, high = segments + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    offsets[middle] <= t ? low = middle + 1 : high = middle;
  }
  return low;
}

template <class Tm>
constexpr int kTeams = Tm::is_block     ? 1
                       : Tm::lanes <= 4 ? 64
                                        : 256 / Tm::lanes;  // tokens at once
template <class Tm>
constexpr int kGateThreads = kTeams<Tm> * Tm::lanes;

// Calls f(team) with the smallest team that holds E experts.
template <class F>
void with_team(int64_t experts, const F& f) {
  if (experts <= 8) return f(Team<1, 8>{});
  if (experts <= 16) return f(Team<2, 8>{});
  if (experts <= 32) return f(Team<4, 8>{});
  if (experts <= 64) return f(Team<8, 8>{});
  if (experts <= 128) return f(Team<16, 8>{});
  if (experts <= 256) return f(Team<32, 8>{});
  if (experts <= 512) return f(Team<32, 16>{});
  if (experts <= 1024) return f(Team<32, 32>{});
  if (experts <= 2048) return f(Team<128, 16>{});
  f(Team<128, 32>{});
}

}  // namespace moekernels::cuda
