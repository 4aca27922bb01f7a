// One tile of C = A B by a thread block, on every device: copies into a ring of three stages run
// while the tensor cores (fp32: the fma units, or tf32 tensor cores) work on the stage before. C is
// left in shared memory as fp32, so that epilogues are short loops over whole vectors of a row.
#pragma once

#include "common/vec.cuh"
#include "common/warp.cuh"
#include "mma.cuh"
#include "moekernels/gemm_tiles.h"

namespace moekernels::cuda {

constexpr int kGemmStages = 3;

// Square tiles of 64 (4 warps of 32x32) or 128 (8 warps of 64x32).
template <class T, int tile>
struct GemmShape {
  static constexpr int kDepth = 64 / sizeof(T);   // k of a stage
  static constexpr int kVector = 16 / sizeof(T);  // elements of a copy
  static constexpr int kWarpsM = 2, kWarpsN = tile / 32, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMs = tile / kWarpsM / 16, kNs = 4;  // products of 16x8 in a warp
  static constexpr int kCopies = tile * kDepth / kVector / kThreads;
  static constexpr int kPitchC = tile + 8;
};

// How a tile of an operand lies in shared memory; the pitches keep the reads of a warp free of bank
// conflicts.
template <class T, int tile, bool k_contiguous>
struct OperandTile {
  using Shape = GemmShape<T, tile>;
  static constexpr int kPitch = k_contiguous ? Shape::kDepth + Shape::kVector : tile + 8;
  static constexpr int kElements = (k_contiguous ? tile : Shape::kDepth) * kPitch;
  __device__ static int at(int line, int k) {
    return k_contiguous ? line * kPitch + k : k * kPitch + line;
  }
};

template <class T, int tile, bool a_k, bool b_k>
constexpr int64_t kGemmShared = [] {
  constexpr int64_t stages =
      kGemmStages * (OperandTile<T, tile, a_k>::kElements + OperandTile<T, tile, b_k>::kElements) *
      sizeof(T);
  constexpr int64_t c = tile * GemmShape<T, tile>::kPitchC * sizeof(float);
  return stages > c ? stages : c;
}();

// An operand in global memory: `lines` (rows of A, columns of B) times k. k_contiguous: element
// (line, k) is at data[line * ld + k], else at data[k * ld + line].
template <class T>
struct OperandSource {
  const T* data;
  int64_t ld;
  TileColumns lines;
  int64_t depth;
  bool vector;  // every vector of 16 bytes lies on 16 bytes, and wholly inside or outside
  const int32_t* token_of =
      nullptr;  // wgrad: k is a row, which counts as zero where its token is outside [0, tokens)
  int64_t tokens = 0;
};

// The part of an operand that a thread copies, stage after stage.
template <class T, int tile, bool k_contiguous>
class OperandCopy {
  using Shape = GemmShape<T, tile>;
  using Tile = OperandTile<T, tile, k_contiguous>;
  static constexpr int kPerLine = (k_contiguous ? Shape::kDepth : tile) / Shape::kVector;

  const OperandSource<T> source_;
  const T* from_[Shape::kCopies];
  int valid_[Shape::kCopies];  // elements that lie on lines which exist
  int64_t k_ = 0;

 public:
  __device__ explicit OperandCopy(const OperandSource<T>& source) : source_(source) {
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      const int copy = threadIdx.x + i * Shape::kThreads;
      const int major = copy / kPerLine, minor = copy % kPerLine * Shape::kVector;
      const int line = k_contiguous ? major : minor, k = k_contiguous ? minor : major;
      const int lines_left = static_cast<int>(source.lines.valid(line, Shape::kVector));
      valid_[i] = k_contiguous ? (lines_left > 0 ? Shape::kVector : 0) : lines_left;
      from_[i] = source.data + (k_contiguous ? source.lines.at(line) * source.ld + k
                                             : k * source.ld + source.lines.at(line));
    }
  }

