// What the experts' epilogues read and write of a row, a few columns at a time.
#pragma once

#include "gemm.cuh"
#include "moekernels/experts.h"

namespace moekernels::cuda {

template <class Args>
__device__ bool is_used(const Args& of, int64_t row) {
  return of.token_of == nullptr || inside(of.token_of[row], of.tokens);
}
template <class Args>
__device__ float weight_of(const Args& of, int64_t row) {
  return of.weights != nullptr ? static_cast<const float*>(of.weights)[row] : 1.0f;
}
// kChunk columns of F in a row of h [R, G], gate and up, whichever way they lie there.
template <class T>
struct HChunk {
  T *gate, *up;  // interleaved: gate alone, 2 * kChunk of both
  int64_t count;
  bool gated, interleaved, vector;

  __device__ HChunk(const ExpertsArgs& of, const void* h, int64_t row, int64_t column, bool vectors)
      : count(of.ffn - column),
        gated(is_gated(of.activation)),
        interleaved(gated && of.interleaved),
        vector(vectors) {
    T* begin = static_cast<T*>(const_cast<void*>(h)) + row * (gated ? 2 : 1) * of.ffn;
    gate = begin + (interleaved ? 2 : 1) * column;
    up = begin + of.ffn + column;
  }
  __device__ void load(float (&g)[kChunk], float (&u)[kChunk]) const {
    if (interleaved) {
      float first[kChunk], second[kChunk];
      load_chunk(first, gate, 2 * count, vector);
      load_chunk(second, gate + kChunk, 2 * count - kChunk, vector);
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        g[n] = n < kChunk / 2 ? first[2 * n] : second[2 * n - kChunk];
        u[n] = n < kChunk / 2 ? first[2 * n + 1] : second[2 * n + 1 - kChunk];
      }
    } else {
      load_chunk(g, gate, count, vector);
      if (gated) load_chunk(u, up, count, vector);
    }
  }
  __device__ void store(const float (&g)[kChunk], const float (&u)[kChunk]) const {
    if (interleaved) {
      float first[kChunk], second[kChunk];
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        first[n] = n % 2 ? u[n / 2] : g[n / 2];
        second[n] = n % 2 ? u[(kChunk + n) / 2] : g[(kChunk + n) / 2];
      }
      store_chunk(gate, first, 2 * count, vector);
      store_chunk(gate + kChunk, second, 2 * count - kChunk, vector);
    } else {
      store_chunk(gate, g, count, vector);
      if (gated) store_chunk(up, u, count, vector);
    }
  }
};

// experts_dact where da is there already (experts_act.cu).
void experts_dact_of_product(const ExpertsDActArgs& args, Stream stream);

}  // namespace moekernels::cuda
