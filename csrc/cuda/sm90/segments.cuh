// The weights' gradients of several microbatches, added to the same sums by one launch: a block
// takes a tile through all of them, in order, while the sums' lines are in L2. Bits are those of as
// many launches.
#pragma once

#include "add.cuh"
#include "entry.cuh"

namespace moekernels::cuda::sm90 {

// The rows of one microbatch: what ProductArgs says of a product's.
struct SegmentRows {
  const int64_t* offsets;   // [E+1]
  const int32_t* token_of;  // [rows] or null
  int64_t rows, tokens;
};

struct Segments {
  CUtensorMap a[kMostSegments], b[kMostSegments];
  SegmentRows of[kMostSegments];
  int32_t count;
};

// Behind a product's own shared memory lie [E+2] rows of every segment but the first.
inline int64_t segments_shared_bytes(int64_t count, int64_t experts) {
  return (count - 1) * (experts + 2) * 4;
}

// Where a product's stages come from: TMA brings both operands, of one segment after another.
struct Segmented {
  static constexpr int kArrivals = 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  const Segments& segments;

  __device__ void prefetch() const {
    for (int32_t i = 0; i < segments.count; ++i) {
      prefetch_map(segments.a + i);
      prefetch_map(segments.b + i);
    }
  }
  __device__ void begin() const {}

  // The same memory with the rows of segment i.
  static __device__ ProductShared segment(const ProductShared& s, const ProductArgs& args,
                                          int32_t i) {
    ProductShared of = s;
    of.row_begin += i * (args.experts + 2);
    return of;
  }

  // As count_tiles: a group has tiles where any segment has rows of it.
  template <bool kOverRows>
  __device__ TileGrid count(const ProductShared& s, const ProductArgs& args) const {
    int64_t before = 0, total = 0;
    int64_t* scratch = reinterpret_cast<int64_t*>(s.staging);
    for (int32_t first = 0; first < args.experts; first += kProductThreads) {
      const int32_t group = first + static_cast<int32_t>(threadIdx.x);
      int64_t tiles = 0;
      if (group < args.experts) {
        for (int32_t i = 0; i < segments.count; ++i) {
          const SegmentRows& of = segments.of[i];
          const RowRange range = rows_of_group(of.offsets, group, args.experts, of.rows);
          segment(s, args, i).row_begin[group] = static_cast<int32_t>(range.begin);
          if (range.end > range.begin) tiles = args.row_tiles;
        }
      }
      const int64_t sum = block_exclusive_sum<kProductThreads>(tiles, scratch, &total);
      if (group < args.experts) s.first_row_tile[group] = static_cast<int32_t>(before + sum);
      before += total;
    }
    if (threadIdx.x == 0) {
      s.first_row_tile[args.experts] = static_cast<int32_t>(before);
      for (int32_t i = 0; i < segments.count; ++i) {
        const SegmentRows& of = segments.of[i];
        segment(s, args, i).row_begin[args.experts] = static_cast<int32_t>(
            rows_of_group(of.offsets, args.experts, args.experts, of.rows).begin);
      }
    }
    __syncthreads();
    return {s.first_row_tile, args.experts, args.column_tiles, args.band};
  }

  template <class Epilogue, bool kOverRows, bool kAlongN>
  __device__ __forceinline__ void produce(const ProductArgs& args,
                                          const typename Epilogue::Args& to, const ProductShared& s,
                                          const TileGrid& grid, Observer& observer, int warp,
                                          int lane) const {
    constexpr int kColumns = Epilogue::kColumns;
    if (warp > (args.prefetch ? 1 : 0)) return;
    Ring ring{args.stages};
    TilePosition at{};
    for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
      if (args.prefetch) sync_named<2 * kWarp>(kPrefetchBarrier);
      if (warp == 1) {
        Epilogue::prefetch(to, work_at<true>(s, args, at).tile, lane);
        continue;
      }
      if (lane == 0) {
#pragma unroll 1
        for (int32_t i = 0; i < segments.count; ++i) {
          const TileWork work = work_at<true>(segment(s, args, i), args, at);
          observer.begin(work.tile, work.steps);
#pragma unroll 1
          for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
            observer.wait(
                {s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
            load_stage<kColumns, true, true>(
                segments.a + i, segments.b + i, args, work.tile, work.first_row, step,
                s.stages + ring.stage * kStageBytes<kColumns>, s.full + 8 * ring.stage);
          }
          observer.sums_done();
          observer.end();
        }
      }
      __syncwarp();
    }
  }

  template <class Epilogue, bool kOverRows, bool kAlongN>
  __device__ __forceinline__ void consume(const ProductArgs& args,
                                          const typename Epilogue::Args& to, const ProductShared& s,
                                          const TileGrid& grid, Observer& observer, int warpgroup,
                                          int warp, int lane) const {
    constexpr int kColumns = Epilogue::kColumns;
    char* staging = s.staging + (warpgroup * 4 + warp) * kStagingBytes;
    float d[kColumns / 2];
    Ring ring{args.stages};
    TilePosition at{};
    for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
#pragma unroll 1
      for (int32_t i = 0; i < segments.count; ++i) {
        const ProductShared rows = segment(s, args, i);
        const TileWork work = work_at<true>(rows, args, at);
        observer.begin(work.tile, work.steps);
        if (work.steps > 0) {  // a segment without rows adds nothing
          sum_tile<typename Epilogue::Type, kColumns, true, true, false>(
              d, segments.of[i], rows, work, ring, observer, warpgroup, lane);
          observer.sums_done();
          Epilogue::store(to, work.tile, d, staging, work.tile.row + 64 * warpgroup + 16 * warp,
                          lane);
        }
        observer.end();
      }
    }
  }
};

template <class Epilogue>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_of_segments(const __grid_constant__ Segments segments,
                        const __grid_constant__ CUtensorMap sums, const ProductArgs args, void* dw,
                        const int64_t m, const int64_t n, const Probe probe) {
  run_product<Epilogue, true, true>(Segmented{segments}, args, {&sums, dw, m, n}, probe);
  wait_bulk_read<0>();  // shared memory lasts as long as the block
}

}  // namespace moekernels::cuda::sm90
