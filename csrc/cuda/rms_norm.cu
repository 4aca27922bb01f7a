// Bound by memory: a warp reads its row once from there, and again from the caches.
#include "moekernels/rms_norm.h"

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "common/warp.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T, int N>
__device__ const Vec<T, N>* row_of(const void* rows, int64_t r, int64_t hidden) {
  return reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(rows) + r * hidden);
}
template <class T, int N>
__device__ Vec<T, N>* row_of(void* rows, int64_t r, int64_t hidden) {
  return reinterpret_cast<Vec<T, N>*>(static_cast<T*>(rows) + r * hidden);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) rms_norm_rows(const RmsNormArgs args) {
  using V = Vec<T, N>;
  const int64_t r = warp_of_grid(), vectors = args.hidden / N;
  if (r >= args.num_rows) return;
  const V* x = row_of<T, N>(args.x, r, args.hidden);
  const V* weight = static_cast<const V*>(args.weight);
  float squares = 0;
  for (int64_t i = lane_id(); i < vectors; i += kWarp) {
    V v = x[i];
    if (args.added != nullptr) {
      const V a = row_of<T, N>(args.added, r, args.hidden)[i];
#pragma unroll
      for (int n = 0; n < N; ++n) v.at[n] = from_float<T>(to_float(v.at[n]) + to_float(a.at[n]));
      row_of<T, N>(args.sum, r, args.hidden)[i] = v;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) squares = fmaf(to_float(v.at[n]), to_float(v.at[n]), squares);
  }
  const float mean = warp_sum(squares) / static_cast<float>(args.hidden);
  const float rstd = 1.0f / sqrtf(mean + static_cast<float>(args.eps));
  if (lane_id() == 0) static_cast<float*>(args.rstd)[r] = rstd;
  // A lane reads of the sum what it has written itself.
  const V* row = args.added != nullptr ? row_of<T, N>(args.sum, r, args.hidden) : x;
  V* y = row_of<T, N>(args.y, r, args.hidden);
  for (int64_t i = lane_id(); i < vectors; i += kWarp) {
    const V v = row[i], w = weight[i];
    V out;
#pragma unroll
    for (int n = 0; n < N; ++n)
      out.at[n] = from_float<T>(to_float(v.at[n]) * rstd * to_float(w.at[n]));
    y[i] = out;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_rows(const RmsNormBackwardArgs args) {
  using V = Vec<T, N>;
  const int64_t r = warp_of_grid(), vectors = args.hidden / N;
  if (r >= args.num_rows) return;
  const V* x = row_of<T, N>(args.x, r, args.hidden);
  const V* dy = row_of<T, N>(args.dy, r, args.hidden);
  const V* weight = static_cast<const V*>(args.weight);
  const float rstd = static_cast<const float*>(args.rstd)[r];
  float dot = 0;
  for (int64_t i = lane_id(); i < vectors; i += kWarp) {
    const V v = x[i], d = dy[i], w = weight[i];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float product = to_float(d.at[n]) * (to_float(v.at[n]) * rstd);
      dot = fmaf(product, to_float(w.at[n]), dot);
    }
  }
  const float mean = warp_sum(dot) / static_cast<float>(args.hidden);
  V* dx = row_of<T, N>(args.dx, r, args.hidden);
  for (int64_t i = lane_id(); i < vectors; i += kWarp) {
    const V v = x[i], d = dy[i], w = weight[i];
    V s{}, out;
    if (args.dsum != nullptr) s = row_of<T, N>(args.dsum, r, args.hidden)[i];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float hat = to_float(v.at[n]) * rstd;
      float g = (to_float(d.at[n]) * to_float(w.at[n]) - hat * mean) * rstd;
      if (args.dsum != nullptr) g += to_float(s.at[n]);
      out.at[n] = from_float<T>(g);
    }
    dx[i] = out;
  }
}

// A thread sums a column of a piece of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_dweight_parts(const RmsNormBackwardArgs args) {
  const int64_t blocks = (args.hidden + kThreads - 1) / kThreads, piece = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x - piece * blocks) * kThreads + threadIdx.x;
  if (column >= args.hidden) return;
  const int64_t begin = piece * kRmsNormPiece;
  const int64_t end = begin + kRmsNormPiece < args.num_rows ? begin + kRmsNormPiece : args.num_rows;
  float total = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * args.hidden + column;
    const float hat =
        to_float(static_cast<const T*>(args.x)[at]) * static_cast<const float*>(args.rstd)[r];
    total = fmaf(to_float(static_cast<const T*>(args.dy)[at]), hat, total);
  }
  static_cast<float*>(args.parts)[piece * args.hidden + column] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_dweight(const RmsNormBackwardArgs args) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= args.hidden) return;
  const int64_t pieces = (args.num_rows + kRmsNormPiece - 1) / kRmsNormPiece;
  float total = 0;
  for (int64_t i = 0; i < pieces; ++i)
    total += static_cast<const float*>(args.parts)[i * args.hidden + column];
  static_cast<T*>(args.dweight)[column] = from_float<T>(total);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream stream) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vector =
        aligned16(args.x, args.added, args.sum, args.weight, args.y, args.hidden * sizeof(T));
    launch("rms_norm", vector ? rms_norm_rows<T, N> : rms_norm_rows<T, 1>,
           ceil_div(args.num_rows, kWarps), kThreads, 0, stream, args);
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, Stream stream) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vector =
        aligned16(args.dy, args.dsum, args.x, args.weight, args.dx, args.hidden * sizeof(T));
    launch("rms_norm_backward",
           vector ? rms_norm_backward_rows<T, N> : rms_norm_backward_rows<T, 1>,
           ceil_div(args.num_rows, kWarps), kThreads, 0, stream, args);
    const int64_t blocks = ceil_div(args.hidden, kThreads);
    launch("rms_norm_dweight_parts", rms_norm_dweight_parts<T>,
           rms_norm_pieces(args.num_rows) * blocks, kThreads, 0, stream, args);
    launch("rms_norm_dweight", rms_norm_dweight<T>, blocks, kThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
