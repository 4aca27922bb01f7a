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

  __device__ explicit Arrivals(const Args& args) : from(args) {}  // one thread of a block
  static __device__ void begin(const Args&) {}
  __device__ uint32_t* claims() const { return from.peers.own().claims(from.slot); }

  // A load of the tile brings 128 rows, whosever they are: it waits for the experts of all.
  __device__ void await_rows(const ProductShared& s, const ProductArgs& args,
                             const ProductTile& tile) {
    const PeerSlabs& peers = from.peers;
    const Slab own = peers.own();
    if (peers.stamped() && come == 0) note_sum(peers.stamps(peers.rank).readers(false), 1);
    bool waited = false;
#pragma unroll 1
    for (; come < args.experts && (come <= tile.group || s.row_begin[come] < tile.row + kTileRows);
         ++come) {
      const int64_t rows = from.offsets[come + 1] - from.offsets[come];
      if (rows == 0) continue;
      if (peers.stamped()) note_need();
      await(own.arrived(from.slot, come),
            *own.expected(from.slot, come) + static_cast<uint32_t>(rows), own.base, peers.rank,
            peers.patience, peers.stuck);
      if (peers.stamped()) note_got();
      waited = true;
    }
    if (waited) fence_arrived();
  }

 protected:
  // The time between the two is added up as the second less the first: no register holds it.
  __device__ void note_need() const {
    const Record stamps = from.peers.stamps(from.peers.rank);
    const int64_t now = nanoseconds();
    note_most(stamps.need(), Record::early(now));
    note_sum(stamps.waited(false), -now);
  }
  __device__ void note_got() const {
    note_sum(from.peers.stamps(from.peers.rank).waited(false), nanoseconds());
  }
};

}  // namespace moekernels::cuda::sm90
