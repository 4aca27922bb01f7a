// Products whose rows come from peers while they run, or whose results go to them
// (moekernels/exchange.h).
//
// The producer claims tiles from a counter, in their order, where the other products take every
// gridDim-th: a block that starts late, since the exchange held its SM, does fewer. Who computes a
// tile changes no bit. A claim goes to the others of its block through a ring of two in shared
// memory. The producer's second warp follows: it prefetches, and tells peers of finished tiles, so
// that nobody waits for that who multiplies.
#pragma once

#include "product.cuh"
#include "run.cuh"

namespace moekernels::cuda::sm90 {

constexpr int kClaims = 2;
constexpr int kClaimReaders = kConsumerWarps + 1;
constexpr int kClaimBytes = kClaims * (3 * 8 + 4) + 8;  // and what aligns them

// The ring by its first byte: of each claim three barriers, whether it has been made, has been
// read, and its tile has been stored; then the indices. A thread that follows counts claims.
struct ClaimShared {
  uint32_t base;

  __device__ uint32_t made(uint32_t n) const { return base + n % kClaims * 8; }
  __device__ uint32_t read(uint32_t n) const { return made(n) + kClaims * 8; }
  __device__ uint32_t stored(uint32_t n) const { return made(n) + kClaims * 16; }
  __device__ static uint32_t phase(uint32_t n) { return n / kClaims % 2; }

  __device__ void put(uint32_t n, int32_t index) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at(n)), "r"(index) : "memory");
    arrive(made(n));
  }
  __device__ int32_t get(uint32_t n) const {
    wait(made(n), phase(n));
    int32_t index;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(index) : "r"(at(n)) : "memory");
    return index;
  }

 private:
  __device__ uint32_t at(uint32_t n) const { return base + kClaims * 24 + n % kClaims * 4; }
};

template <int kColumns>
__device__ ClaimShared claim_shared(char* shared, const ProductArgs& args) {
  const int at = (ProductLayout(kColumns, args.stages, args.experts).bytes + 7) / 8 * 8;
  return {shared_address(shared) + at};
}

// Claims the next tile. The last claim of a launch, behind all tiles, sets the counter to zero for
// the next.
__device__ inline int32_t claim(uint32_t* claims, const TileGrid& grid) {
  uint32_t index;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(index)
               : "l"(claims)
               : "memory");
  const uint32_t tiles = grid.first_row_tile[grid.groups] * grid.column_tiles;
  if (index == tiles + gridDim.x - 1) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(claims), "r"(0) : "memory");
  }
  return static_cast<int32_t>(index);
}

