// Pairs of blocks: a cluster of two works on neighbouring tiles and each brings half of what both
// read to both, so that L2 is asked for it once. Neighbours along N share A; along M, where an
// expert has many rows, they share B. A block without a partner runs the same code as a cluster of
// one.
#pragma once

#include "moekernels/gemm_tuned.h"
#include "product.cuh"

namespace moekernels::cuda::sm90 {

__device__ inline int32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int32_t>(rank);
}
// At the barrier of the same place in a block of the cluster; .release.cluster would be a fence of
// the whole GPU, for which there is nothing to release: products have read what they are given.
__device__ inline void arrive_at(uint32_t barrier, int32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// To the same place of both blocks, whose barriers of the same place count the bytes.
__device__ inline void load_both(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t{3})
      : "memory");
}
__device__ inline void load_both(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y,
                                 int32_t z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(uint16_t{3})
      : "memory");
}

// A block's place in its cluster; the cluster walks over tiles that are two along N or M.
struct Pairing {
  GemmPair pair;
  int32_t rank;

  __device__ int32_t blocks() const { return pair == GemmPair::none ? 1 : 2; }
  __device__ int32_t tile_rows() const { return pair == GemmPair::m ? 2 * kTileRows : kTileRows; }
  __device__ TileGrid grid(TileGrid of_tiles) const {
    if (pair == GemmPair::n) of_tiles.column_tiles = (of_tiles.column_tiles + 1) / 2;
    return of_tiles;
  }
  __device__ int32_t first() const { return static_cast<int32_t>(blockIdx.x >> (blocks() - 1)); }
  __device__ int32_t step() const { return static_cast<int32_t>(gridDim.x >> (blocks() - 1)); }
};

// Where things lie in a block's shared memory, in bytes: what stands in no relation to stages and
// experts comes first, so that its addresses are constants.
struct PairLayout {
  static constexpr int kMoreBarriers = 16;
  int full, empty, more;          // two barriers a stage, and a style's own
  int first_row_tile, row_begin;  // [groups+1], [E+2]
  int stages, bytes;

  MOEKERNELS_BOTH PairLayout(int staging_bytes, int columns, int count, int experts)
      : full(staging_bytes),
        empty(full + kMostStages * 8),
        more(empty + kMostStages * 8),
        first_row_tile(more + kMoreBarriers * 8),
        row_begin(first_row_tile + (experts + 2) * 4),
        stages((row_begin + (experts + 2) * 4 + 1023) / 1024 * 1024),
        bytes(stages + count * (kTileRows + columns) * kLine) {}
};

// The barriers of a ring that both blocks fill.
struct PairShared : ProductShared {
  uint32_t more;
  int32_t blocks;
};

__device__ inline PairShared pair_shared(char* shared, const PairLayout& at, int32_t blocks) {
  const uint32_t base = shared_address(shared);
  PairShared s;
  s.stages = base + at.stages;
  s.full = base + at.full;
  s.empty = base + at.empty;
  s.staging = shared;
  s.first_row_tile = reinterpret_cast<int32_t*>(shared + at.first_row_tile);
  s.row_begin = reinterpret_cast<int32_t*>(shared + at.row_begin);
  s.more = base + at.more;
  s.blocks = blocks;
  return s;
}

// A stage is written by both blocks: both are told that it is free.
__device__ inline void release(const PairShared& s, int stage, int lane) {
  if (lane < s.blocks) arrive_at(s.empty + 8 * stage, lane);
}

// This block's tile of the cluster's. Where it has none (a last column without a neighbour) no row
// of it exists, and it still brings its half.
__device__ inline TileWork work_of(const PairShared& s, const ProductArgs& args,
                                   const Pairing& pairing, const TilePosition& at) {
  const RowRange rows = group_rows(s, at.group);
  const int32_t row_of_pair = static_cast<int32_t>(rows.begin) + at.row_tile * pairing.tile_rows();
  const int32_t column_tile =
      pairing.pair == GemmPair::n ? 2 * at.column_tile + pairing.rank : at.column_tile;
  return {
      .tile = {.group = at.group,
               .row = row_of_pair + (pairing.pair == GemmPair::m ? pairing.rank * kTileRows : 0),
               .row_end = column_tile < args.column_tiles ? static_cast<int32_t>(rows.end) : 0,
               .column_tile = column_tile},
      .first_row = static_cast<int32_t>(rows.begin),
      .steps = static_cast<int32_t>(tile_count(args.depth, kDepth)),
  };
}

