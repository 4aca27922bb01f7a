// The row products of sm_90a with a hidden epilogue: the consumers only pack a finished tile into
// shared memory and go on with the next; the warps beside the loading one do the rest meanwhile. A
// packed tile takes the room of a stage and more, so the ring has three. (A fourth warpgroup would
// leave a thread 128 registers at the start, and ptxas wants more for a product of 256 columns.)
#pragma once

#include "pair.cuh"
#include "up.cuh"

namespace moekernels::cuda::sm90 {

constexpr int kStorers = 3;                     // warps
constexpr int kStripBytes = 2 * kStagingBytes;  // 16 rows of 256 columns in 16 bits: a warp's
// Registers of a thread of a consumer, and of the loading and storing warps.
constexpr int kConsumerRegisters = 200, kStorerRegisters = 104;
static_assert(kConsumers * kConsumerRegisters + kStorerRegisters == 3 * 168);

MOEKERNELS_BOTH inline PairLayout hidden_layout(int stages, int experts) {
  return {kConsumerWarps * kStripBytes, 256, stages, experts};
}
// A strip is full once it is packed, and free once it is stored: two barriers a consumer's warp.
__device__ inline uint32_t packed(const PairShared& s, int strip) { return s.more + 8 * strip; }
__device__ inline uint32_t stored(const PairShared& s, int strip) {
  return s.more + 8 * (kConsumerWarps + strip);
}
static_assert(2 * kConsumerWarps <= PairLayout::kMoreBarriers);

// An epilogue in two: `early` reads what `pack` will want while the products run, `pack` leaves a
// warp's strip in shared memory, `store` takes it from there. The bits are those of the epilogue
// that it names.
template <class Epilogue>
struct Hidden;

template <class T>
struct Hidden<StoreUp<T>> : StoreUp<T> {
  using Base = StoreUp<T>;
  using typename Base::Args;
  struct Early {
    uint4 bias;
  };

  static __device__ Early early(const Args& to, const ProductTile& tile, int32_t, int lane) {
    const TileColumns columns = Base::columns_of(to.style, tile.column_tile);
    if (to.b1 == nullptr || columns.within(lane * 8) >= columns.count) return {};
    return {get(to.b1 + tile.group * to.style.width() + columns.at(lane * 8))};
  }
  static __device__ void pack(const Args& to, const Early& early, float (&d)[128], char* strip,
                              int lane) {
    if (to.b1 != nullptr) add_bias<T>(d, early.bias, strip, lane);
    Base::template stage<0>(d, strip, lane);
    Base::template stage<1>(d, strip + kStagingBytes, lane);
  }
  static __device__ void store(const Args& to, const ProductTile& tile, const char* strip,
                               int64_t row, int lane) {
    const TileColumns columns = Base::columns_of(to.style, tile.column_tile);
    const int rows = static_cast<int>(tile.row_end - row < 16 ? tile.row_end - row : 16);
#pragma unroll 1
    for (int part = 0; part < 2; ++part, strip += kStagingBytes) {
      with_style(to.style, [&](auto kind, auto alternate) {
        Base::template activate_part<decltype(kind)::value, decltype(alternate)::value>(
            to, columns, part, strip, row, rows, lane);
      });
    }
  }
};

template <class T>
struct Hidden<StoreRows<T, 256>> : StoreRows<T, 256> {
  using Base = StoreRows<T, 256>;
  using typename Base::Args;
  struct Early {
    uint4 bias;
    float weight[2];
    bool used[2];
  };

  static __device__ Early early(const Args& to, const ProductTile& tile, int32_t row, int lane) {
    Early early{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + lane / 4 + 8 * half;
      early.used[half] = r < tile.row_end && to.use.used(r);
      early.weight[half] = early.used[half] ? to.use.weight(r) : 0.0f;
    }
    const int64_t column = int64_t{tile.column_tile} * 256 + lane * 8;
    if (to.bias != nullptr && column < to.width)
      early.bias = get(to.bias + tile.group * to.width + column);
    return early;
  }
  static __device__ void pack(const Args& to, const Early& early, float (&d)[128], char* strip,
                              int lane) {
    if (to.bias != nullptr) add_bias<T>(d, early.bias, strip, lane);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      stage_rows(strip + part * kStagingBytes, lane, [&](int block, int half) {
        const float* c = d + (part * 16 + block) * 4 + half * 2;
        return early.used[half] ? pack2(c, early.weight[half]) : 0u;
      });
    }
  }
  static __device__ void store(const Args& to, const ProductTile& tile, const char* strip,
                               int64_t row, int lane) {
    const int64_t first = row + lane / 16;
#pragma unroll 1
    for (int part = 0; part < 2; ++part, strip += kStagingBytes) {
      uint4 chunks[8];  // all are under way before the first is stored
#pragma unroll
      for (int i = 0; i < 8; ++i) chunks[i] = staged_chunk(strip, i * 2 + lane / 16, lane % 16);
      const int64_t at = int64_t{tile.column_tile} * 256 + part * 128 + lane % 16 * 8;
      const int64_t rows = at < to.width ? tile.row_end - first : 0;
      T* out = to.out + first * to.width + at;
#pragma unroll
      for (int i = 0; i < 8; ++i, out += 2 * to.width) put_if(2 * i < rows, out, chunks[i]);
    }
  }

