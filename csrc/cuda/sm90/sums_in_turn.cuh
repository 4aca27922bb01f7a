// The weights' gradient of sm_90a in ping-pong: each consumer warpgroup has tiles of 128 x 128 of
// its own and hands its sums to L2 while the other multiplies. As the row products in ping-pong it
// wants a pair of blocks (pair.cuh).
#pragma once

#include "add.cuh"
#include "pingpong.cuh"

namespace moekernels::cuda::sm90 {

// dw [E, M, N] += C, as AddGradient adds it. A warp's 128 accumulators are 16 rows of 128 columns
// and the 16 that lie 64 further on.
template <class T>
struct AddGradientInTurn {
  using Type = T;
  using Args = typename AddGradient<T>::Args;
  static constexpr int kColumns = 128;
  static constexpr int kBoxRows = AddGradient<T>::kBoxRows,
                       kBoxColumns = AddGradient<T>::kBoxColumns,
                       kBoxBytes = AddGradient<T>::kBoxBytes;

  static __device__ void prefetch(const Args& to, const ProductTile& tile, int lane) {
    StoreGradient<T, kColumns, true>::prefetch({to.dw, to.m, to.n}, tile, lane);
  }

  static __device__ void store(const Args& to, const ProductTile& tile, float (&d)[128],
                               char* staging, int32_t row, int lane) {
    constexpr int kAcross = kColumns / kBoxColumns;
    const uint32_t at = place_in_box(lane);
    int used = 0;  // boxes of this tile
#pragma unroll
    for (int part = 0; part < 2 * kAcross; ++part) {
      const int32_t first = row + part / kAcross * 64,
                    column = tile.column_tile * kColumns + part % kAcross * kBoxColumns;
      if (first >= to.m || column >= to.n) continue;
      const uint32_t box = shared_address(staging) + used % 2 * kBoxBytes;
      if (lane == 0) used == 0 ? wait_bulk<0>() : wait_bulk_read<1>();  // the box is free again
      ++used;
      __syncwarp();
      stage_box(d, part, box, at, lane / 4 & 1);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        add_tile(to.sums, box, column, first, tile.group);
        commit_bulk();
      }
    }
  }
};

// This block's tile of the cluster's, and the rows that it sums over; where the tile lies outside M
// or N no row of it exists, and the block still brings its half.
__device__ inline TileWork sum_of(const PairShared& s, const ProductArgs& args,
                                  const Pairing& pairing, const TilePosition& at, int64_t m) {
  const RowRange rows = group_rows(s, at.group);
  const int32_t row = at.row_tile * pairing.tile_rows() +
                      (pairing.pair == GemmPair::m ? pairing.rank * kTileRows : 0);
  const int32_t column_tile =
      pairing.pair == GemmPair::n ? 2 * at.column_tile + pairing.rank : at.column_tile;
  const bool exists = row < m && column_tile < args.column_tiles;
  return {
      .tile = {.group = at.group,
               .row = row,
               .row_end = exists ? INT32_MAX : 0,
               .column_tile = column_tile},
      .first_row = static_cast<int32_t>(rows.begin),
      .steps = static_cast<int32_t>(tile_count(rows.end - rows.begin, kDepth)),
  };
}

// Both operands in boxes of 64 columns, two each; of what the pair shares, each block brings one.
__device__ inline void load_sum_stage(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                      const Pairing& pairing, const ProductTile& tile, int32_t k,
                                      uint32_t stage, uint32_t full) {
  arrive_and_expect(full, kStageBytes<128>);
#pragma unroll
  for (int box = 0; box < 4; ++box, stage += kBox) {
    const bool of_a = box < 2;
    const CUtensorMap* map = of_a ? a_map : b_map;
    const int32_t column = (of_a ? tile.row : tile.column_tile * 128) + 64 * (box % 2);
    if (pairing.pair != (of_a ? GemmPair::n : GemmPair::m)) {
      load_tile(stage, map, column, k, full);
    } else if (pairing.rank == box % 2) {
      load_both(stage, map, column, k, full);
    }
  }
}

// The producer's warpgroup: as `produce`, of a pair that sums over rows.
template <class Epilogue>
__device__ __forceinline__ void produce_sums(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                             const ProductArgs& args,
                                             const typename Epilogue::Args& to, const PairShared& s,
                                             const Pairing& pairing, const TileGrid& grid,
                                             Observer& observer, int warp, int lane) {
  if (warp > (args.prefetch ? 1 : 0)) return;
  Ring ring{args.stages};
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    const TileWork work = sum_of(s, args, pairing, at, to.m);
    if (args.prefetch) sync_named<2 * kWarp>(kPrefetchBarrier);
    if (warp == 1) {
      if (work.tile.row_end > 0) Epilogue::prefetch(to, work.tile, lane);
      continue;
    }
    if (lane == 0) {
      observer.begin(work.tile, work.steps);
#pragma unroll 1
      for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
        observer.wait({s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
        load_sum_stage(a_map, b_map, pairing, work.tile, work.first_row + step * kDepth,
                       s.stages + ring.stage * kStageBytes<128>, s.full + 8 * ring.stage);
      }
      observer.sums_done();
      observer.end();
    }
    __syncwarp();
  }
}

