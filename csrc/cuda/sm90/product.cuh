// The grouped product of sm_90a: persistent blocks of one producer (TMA into a ring of stages in
// shared memory) and two consumer warpgroups (wgmma, 64 rows of the tile each). What happens to a
// finished tile is the epilogue's.
//
// A tile of 128 x 256 reads 48 KiB a step of 64 for 1024 cycles of tensor core: 48 bytes a cycle
// and SM, near what L2 gives; 128 x 128 would read 64. So the large tile is the rule, and its order
// is chosen for L2 (moekernels/tile_order.h).
#pragma once

#include "common/launch.cuh"
#include "common/scan.cuh"
#include "moekernels/tile_order.h"
#include "probe.cuh"
#include "ptx.cuh"

namespace moekernels::cuda::sm90 {

constexpr int kConsumers = 2, kWarpgroup = 128, kProductThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kTileRows = 64 * kConsumers, kDepth = 64,
              kLine = 128;           // a line: 64 elements of 16 bits
constexpr int kBox = 64 * kLine;     // 64 lines
constexpr int kStagingBytes = 4096;  // for every consumer warp, 16 rows of 256 bytes
constexpr int kPrefetchBarrier = 2;  // of the producer's two warps; the consumers use 1
// A consumer gives a stage back when the product of the next is under way: one stage alone would
// never come back.
constexpr int kLeastStages = 2, kMostStages = 8, kMostShared = 227 * 1024;

struct ProductArgs {
  const int64_t* offsets;   // [E+1]
  const int32_t* token_of;  // of a product summed over rows: rows whose token lies outside count as
                            // zero; or null
  int64_t rows, tokens;
  int32_t experts, depth;           // depth: of K, unless it is the rows
  int32_t row_tiles, column_tiles;  // row_tiles: of a product summed over rows
  int32_t column_step,
      second_half;  // columns from tile to tile, and from a tile's first 128 columns to its others
  int32_t stages, band;
  bool skip_empty;  // a product summed over no rows is left alone, not set to zero
  bool prefetch;
};

// One tile of C: rows [row, row_end) of group `group`, cut at kTileRows.
struct ProductTile {
  int32_t group, row, row_end, column_tile;
};

template <int kColumns>
constexpr int kStageBytes = (kTileRows + kColumns) * kLine;

// Where things lie in a block's shared memory, in bytes; the launch and the kernel both read it
// here.
struct ProductLayout {
  int staging, full, empty;       // of the consumers' warps, and two barriers a stage
  int first_row_tile, row_begin;  // [groups+1], [E+2]
  int bytes;