  // Begins the copy of the next stage.
  __device__ void next(T* stage) {
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      const int copy = threadIdx.x + i * Shape::kThreads;
      const int major = copy / kPerLine, minor = copy % kPerLine * Shape::kVector;
      const int64_t left = source_.depth - k_ - (k_contiguous ? minor : major);
      int count = left <= 0 ? 0 : valid_[i];
      if (k_contiguous && left > 0 && left < count) count = static_cast<int>(left);
      if constexpr (!k_contiguous) {
        if (source_.token_of != nullptr && count > 0 &&
            !inside(source_.token_of[k_ + major], source_.tokens))
          count = 0;
      }
      T* to = stage + major * Tile::kPitch + minor;
      if (source_.vector) {
        copy_async(to, count > 0 ? from_[i] : source_.data, count * static_cast<int>(sizeof(T)));
      } else {
        Vec<T, Shape::kVector> v;
#pragma unroll
        for (int n = 0; n < Shape::kVector; ++n)
          v.at[n] = n < count ? from_[i][n] : from_float<T>(0.0f);
        *reinterpret_cast<Vec<T, Shape::kVector>*>(to) = v;
      }
      from_[i] += k_contiguous ? Shape::kDepth : Shape::kDepth * source_.ld;
    }
    k_ += Shape::kDepth;
  }
};

template <class T, int tile>
using Accumulators = float[GemmShape<T, tile>::kMs][GemmShape<T, tile>::kNs][4];

// acc += A B of one stage, 16-bit elements.
template <class T, int tile, bool a_k, bool b_k>
__device__ void multiply_stage(Accumulators<T, tile>& acc, const T* a, const T* b, int row,
                               int column, bool) {
  using Shape = GemmShape<T, tile>;
  const int lane = lane_id(), eight = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < Shape::kDepth; k += 16) {
    uint32_t right[Shape::kNs / 2][4];
#pragma unroll
    for (int j = 0; j < Shape::kNs / 2; ++j) {
      // Matrices: columns 0..7 with k 0..7 and 8..15, then columns 8..15.
      load_matrices<!b_k>(
          right[j], b + OperandTile<T, tile, b_k>::at(column + j * 16 + third + (b_k ? eight : 0),
                                                      k + second + (b_k ? 0 : eight)));
    }
#pragma unroll
    for (int i = 0; i < Shape::kMs; ++i) {
      // Matrices: k 0..7 with rows 0..7 and 8..15, then k 8..15.
      uint32_t left[4];
      load_matrices<!a_k>(
          left, a + OperandTile<T, tile, a_k>::at(row + i * 16 + second + (a_k ? eight : 0),
                                                  k + third + (a_k ? 0 : eight)));
#pragma unroll
      for (int j = 0; j < Shape::kNs; ++j) multiply(acc[i][j], left, &right[j / 2][j % 2 * 2], T{});
    }
  }
}