// The lines of the boxes that A and B come in; a box that both blocks share is half of a tile.
inline int lines_of_a(GemmPair pair) { return pair == GemmPair::n ? kTileRows / 2 : kTileRows; }
constexpr int lines_of_b(int columns, bool along_n) { return along_n ? kDepth : columns / 2; }

template <int kColumns, bool kAlongN>
__device__ inline void load_stage(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                  const ProductArgs& args, const Pairing& pairing,
                                  const ProductTile& tile, int32_t step, uint32_t stage,
                                  uint32_t full) {
  const int32_t k = step * kDepth;
  arrive_and_expect(full, kStageBytes<kColumns>);
  if (pairing.pair == GemmPair::n) {
    const int32_t half = pairing.rank * (kTileRows / 2);
    load_both(stage + half * kLine, a_map, k, tile.row + half, full);
  } else {
    load_tile(stage, a_map, k, tile.row, full);
  }
  stage += kTileRows * kLine;
  constexpr int kColumnsOfBox = kAlongN ? 64 : kColumns / 2;
#pragma unroll
  for (int c = 0; c < kColumns; c += kColumnsOfBox, stage += kColumnsOfBox * kLine) {
    const int32_t column =
        tile.column_tile * args.column_step + c / 128 * args.second_half + c % 128;
    const int32_t x = kAlongN ? column : k, y = kAlongN ? k : column;
    if (pairing.pair != GemmPair::m) {
      load_tile(stage, b_map, x, y, tile.group, full);
    } else if (pairing.rank == c / (kColumns / 2)) {
      load_both(stage, b_map, x, y, tile.group, full);
    }
  }
}

// The producer's warpgroup: as `produce`, of a pair.
template <class Epilogue, bool kAlongN>
__device__ __forceinline__ void produce(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                        const ProductArgs& args, const typename Epilogue::Args& to,
                                        const PairShared& s, const Pairing& pairing,
                                        const TileGrid& grid, Observer& observer, int warp,
                                        int lane) {
  constexpr int kColumns = Epilogue::kColumns;
  const bool prefetches = Epilogue::kPrefetches && args.prefetch;
  if (warp > (prefetches ? 1 : 0)) return;
  Ring ring{args.stages};
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    const TileWork work = work_of(s, args, pairing, at);
    if (at.group == args.experts) continue;
    if (prefetches) sync_named<2 * kWarp>(kPrefetchBarrier);
    if (warp == 1) {
      Epilogue::prefetch(to, work.tile, lane);
      continue;
    }
    if (lane == 0) {
      observer.begin(work.tile, work.steps);
#pragma unroll 1
      for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
        observer.wait({s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
        load_stage<kColumns, kAlongN>(a_map, b_map, args, pairing, work.tile, step,
                                      s.stages + ring.stage * kStageBytes<kColumns>,
                                      s.full + 8 * ring.stage);
      }
      observer.sums_done();
      observer.end();
    }
    __syncwarp();
  }
}

// What every thread does first: shared memory, barriers, the walk over the tiles. `arrivals`: of
// this block, that give a stage back.
template <bool kOverRows = false>
__device__ __forceinline__ TileGrid begin_block(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                                const ProductArgs& args, const PairShared& s,
                                                const Pairing& pairing, int arrivals) {
  if (threadIdx.x == 0) {
    if (s.stages % 1024 != 0) __trap();  // where the 128-byte swizzle begins
    prefetch_map(a_map);
    prefetch_map(b_map);
    for (int i = 0; i < args.stages; ++i) {
      init_barrier(s.full + 8 * i, 1);
      init_barrier(s.empty + 8 * i, arrivals * s.blocks);
    }
    publish_barriers();
  }
  const TileGrid grid = pairing.grid(count_tiles<kOverRows>(s, args, pairing.tile_rows()));
  if (s.blocks > 1) meet_cluster();  // the other's barriers are there
  return grid;
}

// A block whose partner may still write to it, or arrive at its barriers, must not exit.
__device__ inline void end_block(const PairShared& s) {
  if (s.blocks > 1) meet_cluster();
}

}  // namespace moekernels::cuda::sm90
