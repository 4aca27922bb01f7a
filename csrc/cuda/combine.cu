// Bound by memory: every row is read once, a token's sum stays in registers, in the order of k.
#include "combine.cuh"
#include "sm90/entry.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = kCombineThreads, kWarps = kCombineWarps;

template <class T, int N, bool weighted>
__global__ void __launch_bounds__(kThreads) combine_tokens(const CombineArgs args) {
  combine_vector<T, N, weighted>(args);
}

// drow = weight * dout and dweight = <dout, row>, a warp for each choice.
template <class T, int N>
__device__ void backward_slot(const CombineBackwardArgs& args, int64_t slot) {
  using V = Vec<T, N>;
  const int64_t t = slot / args.top_k, r = args.row_of[slot], vectors = args.hidden / N;
  float dot = 0;
  if (inside(r, args.num_rows)) {
    // One warp writes a row whatever row_of holds: the last choice of the token that the row names.
    bool owner = args.token_of[r] == t;
    for (int64_t s = slot + 1; s < (t + 1) * args.top_k; ++s) owner = owner && args.row_of[s] != r;
    const float weight = static_cast<const float*>(args.weights)[slot];
    const V* dout = reinterpret_cast<const V*>(static_cast<const T*>(args.dout) + t * args.hidden);
    const V* row = reinterpret_cast<const V*>(static_cast<const T*>(args.rows) + r * args.hidden);
    V* drow = reinterpret_cast<V*>(static_cast<T*>(args.drows) + r * args.hidden);
    for (int64_t i = lane_id(); i < vectors; i += kWarp) {
      const V d = dout[i], v = row[i];
      V scaled;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dot = fmaf(to_float(d.at[n]), to_float(v.at[n]), dot);
        scaled.at[n] = from_float<T>(to_float(d.at[n]) * weight);
      }
      if (owner) drow[i] = scaled;
    }
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) static_cast<float*>(args.dweights)[slot] = dot;
}

// Zeroes a row that no choice of its token claims.
template <class T, int N>
__device__ void clear_row(const CombineBackwardArgs& args, int64_t r) {
  const int64_t t = args.token_of[r];
  if (inside(t, args.tokens)) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      if (args.row_of[t * args.top_k + k] == r) return;
    }
  }
  Vec<T, N> zero;
#pragma unroll
  for (int n = 0; n < N; ++n) zero.at[n] = from_float<T>(0.0f);
  Vec<T, N>* drow = reinterpret_cast<Vec<T, N>*>(static_cast<T*>(args.drows) + r * args.hidden);
  for (int64_t i = lane_id(); i < args.hidden / N; i += kWarp) drow[i] = zero;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_backward_slots(const CombineBackwardArgs args) {
  const int64_t warp = warp_of_grid(), slots = args.tokens * args.top_k;
  if (warp < slots) {
    backward_slot<T, N>(args, warp);
  } else if (warp - slots < args.num_rows) {
    clear_row<T, N>(args, warp - slots);
  }
}

}  // namespace

void combine(const CombineArgs& args, Stream stream) {
  if constexpr (sm90::kBuilt) {
    if (sm90::combine(args, stream)) return;
  }
  with_combine(args, [&](auto* type, bool vector, int64_t blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    auto kernel = args.weights ? vector ? combine_tokens<T, N, true> : combine_tokens<T, 1, true>
                  : vector     ? combine_tokens<T, N, false>
                               : combine_tokens<T, 1, false>;
    launch("combine", kernel, blocks, kThreads, 0, stream, args);
  });
}

void combine_backward(const CombineBackwardArgs& args, Stream stream) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vector = aligned16(args.dout, args.rows, args.drows, args.hidden * sizeof(T));
    const int64_t blocks = ceil_div(args.tokens * args.top_k + args.num_rows, kWarps);
    launch("combine_backward", vector ? combine_backward_slots<T, N> : combine_backward_slots<T, 1>,
           blocks, kThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
