// Bound by memory: a warp for each block of a row, which its lanes hold four numbers of; a thread
// block for each tile of 128 x 128, which is turned in shared memory.
#include "moekernels/quantize.h"

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "common/warp.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kOfLane = static_cast<int>(kScaleBlock) / kWarp;  // neighbouring columns of a lane
constexpr int kRowsOfWarp = static_cast<int>(kScaleBlock) / kWarps;

__device__ inline uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// `count` of a lane's columns exist.
template <class T>
__device__ inline void load_lane(float (&v)[kOfLane], const T* from, int64_t count, bool vector) {
  if (vector && count >= kOfLane) {
    const auto all = *reinterpret_cast<const Vec<T, kOfLane>*>(from);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) v[i] = to_float(all.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

__device__ inline void store_lane(uint8_t* to, uint32_t codes, int64_t count, bool vector) {
  if (vector && count >= kOfLane) {
    *reinterpret_cast<uint32_t*>(to) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (i < count) to[i] = static_cast<uint8_t>(codes >> (8 * i));
    }
  }
}

struct Scaling {
  float scale, inverse;

  // Of a block by the bits of its largest magnitude, in which a NaN is more than an infinity.
  __device__ explicit Scaling(uint32_t bits) {
    const float amax = __uint_as_float(max(bits, __float_as_uint(kLeastAmax)));
    scale = amax / kMostE4m3;
    inverse = kMostE4m3 / amax;
  }
  __device__ uint32_t codes(const float (&v)[kOfLane]) const {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const uint32_t code = e4m3_of(__float_as_uint(v[i] * inverse), [](uint32_t a) {
        return __float_as_uint(__uint_as_float(a) + 0x1p14f);
      });
      all |= code << (8 * i);
    }
    return all;
  }
};

__device__ inline uint32_t largest_of(const float (&v)[kOfLane], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) largest = max(largest, magnitude(v[i]));
  return largest;
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_rows(const QuantizeArgs args, bool vector) {
  const int64_t across = scale_blocks(args.columns), warp = warp_of_grid();
  const int64_t row = warp / across, block = warp - row * across;
  if (row >= args.rows) return;
  const int64_t column = block * kScaleBlock + lane_id() * kOfLane, left = args.columns - column;
  const int64_t at = row * args.columns + column;
  float v[kOfLane];
  load_lane(v, static_cast<const T*>(args.x) + at, left, vector);
  const Scaling scaling(__reduce_max_sync(kAllLanes, largest_of(v, 0)));
  store_lane(args.values + at, scaling.codes(v), left, vector);
  if (lane_id() == 0) args.scales[warp] = scaling.scale;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_tiles(const QuantizeArgs args, bool vector, bool vector_out) {
  constexpr int kPitch = static_cast<int>(kScaleBlock) + kOfLane;  // of a column that is turned
  __shared__ uint32_t largest_of_warp[kWarps];
  __shared__ __align__(16) uint8_t turned[kScaleBlock * kPitch];
  const int64_t across = scale_blocks(args.columns), down = args.runs_of_matrix();
  const int64_t run = blockIdx.x / across, j = blockIdx.x - run * across;
  const int64_t matrix = run / down, i = run - matrix * down;
  const int64_t row = i * kScaleBlock, column = j * kScaleBlock;
  const int64_t base = matrix * args.rows * args.columns, rows = args.rows - row;
  const int warp = threadIdx.x / kWarp, lane = lane_id();
  const int64_t left = args.columns - column - lane * kOfLane;
  const T* x = static_cast<const T*>(args.x) + base + row * args.columns + column + lane * kOfLane;
  float v[kRowsOfWarp][kOfLane];
  uint32_t largest = 0;
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int64_t at = warp * kRowsOfWarp + r;
    load_lane(v[r], x + at * args.columns, at < rows ? left : 0, vector);
    largest = largest_of(v[r], largest);
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) largest_of_warp[warp] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = max(largest, largest_of_warp[w]);
  const Scaling scaling(largest);
  if (threadIdx.x == 0) {
    const int64_t at = args.transposed ? j * down + i : i * across + j;
    args.scales[matrix * across * down + at] = scaling.scale;
  }
  if (!args.transposed) {
    uint8_t* to = args.values + base + row * args.columns + column + lane * kOfLane;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int64_t at = warp * kRowsOfWarp + r;
      store_lane(to + at * args.columns, scaling.codes(v[r]), at < rows ? left : 0, vector_out);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const uint32_t codes = scaling.codes(v[r]);
#pragma unroll
    for (int c = 0; c < kOfLane; ++c) {
      turned[(lane * kOfLane + c) * kPitch + warp * kRowsOfWarp + r] =
          static_cast<uint8_t>(codes >> (8 * c));
    }
  }
  __syncthreads();
  uint8_t* to = args.values + base + column * args.rows + row + lane * kOfLane;
  const int64_t left_rows = rows - lane * kOfLane;
  for (int c = warp; c < kScaleBlock && column + c < args.columns; c += kWarps) {
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(turned + c * kPitch + lane * kOfLane);
    store_lane(to + c * args.rows, codes, left_rows, vector_out);
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, Stream stream) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // Whole lanes of four are loaded and stored at once.
    const auto vectors = [](const void* p, int64_t columns, int64_t bytes) {
      return reinterpret_cast<uintptr_t>(p) % (kOfLane * bytes) == 0 && columns % kOfLane == 0;
    };
    const bool in = vectors(args.x, args.columns, sizeof(T)),
               out = vectors(args.values, args.transposed ? args.rows : args.columns, 1);
    const int64_t blocks = args.runs() * scale_blocks(args.columns);
    if (args.tiles) {
      launch("quantize_tiles", quantize_tiles<T>, blocks, kThreads, 0, stream, args, in, out);
    } else {
      launch("quantize_rows", quantize_rows<T>, ceil_div(blocks, kWarps), kThreads, 0, stream, args,
             in && out);
    }
  });
}

}  // namespace moekernels::cuda