  MOEKERNELS_BOTH ProductLayout(int columns, int stages, int experts)
      : staging(stages * (kTileRows + columns) * kLine),
        full(staging + kConsumerWarps * kStagingBytes),
        empty(full + kMostStages * 8),
        first_row_tile(empty + kMostStages * 8),
        row_begin(first_row_tile + (experts + 2) * 4),
        bytes(row_begin + (experts + 2) * 4) {}
};
static_assert(kBox % 1024 == 0 && kTileRows * kLine % 1024 == 0,
              "every box begins where the 128-byte swizzle does");

inline int64_t product_shared_bytes(int columns, int stages, int64_t experts) {
  return ProductLayout(columns, stages, static_cast<int>(experts)).bytes;
}

// The same, by address.
struct ProductShared {
  uint32_t stages, full, empty;
  char* staging;
  int32_t* first_row_tile;
  int32_t* row_begin;
};

template <int kColumns>
__device__ ProductShared product_shared(char* shared, const ProductArgs& args) {
  const ProductLayout at(kColumns, args.stages, args.experts);
  const uint32_t base = shared_address(shared);
  return {
      .stages = base,
      .full = base + at.full,
      .empty = base + at.empty,
      .staging = shared + at.staging,
      .first_row_tile = reinterpret_cast<int32_t*>(shared + at.first_row_tile),
      .row_begin = reinterpret_cast<int32_t*>(shared + at.row_begin),
  };
}

// Counts the tiles before each group, once a block; the rows past the last expert are a group of
// their own where C has rows. Ends with a barrier.
template <bool kOverRows>
__device__ TileGrid count_tiles(const ProductShared& s, const ProductArgs& args,
                                int64_t tile_rows = kTileRows) {
  const int32_t groups = args.experts + (kOverRows ? 0 : 1);
  int64_t before = 0, total = 0;
  int64_t* scratch = reinterpret_cast<int64_t*>(s.staging);
  for (int32_t first = 0; first < groups; first += kProductThreads) {
    const int32_t group = first + static_cast<int32_t>(threadIdx.x);
    RowRange range{0, 0};
    int64_t tiles = 0;
    if (group < groups) {
      range = rows_of_group(args.offsets, group, args.experts, args.rows);
      const int64_t rows = range.end - range.begin;
      tiles = !kOverRows                     ? tile_count(rows, tile_rows)
              : rows == 0 && args.skip_empty ? 0
                                             : args.row_tiles;
    }
    const int64_t sum = block_exclusive_sum<kProductThreads>(tiles, scratch, &total);
    if (group < groups) {
      s.first_row_tile[group] = static_cast<int32_t>(before + sum);
      s.row_begin[group] = static_cast<int32_t>(range.begin);
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    s.first_row_tile[groups] = static_cast<int32_t>(before);
    s.row_begin[groups] = static_cast<int32_t>(
        kOverRows ? rows_of_group(args.offsets, args.experts, args.experts, args.rows).begin
                  : args.rows);
  }
  __syncthreads();
  return {s.first_row_tile, groups, args.column_tiles, args.band};
}

// The rows that a group of the offsets has, as count_tiles wrote them.
__device__ inline RowRange group_rows(const ProductShared& s, int32_t group) {
  const int32_t begin = s.row_begin[group], end = s.row_begin[group + 1];
  return {begin, end < begin ? begin : end};
}

// Where the ring stands; every thread that follows it counts for itself.
struct Ring {
  int32_t stages;
  int32_t stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  __device__ void pass(int32_t steps) {
    const int32_t rounds = (stage + steps) / stages;
    stage += steps - rounds * stages;
    phase ^= rounds & 1;
  }
};

// Which of the 64 rows from `row` on count in a sum over rows. Rows: what has token_of and tokens.
template <class Rows>
__device__ inline uint64_t rows_that_count(const Rows& args, int64_t row, int64_t end) {
  const int64_t left = end - row;
  const uint64_t inside_group =
      left >= 64 ? ~uint64_t{0} : (uint64_t{1} << (left > 0 ? left : 0)) - 1;
  if (args.token_of == nullptr) return inside_group;
  const auto used = [&](int64_t r) { return r < end && inside(args.token_of[r], args.tokens); };
  const unsigned low = __ballot_sync(kAllLanes, used(row + lane_id()));
  const unsigned high = __ballot_sync(kAllLanes, used(row + 32 + lane_id()));
  return inside_group & (uint64_t{high} << 32 | low);
}

// Writes zeros over the rows (lines, in every box) that do not count: what they held may be
// infinite.
template <int kColumns>
__device__ inline void clear_stage_rows(uint32_t stage, uint64_t rows_in, int thread) {
  const int row = thread / 4, quarter = thread % 4;
  if (!(rows_in >> row & 1)) {
#pragma unroll
    for (int box = 0; box < kStageBytes<kColumns> / kBox; ++box) {
      const uint32_t at = stage + box * kBox + row * kLine + quarter * 32;
      asm volatile(
          "st.shared.v4.b32 [%0], {%1, %1, %1, %1};\nst.shared.v4.b32 [%0+16], {%1, %1, %1, %1};" ::
              "r"(at),
          "r"(0)
          : "memory");
    }
  }
  fence_async_proxy();
  sync_named<kConsumers * kWarpgroup>(1);
}

// k: the first of the step's 64 rows, or of its 64 columns of both operands.
template <bool kOverRows>
__device__ inline void load_a(const CUtensorMap* a_map, const ProductTile& tile, int32_t k,
                              uint32_t stage, uint32_t full) {
  if constexpr (kOverRows) {
#pragma unroll
    for (int i = 0; i < kConsumers; ++i)
      load_tile(stage + i * kBox, a_map, tile.row + 64 * i, k, full);
  } else {
    load_tile(stage, a_map, k, tile.row, full);
  }
}

template <int kColumns, bool kOverRows, bool kAlongN>
__device__ inline void load_b(const CUtensorMap* b_map, const ProductArgs& args,
                              const ProductTile& tile, int32_t k, uint32_t stage, uint32_t full) {
  stage += kTileRows * kLine;
#pragma unroll
  for (int half = 0; half < kColumns / 128; ++half) {
    const int32_t column = tile.column_tile * args.column_step + half * args.second_half;
    if constexpr (kOverRows) {
      load_tile(stage, b_map, column, k, full);
      load_tile(stage + kBox, b_map, column + 64, k, full);
    } else if constexpr (kAlongN) {
      load_tile(stage, b_map, column, k, tile.group, full);
      load_tile(stage + kBox, b_map, column + 64, k, tile.group, full);
    } else {
      load_tile(stage, b_map, k, column, tile.group, full);
    }
    stage += 2 * kBox;
  }
}

template <int kColumns, bool kOverRows, bool kAlongN>
__device__ inline void load_stage(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                  const ProductArgs& args, const ProductTile& tile,
                                  int32_t first_row, int32_t step, uint32_t stage, uint32_t full) {
  const int32_t k = (kOverRows ? first_row : 0) + step * kDepth;
  arrive_and_expect(full, kStageBytes<kColumns>);
  load_a<kOverRows>(a_map, tile, k, stage, full);
  load_b<kColumns, kOverRows, kAlongN>(b_map, args, tile, k, stage, full);
}

// A tile, the first row that its sum takes where it sums over rows, and its steps of kDepth.
struct TileWork {
  ProductTile tile;
  int32_t first_row, steps;
};

template <bool kOverRows>
__device__ inline TileWork work_at(const ProductShared& s, const ProductArgs& args,
                                   const TilePosition& at) {
  const RowRange rows = group_rows(s, at.group);
  const int32_t first_row = static_cast<int32_t>(rows.begin);
  return {
      .tile = {.group = at.group,
               .row = (kOverRows ? 0 : first_row) + at.row_tile * kTileRows,
               .row_end = kOverRows ? INT32_MAX : static_cast<int32_t>(rows.end),
               .column_tile = at.column_tile},
      .first_row = first_row,
      .steps =
          static_cast<int32_t>(tile_count(kOverRows ? rows.end - rows.begin : args.depth, kDepth)),
  };
}

// The producer's warpgroup: its first warp fills the ring, its second brings what the epilogue
// reads to L2.
template <class Epilogue, bool kOverRows, bool kAlongN>
__device__ __forceinline__ void produce(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                        const ProductArgs& args, const typename Epilogue::Args& to,
                                        const ProductShared& s, const TileGrid& grid,
                                        Observer& observer, int warp, int lane) {
  constexpr int kColumns = Epilogue::kColumns;
  const bool prefetches = Epilogue::kPrefetches && args.prefetch;
  if (warp > (prefetches ? 1 : 0)) return;
  Ring ring{args.stages};
  TilePosition at{};
  for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
    const TileWork work = work_at<kOverRows>(s, args, at);
    if (!kOverRows && at.group == args.experts) continue;
    // The second warp prefetches, each lane in its turn: it may take the time of a tile, the
    // loads need not wait.
    if (prefetches) sync_named<2 * kWarp>(kPrefetchBarrier);
    if (warp == 1) {
      Epilogue::prefetch(to, work.tile, lane);
      continue;
    }
    if (lane == 0) {
      observer.begin(work.tile, work.steps);
#pragma unroll 1  // unrolled it would take more than the producer's 40 registers
      for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
        observer.wait({s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
        load_stage<kColumns, kOverRows, kAlongN>(
            a_map, b_map, args, work.tile, work.first_row, step,
            s.stages + ring.stage * kStageBytes<kColumns>, s.full + 8 * ring.stage);
      }
      observer.sums_done();
      observer.end();
    }
    __syncwarp();
  }
}

__device__ inline void release(const ProductShared& s, int stage, int lane) {
  if (lane == 0) arrive(s.empty + 8 * stage);
}

// Gives back the stages of a tile none of which this warpgroup needs.
template <class Shared>
__device__ __forceinline__ void pass_over(const Shared& s, Ring& ring, int32_t steps,
                                          Observer& observer, int lane) {
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step, ring.advance()) {
    observer.wait({s.full + 8 * ring.stage, ring.phase, Awaited::full, ring.stage, step});
    release(s, ring.stage, lane);
  }
}

// d = the tile's sums, of this warpgroup's 64 rows.
template <class T, int kColumns, bool kOverRows, bool kAlongN, bool kGathers = false, class Rows,
          class Shared>
__device__ __forceinline__ void sum_tile(float (&d)[kColumns / 2], const Rows& args,
                                         const Shared& s, const TileWork& work, Ring& ring,
                                         Observer& observer, int warpgroup, int lane) {
  const auto counting = [&](int32_t step) {
    return rows_that_count(args, work.first_row + int64_t{step} * kDepth,
                           s.row_begin[work.tile.group + 1]);
  };
  uint64_t rows_in = kOverRows && work.steps > 0 ? counting(0) : 0;
  int previous = 0;
#pragma unroll 1
  for (int32_t step = 0; step < work.steps; ++step) {
    const uint32_t stage = s.stages + ring.stage * kStageBytes<kColumns>;
    observer.wait({s.full + 8 * ring.stage, ring.phase, Awaited::full, ring.stage, step});
    if (kGathers) fence_async_proxy();  // threads copied what wgmma reads
    if (kOverRows && rows_in != ~uint64_t{0})
      clear_stage_rows<kColumns>(stage, rows_in, threadIdx.x);
    // Along K, 16 of it are 32 bytes of every line; along M or N they are 16 lines.
    constexpr int kStepA = (kOverRows ? 16 * kLine : 32) >> 4,
                  kStepB = (kOverRows || kAlongN ? 16 * kLine : 32) >> 4;
    const uint64_t a = operand(stage + warpgroup * kBox, kBox);
    const uint64_t b = operand(stage + kTileRows * kLine, kBox);
    fence_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      multiply<T, kOverRows, kOverRows || kAlongN>(d, a + k * kStepA, b + k * kStepB, step + k > 0);
    }
    commit_products();
    if (kOverRows) rows_in = counting(step + 1);  // loaded while the tensor cores work
    wait_products<1>();
    if (step > 0) release(s, previous, lane);
    previous = ring.stage;
    ring.advance();
  }
  wait_products<0>();
  pin(d);
  if (work.steps > 0) release(s, previous, lane);
  if (kOverRows && work.steps == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) d[i] = 0;
  }
}