// The same of fp32 elements, with the accumulators where the tensor cores have them.
template <class T, int tile, bool a_k, bool b_k>
__device__ void multiply_stage_f32(Accumulators<T, tile>& acc, const T* a, const T* b, int row,
                                   int column, bool tf32) {
  using Shape = GemmShape<T, tile>;
  const int g = lane_id() / 4, q = lane_id() % 4;
  const auto left_at = [&](int line, int k) {
    return a[OperandTile<T, tile, a_k>::at(row + line, k)];
  };
  const auto right_at = [&](int line, int k) {
    return b[OperandTile<T, tile, b_k>::at(column + line, k)];
  };
  if (tf32) {
#pragma unroll
    for (int k = 0; k < Shape::kDepth; k += 8) {
      uint32_t right[Shape::kNs][2];
#pragma unroll
      for (int j = 0; j < Shape::kNs; ++j) {
        right[j][0] = to_tf32(right_at(j * 8 + g, k + q));
        right[j][1] = to_tf32(right_at(j * 8 + g, k + q + 4));
      }
#pragma unroll
      for (int i = 0; i < Shape::kMs; ++i) {
        uint32_t left[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          left[n] = to_tf32(left_at(i * 16 + g + n % 2 * 8, k + q + n / 2 * 4));
#pragma unroll
        for (int j = 0; j < Shape::kNs; ++j) multiply_tf32(acc[i][j], left, right[j]);
      }
    }
    return;
  }
#pragma unroll 2
  for (int k = 0; k < Shape::kDepth; ++k) {
    float left[Shape::kMs][2], right[Shape::kNs][2];
#pragma unroll
    for (int i = 0; i < Shape::kMs; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n) left[i][n] = left_at(i * 16 + g + n * 8, k);
#pragma unroll
    for (int j = 0; j < Shape::kNs; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) right[j][n] = right_at(j * 8 + q * 2 + n, k);
#pragma unroll
    for (int i = 0; i < Shape::kMs; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kNs; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          acc[i][j][n] = fmaf(left[i][n / 2], right[j][n % 2], acc[i][j][n]);
  }
}

// C [tile, tile] in `shared` (pitch GemmShape::kPitchC), of all threads of the block; returns
// behind a barrier.
template <class T, int tile, bool a_k, bool b_k>
__device__ const float* multiply_tile(char* shared, const OperandSource<T>& a,
                                      const OperandSource<T>& b, bool tf32) {
  using Shape = GemmShape<T, tile>;
  constexpr int kA = OperandTile<T, tile, a_k>::kElements,
                kStage = kA + OperandTile<T, tile, b_k>::kElements;
  T* stages = reinterpret_cast<T*>(shared);
  const int warp = threadIdx.x / 32, row = warp / Shape::kWarpsN * (tile / Shape::kWarpsM);
  const int column = warp % Shape::kWarpsN * 32;
  const int64_t steps = tile_count(a.depth, Shape::kDepth);
  OperandCopy<T, tile, a_k> copy_a(a);
  OperandCopy<T, tile, b_k> copy_b(b);
  Accumulators<T, tile> acc = {};
#pragma unroll
  for (int s = 0; s < kGemmStages - 1; ++s) {
    if (s < steps) {
      copy_a.next(stages + s * kStage);
      copy_b.next(stages + s * kStage + kA);
    }
    commit_copies();
  }
  int now = 0, later = kGemmStages - 1;
  for (int64_t s = 0; s < steps; ++s) {
    wait_for_copies<kGemmStages - 2>();
    __syncthreads();  // this stage has landed for all; all have read the one that is filled next
    if (s + kGemmStages - 1 < steps) {
      copy_a.next(stages + later * kStage);
      copy_b.next(stages + later * kStage + kA);
    }
    commit_copies();
    const T *left = stages + now * kStage, *right = left + kA;
    if constexpr (sizeof(T) == 2) {
      multiply_stage<T, tile, a_k, b_k>(acc, left, right, row, column, tf32);
    } else {
      multiply_stage_f32<T, tile, a_k, b_k>(acc, left, right, row, column, tf32);
    }
    now = now + 1 == kGemmStages ? 0 : now + 1;
    later = later + 1 == kGemmStages ? 0 : later + 1;
  }
  wait_for_copies<0>();
  __syncthreads();  // the stages become C
  float* c = reinterpret_cast<float*>(shared);
  const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < Shape::kMs; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kNs; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(c + (row + i * 16 + g + half * 8) * Shape::kPitchC + column +
                                   j * 8 + q * 2) =
            make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
  __syncthreads();
  return c;
}

// Four elements of a row at a time, the first `count` of them; `vector`: the address is that of a
// vector.
constexpr int kChunk = 4;

template <class T>
__device__ void load_chunk(float (&v)[kChunk], const T* from, int64_t count, bool vector) {
  if (vector && count >= kChunk) {
    const Vec<T, kChunk> whole = *reinterpret_cast<const Vec<T, kChunk>*>(from);
#pragma unroll
    for (int n = 0; n < kChunk; ++n) v[n] = to_float(whole.at[n]);
  } else {
#pragma unroll
    for (int n = 0; n < kChunk; ++n) v[n] = n < count ? to_float(from[n]) : 0.0f;
  }
}
template <class T>
__device__ void store_chunk(T* to, const float (&v)[kChunk], int64_t count, bool vector) {
  if (vector && count >= kChunk) {
    Vec<T, kChunk> whole;
#pragma unroll
    for (int n = 0; n < kChunk; ++n) whole.at[n] = from_float<T>(v[n]);
    *reinterpret_cast<Vec<T, kChunk>*>(to) = whole;
  } else {
#pragma unroll
    for (int n = 0; n < kChunk; ++n)
      if (n < count) to[n] = from_float<T>(v[n]);
  }
}

// Calls f(row, column) for every chunk of a tile of `columns` columns; the lanes of a warp stay
// together.
template <class T, int tile, int columns, class F>
__device__ void for_chunks(const F& f) {
  constexpr int kPerRow = columns / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile * kPerRow; i += GemmShape<T, tile>::kThreads)
    f(i / kPerRow, i % kPerRow * kChunk);
}

}  // namespace moekernels::cuda