// One thread: claims tiles until there are none, and fills the ring with those that have sums.
template <class Epilogue, class Peers, bool kAlongN>
__device__ __forceinline__ void produce_claims(const CUtensorMap* a_map, const CUtensorMap* b_map,
                                               const ProductArgs& args,
                                               const typename Peers::Args& with,
                                               const ProductShared& s, const ClaimShared& claims,
                                               const TileGrid& grid, Observer& observer) {
  constexpr int kColumns = Epilogue::kColumns;
  Ring ring{args.stages};
  Peers peers(with);
  TilePosition at{};
  bool more = true;
  for (uint32_t n = 0; more; ++n) {
    const int32_t index = claim(peers.claims(), grid);
    wait(claims.read(n), claims.phase(n) ^ 1);
    claims.put(n, index);
    more = find_tile(grid, index, at);
    if (!more || at.group == args.experts) continue;
    const TileWork work = work_at<false>(s, args, at);
    observer.begin(work.tile, work.steps);
    peers.await_rows(s, args, work.tile);
#pragma unroll 1
    for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
      observer.wait({s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
      load_stage<kColumns, false, kAlongN>(a_map, b_map, args, work.tile, work.first_row, step,
                                           s.stages + ring.stage * kStageBytes<kColumns>,
                                           s.full + 8 * ring.stage);
    }
    observer.sums_done();
    observer.end();
  }
}

// The producer's second warp.
template <class Epilogue, class Peers>
__device__ __forceinline__ void follow_claims(const ProductArgs& args,
                                              const typename Epilogue::Args& to,
                                              const typename Peers::Args& with,
                                              const ProductShared& s, const ClaimShared& claims,
                                              const TileGrid& grid, int lane) {
  TilePosition at{};
  for (uint32_t n = 0; find_tile(grid, claims.get(n), at); ++n) {
    if (at.group < args.experts) {
      const ProductTile tile = work_at<false>(s, args, at).tile;
      if (Epilogue::kPrefetches && args.prefetch) Epilogue::prefetch(to, tile, lane);
      if constexpr (Peers::kSends) {
        wait(claims.stored(n), claims.phase(n));
        Peers::tell(with, tile, Epilogue::kColumns, lane);
      }
    } else if constexpr (Peers::kSends) {
      wait(claims.stored(n), claims.phase(n));
    }
    __syncwarp();
    if (lane == 0) arrive(claims.read(n));
  }
}

template <class Epilogue, class Peers, bool kAlongN>
__device__ __forceinline__ void consume_claims(const ProductArgs& args,
                                               const typename Epilogue::Args& to,
                                               const ProductShared& s, const ClaimShared& claims,
                                               const TileGrid& grid, Observer& observer,
                                               int warpgroup, int warp, int lane) {
  constexpr int kColumns = Epilogue::kColumns;
  char* staging = s.staging + (warpgroup * 4 + warp) * kStagingBytes;
  float d[kColumns / 2];
  Ring ring{args.stages};
  TilePosition at{};
  for (uint32_t n = 0; find_tile(grid, claims.get(n), at); ++n) {
    __syncwarp();
    if (lane == 0) arrive(claims.read(n));
    const TileWork work = work_at<false>(s, args, at);
    const int32_t first = work.tile.row + 64 * warpgroup;  // of this warpgroup's 64
    const int32_t row = first + 16 * warp;                 // of this warp's 16
    if (at.group == args.experts) {
      Epilogue::clear(to, work.tile, row, lane);
    } else {
      observer.begin(work.tile, work.steps);
      if (first >= work.tile.row_end) {
        pass_over(s, ring, work.steps, observer, lane);
        observer.sums_done();
      } else {
        sum_tile<typename Epilogue::Type, kColumns, false, kAlongN>(d, args, s, work, ring,
                                                                    observer, warpgroup, lane);
        observer.sums_done();
        Epilogue::store(to, work.tile, d, staging, row, lane);
      }
      observer.end();
    }
    if constexpr (Peers::kSends) {
      __syncwarp();  // the lane that arrives is behind all lanes' stores
      if (lane == 0) arrive(claims.stored(n));
    }
  }
}

template <int kColumns>
int64_t peer_shared_bytes(int stages, int64_t experts) {
  return product_shared_bytes(kColumns, stages, experts) + kClaimBytes;
}

template <class Epilogue, class Peers, bool kAlongN>
__global__ void __launch_bounds__(kProductThreads, 1)
    peer_product(const __grid_constant__ CUtensorMap a_map,
                 const __grid_constant__ CUtensorMap b_map, const ProductArgs args,
                 const typename Epilogue::Args to, const typename Peers::Args with,
                 const Probe probe) {
  extern __shared__ __align__(1024) char shared[];
  const ProductShared s = product_shared<Epilogue::kColumns>(shared, args);
  const ClaimShared claims = claim_shared<Epilogue::kColumns>(shared, args);
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4,
            lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    if (s.stages % 1024 != 0) __trap();  // where the 128-byte swizzle begins
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    for (int i = 0; i < args.stages; ++i) {
      init_barrier(s.full + 8 * i, 1);
      init_barrier(s.empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < kClaims; ++i) {
      init_barrier(claims.made(i), 1);
      init_barrier(claims.read(i), kClaimReaders);
      init_barrier(claims.stored(i), kConsumerWarps);
    }
    publish_barriers();
  }
  Peers::begin(with);
  const TileGrid grid = count_tiles<false>(s, args);
  Observer observer(probe, warpgroup * 4 + warp, lane);
  if (warpgroup == kConsumers) {
    give_registers<40>();
    if (warp == 0 && lane == 0) {
      produce_claims<Epilogue, Peers, kAlongN>(&a_map, &b_map, args, with, s, claims, grid,
                                               observer);
    } else if (warp == 1) {
      follow_claims<Epilogue, Peers>(args, to, with, s, claims, grid, lane);
    }
  } else {
    take_registers<232>();
    consume_claims<Epilogue, Peers, kAlongN>(args, to, s, claims, grid, observer, warpgroup, warp,
                                             lane);
  }
}

// An SM is left to the kernel that sends rows, which needs nobody else's: a product that filled
// the card and waited for them would wait for ever.
constexpr int kLeftToOthers = 1;

template <class Epilogue, class Peers, bool kAlongN>
void launch_peers(const char* name, const RowProduct& of, const GemmChoice& choice,
                  ProductArgs args, const typename Epilogue::Args& to,
                  const typename Peers::Args& with, Stream stream) {
  constexpr int kColumns = Epilogue::kColumns;
  set_stages(args, name, kColumns, choice.stages, peer_shared_bytes<kColumns>);
  const GemmOrder order = order_of(choice);
  args.band = order.band;
  args.prefetch = order.prefetch;
  const CUtensorMap a =
      tensor_map(of.dtype, of.rows, {of.depth, of.num_rows}, kTileRows, order.promotion);
  const CUtensorMap b =
      kAlongN ? tensor_map(of.dtype, of.w, {of.width, of.depth, of.experts}, 64, order.promotion)
              : tensor_map(of.dtype, of.w, {of.depth, of.width, of.experts}, 128, order.promotion);
  const int64_t tiles = row_tiles_bound(of.num_rows, of.experts, kTileRows) * args.column_tiles;
  const int64_t blocks = std::max(1, std::min(order.grid, multiprocessors() - kLeftToOthers));
  const int64_t bytes = peer_shared_bytes<kColumns>(args.stages, args.experts);
  const auto kernel = peer_product<Epilogue, Peers, kAlongN>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
  launch(name, kernel, std::min(tiles, blocks), kProductThreads, bytes, stream, a, b, args, to,
         with, note_launch(name));
}

// As RowProduct::run, with peers, in one style whatever a table's row says of others: those are of
// products whose rows stay here.
template <class Epilogue, class Peers>
void run_with_peers(const char* name, const RowProduct& of, const GemmChoice& choice,
                    int64_t column_tiles, int64_t column_step, int64_t second_half,
                    const typename Epilogue::Args& to, const typename Peers::Args& with,
                    Stream stream) {
  if (of.num_rows == 0 || of.width == 0) return;
  const ProductArgs args = of.args(column_tiles, column_step, second_half);
  const auto run =
      of.along_n ? launch_peers<Epilogue, Peers, true> : launch_peers<Epilogue, Peers, false>;
  run(name, of, choice, args, to, with, stream);
}

}  // namespace moekernels::cuda::sm90
