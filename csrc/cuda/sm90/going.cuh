// Results of a product that go straight to their owners, in the order of the owners' rows.
#pragma once

#include "common/home.cuh"
#include "moekernels/exchange.h"
#include "product.cuh"
#include "rows.cuh"

namespace moekernels::cuda::sm90 {

// The rows of a tile count at their owners when all of them are stored there, a unit for each 128
// columns.
struct Returns {
  using Args = Going;
  static constexpr bool kSends = true;
  const Args& to;

  __device__ explicit Returns(const Args& args) : to(args) {}

  // All owners have read what their slots held before. Behind the block's next barrier its threads
  // may write there.
  static __device__ void begin(const Args& to) {
    const PeerSlabs& peers = to.peers;
    if (threadIdx.x >= peers.shape.peers) return;
    const Slab own = peers.own();
    await(own.freed(to.slot, threadIdx.x, true), *own.sent(to.slot, true), own.base, peers.rank,
          peers.patience, peers.stuck);
  }
  __device__ uint32_t* claims() const { return to.peers.own().claims(to.slot); }
  __device__ void await_rows(const ProductShared&, const ProductArgs&, const ProductTile&) {}

  // A lane for each owner.
  static __device__ void tell(const Args& to, const ProductTile& tile, int columns, int lane) {
    const int32_t owners = static_cast<int32_t>(to.peers.shape.peers);
    if (lane >= owners) return;
    const Run* run = to.runs + tile.group * owners + lane;
    const int64_t last = tile.row + kTileRows < tile.row_end ? tile.row + kTileRows : tile.row_end;
    const int64_t begin = run->begin > tile.row ? run->begin : tile.row,
                  end = run[1].begin < last ? run[1].begin : last;
    if (end <= begin) return;
    const int32_t left = to.width - tile.column_tile * columns;
    const int64_t units = home_units(left < columns ? left : columns);
    count_home(to.peers.of(lane), to.slot, run->place + begin - run->begin, end - begin, units);
  }
};

// The rows of StoreRows, each to its place in the slot of its owner; weights go with the first
// columns.
template <class T, int kColumnsOfTile>
struct PushRows {
  using Type = T;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr bool kPrefetches = false;
  struct Args {
    Going to;
    const T* bias;  // [E, width] or null
    RowUse use;
  };

  template <class Tile>
  static __device__ void prefetch(const Args&, const Tile&, int) {}
  template <class Tile>
  static __device__ void clear(const Args&, const Tile&, int64_t, int) {}

  struct Place {
    char* row;  // null: there is no room
    float* weight;
  };
  template <class Tile>
  static __device__ Place place_of(const Going& to, const Tile& tile, int64_t row) {
    if (row >= tile.row_end) return {nullptr, nullptr};
    const int32_t owners = static_cast<int32_t>(to.peers.shape.peers);
    const Run* runs = to.runs + tile.group * owners;
    int32_t owner = 0;
#pragma unroll 1
    for (int32_t p = 1; p < owners; ++p) {
      if (runs[p].begin <= row) owner = p;
    }
    const int64_t at = runs[owner].place + row - runs[owner].begin;
    const Slab slab = to.peers.of(owner);
    if (at >= slab.shape.back) return {nullptr, nullptr};
    return {slab.rows(to.slot, true) + at * to.width * static_cast<int64_t>(sizeof(T)),
            reinterpret_cast<float*>(slab.weights(to.slot, true)) + at};
  }

  template <class Tile>
  static __device__ void store(const Args& args, const Tile& tile, float (&d)[kColumns / 2],
                               char* staging, int64_t row, int lane) {
    if (row >= tile.row_end) return;
    const int64_t width = args.to.width;
    float weight[2];
    bool used[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + lane / 4 + 8 * half;
      used[half] = r < tile.row_end && args.use.used(r);
      weight[half] = used[half] ? args.use.weight(r) : 0.0f;
    }
    if (args.bias != nullptr) {
      const int64_t column = int64_t{tile.column_tile} * kColumns + lane * 8;
      const bool exists = column < width;
      add_bias<T>(d, exists ? get(args.bias + tile.group * width + column) : uint4{}, staging,
                  lane);
    }
    const Place place = place_of(args.to, tile, row + lane % 16);
    if (args.to.weights != nullptr && tile.column_tile == 0 && lane < 16 && place.row != nullptr)
      *place.weight = args.to.weights[row + lane];
#pragma unroll
    for (int part = 0; part < kColumns / 128; ++part) {
      const int64_t column = int64_t{tile.column_tile} * kColumns + part * 128;
      if (column >= width) break;
      stage_rows(staging, lane, [&](int block, int half) {
        const float* c = d + (part * 16 + block) * 4 + half * 2;
        return used[half] ? pack<T>(c[0] * weight[half], c[1] * weight[half]) : 0u;
      });
      const int64_t at = column + lane % 16 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint64_t to =
            __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(place.row), i * 2 + lane / 16);
        const uint4 chunk = staged_chunk(staging, i * 2 + lane / 16, lane % 16);
        put_if(to != 0 && at < width, reinterpret_cast<T*>(to) + at, chunk);
      }
    }
  }
};

}  // namespace moekernels::cuda::sm90
