// What a product knows of peers: rows that are still on their way to it.
#pragma once

#include "common/flags.cuh"
#include "moekernels/exchange.h"
#include "product.cuh"

namespace moekernels::cuda::sm90 {

// What peers wrote before the acquire is seen by TMA after.
__device__ inline void fence_arrived() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Rows of a slot, read before all have come. They are not taken: whoever receives the slot counts
// on and frees it, in a later launch.
struct Arrivals {
  using Args = Arriving;
  static constexpr bool kSends = false;
  const Args& from;
  int32_t come = 0;  // the experts before this one have all their rows

  __device__ explicit Arrivals(const Args& args) : from(args) {}
  static __device__ void begin(const Args&) {}
  __device__ uint32_t* claims() const { return from.peers.own().claims(from.slot); }

  // A load of the tile brings 128 rows, whosever they are: it waits for the experts of all.
  __device__ void await_rows(const ProductShared& s, const ProductArgs& args,
                             const ProductTile& tile) {
    const PeerSlabs& peers = from.peers;
    const Slab own = peers.own();
    bool waited = false;
#pragma unroll 1
    for (; come < args.experts && (come <= tile.group || s.row_begin[come] < tile.row + kTileRows);
         ++come) {
      const int64_t rows = from.offsets[come + 1] - from.offsets[come];
      if (rows == 0) continue;
      await(own.arrived(from.slot, come),
            *own.expected(from.slot, come) + static_cast<uint32_t>(rows), own.base, peers.rank,
            peers.patience, peers.stuck);
      waited = true;
    }
    if (waited) fence_arrived();
  }
};

}  // namespace moekernels::cuda::sm90
