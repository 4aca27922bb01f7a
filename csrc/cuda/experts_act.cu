// The experts' nonlinearity alone, forward and backward, bound by memory: for products in FP8,
// whose operands are quantized in between.
#include "common/activation.cuh"
#include "common/launch.cuh"
#include "mma/h_chunk.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 256, kPartLanes = kDWeightsColumns / kChunk;

// A thread has kChunk columns of F in a row; a part of <da, a> is kPartLanes neighbours'.
struct Chunk {
  int64_t row, column;
  __device__ explicit Chunk(int64_t ffn) {
    const int64_t of_row = experts_dweights_parts(ffn) * kPartLanes;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    row = index / of_row;
    column = (index - row * of_row) * kChunk;
  }
};
int64_t blocks_of(const ExpertsArgs& of) {
  return ceil_div(of.num_rows * experts_dweights_parts(of.ffn) * kPartLanes, kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads) activation_of(const ExpertsActArgs args, bool vector) {
  const ExpertsArgs& of = args.of;
  const Chunk at(of.ffn);
  if (at.row >= of.num_rows || at.column >= of.ffn) return;
  float gate[kChunk], up[kChunk] = {}, a[kChunk];
  HChunk<T>(of, args.h, at.row, at.column, vector).load(gate, up);
  with_activation(of.activation, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      a[i] = activate<decltype(kind)::value>(gate[i], up[i], static_cast<float>(of.alpha),
                                             static_cast<float>(of.limit))
                 .a;
    }
  });
  store_chunk(static_cast<T*>(args.a) + at.row * of.ffn + at.column, a, of.ffn - at.column, vector);
}

// Rows that no expert has, or no token, have a da of zeros.
template <class T>
__global__ void __launch_bounds__(kThreads)
    activation_gradient_of(const ExpertsDActArgs args, bool vector) {
  const ExpertsArgs& of = args.of;
  const Chunk at(of.ffn);
  const bool exists = at.row < of.num_rows && at.column < of.ffn;
  const bool used = exists && is_used(of, at.row) && at.row < of.offsets[of.experts];
  float dot = 0;
  if (exists) {
    float dgate[kChunk] = {}, dup[kChunk] = {}, weighted[kChunk] = {};
    const int64_t place = at.row * of.ffn + at.column, left = of.ffn - at.column;
    if (used) {
      float gate[kChunk], up[kChunk] = {}, da[kChunk];
      HChunk<T>(of, args.h, at.row, at.column, vector).load(gate, up);
      load_chunk(da, static_cast<const T*>(args.da) + place, left, vector);
      const float weight = weight_of(of, at.row);
      with_activation(of.activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const auto act = activate<decltype(kind)::value>(
              gate[i], up[i], static_cast<float>(of.alpha), static_cast<float>(of.limit));
          dot = fmaf(da[i], i < left ? act.a : 0.0f, dot);
          dgate[i] = da[i] * weight * act.by_gate;
          dup[i] = da[i] * weight * act.by_up;
          weighted[i] = weight * act.a;
        }
      });
    }
    HChunk<T>(of, args.dh, at.row, at.column, vector).store(dgate, dup);
    if (args.weighted_a != nullptr)
      store_chunk(static_cast<T*>(args.weighted_a) + place, weighted, left, vector);
  }
  if (args.dweights_parts == nullptr) return;
#pragma unroll
  for (int step = kPartLanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
  const int64_t part = at.column / kDWeightsColumns;
  if (exists && at.column % kDWeightsColumns == 0) {
    static_cast<float*>(args.dweights_parts)[at.row * experts_dweights_parts(of.ffn) + part] = dot;
  }
}

}  // namespace

void experts_act(const ExpertsActArgs& args, Stream stream) {
  with_type(args.of.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vector = aligned16(args.h, args.a, args.of.ffn * sizeof(T));
    launch("experts_act", activation_of<T>, blocks_of(args.of), kThreads, 0, stream, args, vector);
  });
}

void experts_dact_of_product(const ExpertsDActArgs& args, Stream stream) {
  with_type(args.of.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vector =
        aligned16(args.h, args.dh, args.da, args.weighted_a, args.of.ffn * sizeof(T));
    launch("experts_dact_of_product", activation_gradient_of<T>, blocks_of(args.of), kThreads, 0,
           stream, args, vector);
  });
}

}  // namespace moekernels::cuda
