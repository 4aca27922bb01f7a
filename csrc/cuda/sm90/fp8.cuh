// The product of e4m3 operands on sm_90a: rows and weights both along K, 128 of it a stage, as many
// as share a scale. The tensor cores' own sums keep few bits, so each stage is summed on its own
// and promoted, times its two scales, to fp32 sums in registers; the other consumer multiplies
// meanwhile.
#pragma once

#include "kernel.cuh"
#include "moekernels/float8.h"
#include "rows.cuh"

namespace moekernels::cuda::sm90 {

constexpr int kFp8Columns = 128;  // of a tile: the weights' scale is one for all
static_assert(kLine == kScaleBlock && kFp8Columns == kScaleBlock && kProductStep == 32);

struct BlockScales {
  const float* rows;  // [R, blocks]
  const float* w;     // [E, column tiles, blocks]
  int32_t blocks;     // of K
};

// Of one tile: the two rows of this lane's accumulators, and the weights.
struct TileScales {
  const float *row[2], *w;

  __device__ TileScales(const BlockScales& of, const ProductArgs& args, const ProductTile& tile,
                        int64_t row_of_warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row_of_warp + lane / 4 + 8 * half;  // past the rows, any: it is not stored
      row[half] = of.rows + (r < args.rows ? r : args.rows - 1) * of.blocks;
    }
    w = of.w + (int64_t{tile.group} * args.column_tiles + tile.column_tile) * of.blocks;
  }
};

__device__ inline int32_t fp8_steps(const ProductArgs& args) {
  return (args.depth + kLine - 1) / kLine;
}

// total = the tile's sums, of this warpgroup's 64 rows.
__device__ __forceinline__ void sum_fp8(float (&total)[kFp8Columns / 2], const TileScales& scales,
                                        const ProductShared& s, int32_t steps, Ring& ring,
                                        Observer& observer, int warpgroup, int lane) {
  float d[kFp8Columns / 2];
#pragma unroll
  for (int i = 0; i < kFp8Columns / 2; ++i) total[i] = 0;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    const uint32_t stage = s.stages + ring.stage * kStageBytes<kFp8Columns>;
    // Under way while the product runs.
    const float w = scales.w[step], first = scales.row[0][step], second = scales.row[1][step];
    observer.wait({s.full + 8 * ring.stage, ring.phase, Awaited::full, ring.stage, step});
    const uint64_t a = operand(stage + warpgroup * kBox, kBox);
    const uint64_t b = operand(stage + kTileRows * kLine, kBox);
    fence_products();
#pragma unroll
    for (int k = 0; k < kLine / kProductStep; ++k) {
      constexpr int kStep = kProductStep >> 4;
      multiply_e4m3(d, a + k * kStep, b + k * kStep, k > 0);
    }
    commit_products();
    wait_products<0>();
    pin(d);
    release(s, ring.stage, lane);
    ring.advance();
    const float scale[2] = {first * w, second * w};
#pragma unroll
    for (int i = 0; i < kFp8Columns / 2; ++i) total[i] = fmaf(scale[i / 2 % 2], d[i], total[i]);
  }
}

// A source of stages (kernel.cuh) in bytes, 128 of K each, with scales beside them.
struct Fp8Loaded : Loaded {
  BlockScales scales;

  template <class Epilogue, bool kOverRows, bool kAlongN>
  __device__ __forceinline__ void produce(const ProductArgs& args, const typename Epilogue::Args&,
                                          const ProductShared& s, const TileGrid& grid,
                                          Observer& observer, int warp, int lane) const {
    if (warp > 0 || lane > 0) return;
    Ring ring{args.stages};
    TilePosition at{};
    for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
      if (at.group == args.experts) continue;
      const ProductTile tile = work_at<false>(s, args, at).tile;
      const int32_t steps = fp8_steps(args);
      observer.begin(tile, steps);
#pragma unroll 1
      for (int32_t step = 0; step < steps; ++step, ring.advance()) {
        const uint32_t stage = s.stages + ring.stage * kStageBytes<kFp8Columns>,
                       full = s.full + 8 * ring.stage;
        observer.wait({s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
        arrive_and_expect(full, kStageBytes<kFp8Columns>);
        load_tile(stage, a, step * kLine, tile.row, full);
        load_tile(stage + kTileRows * kLine, b, step * kLine, tile.column_tile * kFp8Columns,
                  tile.group, full);
      }
      observer.sums_done();
      observer.end();
    }
  }

  template <class Epilogue, bool kOverRows, bool kAlongN>
  __device__ __forceinline__ void consume(const ProductArgs& args,
                                          const typename Epilogue::Args& to, const ProductShared& s,
                                          const TileGrid& grid, Observer& observer, int warpgroup,
                                          int warp, int lane) const {
    char* staging = s.staging + (warpgroup * 4 + warp) * kStagingBytes;
    float total[kFp8Columns / 2];
    Ring ring{args.stages};
    TilePosition at{};
    for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
      const ProductTile tile = work_at<false>(s, args, at).tile;
      const int32_t first = tile.row + 64 * warpgroup, row = first + 16 * warp;
      if (at.group == args.experts) {
        Epilogue::clear(to, tile, row, lane);
        continue;
      }
      const int32_t steps = fp8_steps(args);
      observer.begin(tile, steps);
      if (first >= tile.row_end) {
        pass_over(s, ring, steps, observer, lane);
        observer.sums_done();
      } else {
        sum_fp8(total, TileScales(scales, args, tile, row, lane), s, steps, ring, observer,
                warpgroup, lane);
        observer.sums_done();
        Epilogue::store(to, tile, total, staging, row, lane);
      }
      observer.end();
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    fp8_product(const __grid_constant__ CUtensorMap a_map,
                const __grid_constant__ CUtensorMap b_map, const ProductArgs args,
                const BlockScales scales, const typename StoreRows<T, kFp8Columns>::Args to,
                const Probe probe) {
  run_product<StoreRows<T, kFp8Columns>, false, false>(Fp8Loaded{{&a_map, &b_map}, scales}, args,
                                                       to, probe);
}

}  // namespace moekernels::cuda::sm90