// As clear_stage_rows, by the one warpgroup that reads the stage.
__device__ inline void clear_stage_alone(uint32_t stage, uint64_t rows_in, int warpgroup) {
  constexpr int kAloneBarrier = 3;  // and the next: one a consumer
  const int row = threadIdx.x % kWarpgroup / 2, half = threadIdx.x % 2;
  if (!(rows_in >> row & 1)) {
#pragma unroll
    for (int chunk = 0; chunk < 4 * kStageBytes<128> / kBox; ++chunk) {
      const uint32_t at = stage + chunk / 4 * kBox + row * kLine + half * 64 + chunk % 4 * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
  }
  fence_async_proxy();
  sync_named<kWarpgroup>(kAloneBarrier + warpgroup);
}

// d = the sums over the group's rows, 64 accumulators for each half of the tile's rows; gives the
// turn once the last products are under way.
template <class T>
__device__ __forceinline__ void sum_rows(float (&d)[128], const ProductArgs& args,
                                         const PairShared& s, const TileWork& work, Ring& ring,
                                         Observer& observer, int warpgroup, int lane) {
  const auto counting = [&](int32_t step) {
    return rows_that_count(args, work.first_row + int64_t{step} * kDepth,
                           s.row_begin[work.tile.group + 1]);
  };
  uint64_t rows_in = counting(0);
  int previous = 0;
#pragma unroll 1
  for (int32_t step = 0; step < work.steps; ++step) {
    const uint32_t stage = s.stages + ring.stage * kStageBytes<128>;
    observer.wait({s.full + 8 * ring.stage, ring.phase, Awaited::full, ring.stage, step});
    if (rows_in != ~uint64_t{0}) clear_stage_alone(stage, rows_in, warpgroup);
    constexpr int kStep = 16 * kLine >> 4;
    const uint64_t a = operand(stage, kBox), b = operand(stage + kTileRows * kLine, kBox);
    fence_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&of_half)[64] = *reinterpret_cast<float (*)[64]>(d + 64 * half);
        multiply<T, true, true>(of_half, a + half * (kBox >> 4) + k * kStep, b + k * kStep,
                                step + k > 0);
      }
    }
    commit_products();
    rows_in = counting(step + 1);  // loaded while the tensor cores work
    wait_products<1>();
    if (step > 0) release(s, previous, lane);
    previous = ring.stage;
    ring.advance();
  }
  give_turn(s, warpgroup, lane);
  wait_products<0>();
  pin(d);
  release(s, previous, lane);
}

// A consumer's warpgroup: every other tile, all of its rows. A group without rows has no tile.
template <class Epilogue>
__device__ __forceinline__ void consume_sums_in_turn(const ProductArgs& args,
                                                     const typename Epilogue::Args& to,
                                                     const PairShared& s, const Pairing& pairing,
                                                     const TileGrid& grid, Observer& observer,
                                                     int warpgroup, int warp, int lane) {
  float d[128];
  Ring ring{args.stages};
  uint32_t tiles = 0;  // passed, of both consumers
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    const TileWork work = sum_of(s, args, pairing, at, to.m);
    const uint32_t number = tiles++;
    if (number % 2 != warpgroup) {
      ring.pass(work.steps);
      continue;
    }
    observer.begin(work.tile, work.steps);
    const uint32_t phase = number / 2 % 2 ^ warpgroup ^ 1;  // the first's first turn is its own
    observer.wait({turn(s, warpgroup), phase, Awaited::turn, warpgroup, work.steps});
    if (work.tile.row_end == 0) {
      pass_over(s, ring, work.steps, observer, lane);
      give_turn(s, warpgroup, lane);
      observer.sums_done();
    } else {
      sum_rows<typename Epilogue::Type>(d, args, s, work, ring, observer, warpgroup, lane);
      observer.sums_done();
      Epilogue::store(to, work.tile, d, s.staging + (warpgroup * 4 + warp) * kStagingBytes,
                      work.tile.row + 16 * warp, lane);
    }
    observer.end();
  }
}

// As `product_into_sums`. args.row_tiles counts what a cluster has of M.
template <class Epilogue>
__global__ void __launch_bounds__(kProductThreads, 1)
    pingpong_product_into_sums(const __grid_constant__ CUtensorMap a_map,
                               const __grid_constant__ CUtensorMap b_map,
                               const __grid_constant__ CUtensorMap sums, const ProductArgs args,
                               const GemmPair pair, void* dw, const int64_t m, const int64_t n,
                               const Probe probe) {
  extern __shared__ __align__(1024) char shared[];
  const Pairing pairing{pair, rank_in_cluster()};
  const PairShared s =
      pair_shared(shared, pingpong_layout(args.stages, args.experts), pairing.blocks());
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4,
            lane = threadIdx.x % kWarp;
  if (threadIdx.x < kConsumers) init_barrier(turn(s, threadIdx.x), 4);
  const TileGrid grid = begin_block<true>(&a_map, &b_map, args, s, pairing, 4);
  const typename Epilogue::Args to{&sums, dw, m, n};
  Observer observer(probe, warpgroup * 4 + warp, lane);
  if (warpgroup == kConsumers) {
    give_registers<40>();
    produce_sums<Epilogue>(&a_map, &b_map, args, to, s, pairing, grid, observer, warp, lane);
  } else {
    take_registers<232>();
    consume_sums_in_turn<Epilogue>(args, to, s, pairing, grid, observer, warpgroup, warp, lane);
    wait_bulk_read<0>();  // shared memory lasts as long as the block
  }
  end_block(s);
}

}  // namespace moekernels::cuda::sm90