 private:
  static __device__ uint32_t pack2(const float* c, float weight) {
    return sm90::pack<T>(c[0] * weight, c[1] * weight);
  }
};

// A consumer's warpgroup: 64 rows of each tile, summed and packed.
template <class Epilogue, bool kAlongN>
__device__ __forceinline__ void consume_and_pack(const ProductArgs& args,
                                                 const typename Epilogue::Args& to,
                                                 const PairShared& s, const Pairing& pairing,
                                                 const TileGrid& grid, Observer& observer,
                                                 int warpgroup, int warp, int lane) {
  const int strip = warpgroup * 4 + warp;
  float d[128];
  Ring ring{args.stages};
  uint32_t phase = 1;  // nothing is packed yet: the first wait passes
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    if (at.group == args.experts) continue;
    const TileWork work = work_of(s, args, pairing, at);
    const int32_t first = work.tile.row + 64 * warpgroup, row = first + 16 * warp;
    observer.begin(work.tile, work.steps);
    if (first >= work.tile.row_end) {
      pass_over(s, ring, work.steps, observer, lane);
      observer.sums_done();
    } else {
      const auto early = Epilogue::early(to, work.tile, row, lane);
      sum_tile<typename Epilogue::Type, 256, false, kAlongN>(d, args, s, work, ring, observer,
                                                             warpgroup, lane);
      observer.sums_done();
      if (row < work.tile.row_end) {
        observer.wait({stored(s, strip), phase, Awaited::stored, strip, work.steps});
        phase ^= 1;
        Epilogue::pack(to, early, d, s.staging + strip * kStripBytes, lane);
        __syncwarp();
        if (lane == 0) arrive(packed(s, strip));
      }
    }
    observer.end();
  }
}

// A storing warp takes every third strip.
template <class Epilogue>
__device__ __forceinline__ void store_packed(const ProductArgs& args,
                                             const typename Epilogue::Args& to, const PairShared& s,
                                             const Pairing& pairing, const TileGrid& grid,
                                             Observer& observer, int warp, int lane) {
  uint32_t phases = 0;
  TilePosition at{};
  for (int32_t index = pairing.first(); find_tile(grid, index, at); index += pairing.step()) {
    const TileWork work = work_of(s, args, pairing, at);
    observer.begin(work.tile, work.steps);
#pragma unroll 1
    for (int strip = warp; strip < kConsumerWarps; strip += kStorers) {
      const int32_t row = work.tile.row + 16 * strip;
      if (row >= work.tile.row_end) break;
      if (at.group == args.experts) {
        Epilogue::clear(to, work.tile, row, lane);
        continue;
      }
      observer.wait({packed(s, strip), phases >> strip & 1, Awaited::packed, strip, 0});
      phases ^= 1u << strip;
      Epilogue::store(to, work.tile, s.staging + strip * kStripBytes, row, lane);
      __syncwarp();
      if (lane == 0) arrive(stored(s, strip));
    }
    observer.end();
  }
}

// C has the rows, and the weights lie along K or (kAlongN) along N.
template <class Epilogue, bool kAlongN>
__global__ void __launch_bounds__(kProductThreads, 1)
    hidden_product(const __grid_constant__ CUtensorMap a_map,
                   const __grid_constant__ CUtensorMap b_map, const ProductArgs args,
                   const GemmPair pair, const typename Epilogue::Args to, const Probe probe) {
  extern __shared__ __align__(1024) char shared[];
  const Pairing pairing{pair, rank_in_cluster()};
  const PairShared s =
      pair_shared(shared, hidden_layout(args.stages, args.experts), pairing.blocks());
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4,
            lane = threadIdx.x % kWarp;
  if (threadIdx.x < 2 * kConsumerWarps) init_barrier(packed(s, threadIdx.x), 1);
  const TileGrid grid = begin_block(&a_map, &b_map, args, s, pairing, kConsumerWarps);
  Observer observer(probe, warpgroup * 4 + warp, lane);
  if (warpgroup < kConsumers) {
    take_registers<kConsumerRegisters>();
    consume_and_pack<Epilogue, kAlongN>(args, to, s, pairing, grid, observer, warpgroup, warp,
                                        lane);
  } else {
    give_registers<kStorerRegisters>();
    if (warp == 0) {
      produce<Epilogue, kAlongN>(&a_map, &b_map, args, to, s, pairing, grid, observer, warp, lane);
    } else {
      store_packed<Epilogue>(args, to, s, pairing, grid, observer, warp - 1, lane);
    }
  }
  end_block(s);
}

}  // namespace moekernels::cuda::sm90