// A consumer's warpgroup: 64 rows of each tile, summed and handed to the epilogue.
template <class Epilogue, bool kOverRows, bool kAlongN, bool kGathers>
__device__ __forceinline__ void consume(const ProductArgs& args, const typename Epilogue::Args& to,
                                        const ProductShared& s, const TileGrid& grid,
                                        Observer& observer, int warpgroup, int warp, int lane) {
  constexpr int kColumns = Epilogue::kColumns;
  char* staging = s.staging + (warpgroup * 4 + warp) * kStagingBytes;
  float d[kColumns / 2];
  Ring ring{args.stages};
  TilePosition at{};
  for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
    const TileWork work = work_at<kOverRows>(s, args, at);
    const int32_t first = work.tile.row + 64 * warpgroup;  // of this warpgroup's 64
    const int32_t row = first + 16 * warp;                 // of this warp's 16
    if (!kOverRows && at.group == args.experts) {
      Epilogue::clear(to, work.tile, row, lane);
      continue;
    }
    observer.begin(work.tile, work.steps);
    if (!kOverRows && first >= work.tile.row_end) {
      pass_over(s, ring, work.steps, observer, lane);
      observer.sums_done();
    } else {
      sum_tile<typename Epilogue::Type, kColumns, kOverRows, kAlongN, kGathers>(
          d, args, s, work, ring, observer, warpgroup, lane);
      observer.sums_done();
      Epilogue::store(to, work.tile, d, staging, row, lane);
    }
    observer.end();
  }
}

}  // namespace moekernels::cuda::sm90
