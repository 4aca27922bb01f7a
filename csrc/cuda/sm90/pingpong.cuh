// The row products of sm_90a in ping-pong: each consumer warpgroup has tiles of 128 x 128 of its
// own and works on its epilogue while the other multiplies. Such a tile reads more from L2 a flop
// than 128 x 256, so it wants a pair of blocks (pair.cuh).
#pragma once

#include "dact.cuh"
#include "pair.cuh"

namespace moekernels::cuda::sm90 {

MOEKERNELS_BOTH inline PairLayout pingpong_layout(int stages, int experts) {
  return {kConsumerWarps * kStagingBytes, 128, stages, experts};
}
// Whose turn it is to multiply: a barrier a consumer, given by the other.
__device__ inline uint32_t turn(const PairShared& s, int warpgroup) {
  return s.more + 8 * warpgroup;
}

// The other consumer may multiply.
__device__ inline void give_turn(const PairShared& s, int warpgroup, int lane) {
  if (lane == 0) arrive(turn(s, warpgroup ^ 1));
}

__device__ inline int thread_now() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// d = the sums of a tile, 64 accumulators for each half of its rows; gives the turn once the last
// products are under way.
template <class T, bool kAlongN>
__device__ __forceinline__ void sum_both(float (&d)[128], const PairShared& s, const TileWork& work,
                                         Ring& ring, Observer& observer, int warpgroup, int lane) {
  int previous = 0;
#pragma unroll 1
  for (int32_t step = 0; step < work.steps; ++step) {
    const uint32_t stage = s.stages + ring.stage * kStageBytes<128>;
    observer.wait({s.full + 8 * ring.stage, ring.phase, Awaited::full, ring.stage, step});
    constexpr int kStepA = 32 >> 4, kStepB = (kAlongN ? 16 * kLine : 32) >> 4;
    const uint64_t a = operand(stage, kBox), b = operand(stage + kTileRows * kLine, kBox);
    fence_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&of_half)[64] = *reinterpret_cast<float (*)[64]>(d + 64 * half);
        multiply<T, false, kAlongN>(of_half, a + half * (kBox >> 4) + k * kStepA, b + k * kStepB,
                                    step + k > 0);
      }
    }
    commit_products();
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

// A consumer's warpgroup: every other tile, all of its rows.
template <class Epilogue, bool kAlongN>
__device__ __forceinline__ void consume_in_turn(const ProductArgs& args,
                                                const typename Epilogue::Args& to,
                                                const PairShared& s, const Pairing& pairing,
                                                const TileGrid& grid, Observer& observer,
                                                int warpgroup, int warp, int lane) {
  using T = typename Epilogue::Type;
  float d[128];
  Ring ring{args.stages};
  uint32_t tiles = 0;  // passed, of both consumers
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    const TileWork work = work_of(s, args, pairing, at);
    if (at.group == args.experts) {
      Epilogue::clear(to, work.tile, work.tile.row + 64 * warpgroup + 16 * warp, lane);
      continue;
    }
    const uint32_t number = tiles++;
    if (number % 2 != warpgroup) {
      ring.pass(work.steps);
      continue;
    }
    observer.begin(work.tile, work.steps);
    // The first consumer's first turn is its own.
    const uint32_t phase = number / 2 % 2 ^ warpgroup ^ 1;
    observer.wait({turn(s, warpgroup), phase, Awaited::turn, warpgroup, work.steps});
    if (work.tile.row >= work.tile.row_end) {
      pass_over(s, ring, work.steps, observer, lane);
      give_turn(s, warpgroup, lane);
      observer.sums_done();
    } else {
      sum_both<T, kAlongN>(d, s, work, ring, observer, warpgroup, lane);
      observer.sums_done();
      // Read anew: what follows from it need not be kept while the products run.
      const int thread = thread_now(), warp_now = thread / kWarp % 4;
      Epilogue::store(to, work.tile, d, s.staging + thread / kWarp * kStagingBytes,
                      work.tile.row + 16 * warp_now, thread % kWarp);
    }
    observer.end();
  }
}

// C has the rows, and the weights lie along K or (kAlongN) along N.
template <class Epilogue, bool kAlongN>
__global__ void __launch_bounds__(kProductThreads, 1)
    pingpong_product(const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map, const ProductArgs args,
                     const GemmPair pair, const typename Epilogue::Args to, const Probe probe) {
  extern __shared__ __align__(1024) char shared[];
  const Pairing pairing{pair, rank_in_cluster()};
  const PairShared s =
      pair_shared(shared, pingpong_layout(args.stages, args.experts), pairing.blocks());
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4,
            lane = threadIdx.x % kWarp;
  if (threadIdx.x < kConsumers) init_barrier(turn(s, threadIdx.x), 4);
  const TileGrid grid = begin_block(&a_map, &b_map, args, s, pairing, 4);
  Observer observer(probe, warpgroup * 4 + warp, lane);
  if (warpgroup == kConsumers) {
    give_registers<40>();
    produce<Epilogue, kAlongN>(&a_map, &b_map, args, to, s, pairing, grid, observer, warp, lane);
  } else {
    take_registers<232>();
    consume_in_turn<Epilogue, kAlongN>(args, to, s, pairing, grid, observer, warpgroup, warp, lane);
  }
  end_block(s);
}

}  // namespace moekernels::cuda::sm90
