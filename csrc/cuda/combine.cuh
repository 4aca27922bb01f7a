// What a warp of combine does: it sums one vector a lane; the warps of a token lie side by side.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "common/warp.cuh"
#include "moekernels/combine.h"

namespace moekernels::cuda {

constexpr int kCombineThreads = 256;
constexpr int kCombineWarps = kCombineThreads / kWarp;
constexpr int kCombineAtOnce = 4;  // loads under way before the first is added

template <class T, int N, bool weighted>
__device__ __forceinline__ void combine_vector(const CombineArgs& args) {
  const int64_t vectors = args.hidden / N, warps = (vectors + kWarp - 1) / kWarp;
  const int64_t warp = warp_of_grid(), t = warps == 1 ? warp : warp / warps;
  const int64_t i = (warp - t * warps) * kWarp + lane_id();
  if (t >= args.tokens || i >= vectors) return;
  using V = Vec<T, N>;
  const int32_t* row_of = args.row_of + t * args.top_k;
  const float* weights = static_cast<const float*>(args.weights) + (weighted ? t * args.top_k : 0);
  float total[N] = {};
  for (int64_t k = 0; k < args.top_k; k += kCombineAtOnce) {
    V parts[kCombineAtOnce];
    bool used[kCombineAtOnce];
#pragma unroll
    for (int u = 0; u < kCombineAtOnce; ++u) {
      const int64_t r = k + u < args.top_k ? row_of[k + u] : -1;
      used[u] = inside(r, args.num_rows);
      if (used[u])
        parts[u] =
            reinterpret_cast<const V*>(static_cast<const T*>(args.rows) + r * args.hidden)[i];
    }
#pragma unroll
    for (int u = 0; u < kCombineAtOnce; ++u) {
      if (!used[u]) continue;
      const float weight = weighted ? weights[k + u] : 1.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float part = to_float(parts[u].at[n]);
        total[n] = weighted ? fmaf(part, weight, total[n]) : total[n] + part;
      }
    }
  }
  V out;
#pragma unroll
  for (int n = 0; n < N; ++n) out.at[n] = from_float<T>(total[n]);
  reinterpret_cast<V*>(static_cast<T*>(args.out) + t * args.hidden)[i] = out;
}

// Calls f(null pointer of the dtype's type, whether 16 bytes at once are aligned, blocks).
template <class F>
void with_combine(const CombineArgs& args, const F& f) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vector = aligned16(args.rows, args.out, args.hidden * sizeof(T));
    const int64_t vectors = vector ? args.hidden / N : args.hidden;
    f(type, vector, ceil_div(args.tokens * ceil_div(vectors, kWarp), kCombineWarps));
  });
}

}  // namespace moekernels::cuda
