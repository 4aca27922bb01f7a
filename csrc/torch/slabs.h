// The slabs of an exchange, checked, and what its bindings share.
#pragma once

#include <vector>

#include "device.h"
#include "moekernels/exchange.h"

namespace moekernels::binding {

using Numbers = std::vector<int64_t>;

inline constexpr int64_t kAligned = 16;  // bytes of the widest word that a slab is written in

inline SlabShape shape_from(const char* op, const Numbers& shape) {
  check(shape.size() == 6, op,
        ": shape must be [peers, experts, slots, rows, back, row_bytes], got ", shape.size(),
        " numbers");
  const SlabShape s{.peers = shape[0],
                    .experts = shape[1],
                    .slots = shape[2],
                    .rows = shape[3],
                    .back = shape[4],
                    .row_bytes = shape[5]};
  check(s.peers >= 1 && s.peers <= kMostPeers, op, ": peers must be 1 to ", kMostPeers, ", got ",
        s.peers);
  check(s.experts >= 1 && s.slots >= 1, op, ": experts and slots must be at least 1, got ",
        s.experts, " and ", s.slots);
  check(s.rows >= 0 && s.back >= 0 && s.row_bytes >= 0, op,
        ": rows, back and row_bytes must not be negative, got ", s.rows, ", ", s.back, ", ",
        s.row_bytes);
  return s;
}

// Who a wait that gives up says so to, or null.
inline int64_t* stuck_from(const char* op, const OptionalTensor& stuck) {
  if (!stuck) return nullptr;
  check(stuck->scalar_type() == ScalarType::Long && stuck->numel() == 4, op,
        ": stuck must be int64 [4], got ", name_of(stuck->scalar_type()), " ", shape_of(*stuck));
  return const_cast<int64_t*>(stuck->const_data_ptr<int64_t>());
}

// The slabs of all ranks; `slab` is this rank's own. `record`: the addresses of this exchange's
// stamps at every rank, or nothing.
inline PeerSlabs slabs_from(const char* op, const Tensor& slab, const Numbers& addresses,
                            int64_t rank, const Numbers& shape, int64_t patience,
                            const OptionalTensor& stuck, const Numbers& record) {
  PeerSlabs peers{};
  peers.shape = shape_from(op, shape);
  check_tensor(op, "slab", slab, {ScalarType::Byte},
               {{"bytes", Slab{nullptr, peers.shape}.bytes()}});
  check(static_cast<int64_t>(addresses.size()) == peers.shape.peers, op, ": addresses must be ",
        peers.shape.peers, " numbers, one a rank, got ", addresses.size());
  check(rank >= 0 && rank < peers.shape.peers, op, ": rank must be 0 to ", peers.shape.peers - 1,
        ", got ", rank);
  const int64_t own = reinterpret_cast<int64_t>(slab.const_data_ptr());
  check(addresses[rank] == own || addresses[rank] == 0, op, ": addresses[", rank,
        "] must be the slab's own address, or 0");
  for (int64_t p = 0; p < peers.shape.peers; ++p) {
    const int64_t address = p == rank ? own : addresses[p];
    check(address != 0 && address % kAligned == 0, op, ": addresses[", p,
          "] must be a multiple of ", kAligned, ", got ", address);
    peers.slab[p] = reinterpret_cast<char*>(address);
  }
  peers.rank = rank;
  check(patience >= 0, op, ": patience must not be negative, got ", patience);
  peers.patience = patience;
  peers.stuck = stuck_from(op, stuck);
  check(record.empty() || static_cast<int64_t>(record.size()) == peers.shape.peers, op,
        ": record must be ", peers.shape.peers, " addresses, one a rank, or none, got ",
        record.size());
  for (size_t p = 0; p < record.size(); ++p) {
    check(record[p] != 0 && record[p] % 8 == 0, op, ": record[", p,
          "] must be a multiple of 8, got ", record[p]);
    peers.record[p] = reinterpret_cast<int64_t*>(record[p]);
  }
  return peers;
}

inline void check_slot(const char* op, const SlabShape& shape, int64_t slot, int64_t row_bytes) {
  check(slot >= 0 && slot < shape.slots, op, ": slot must be 0 to ", shape.slots - 1, ", got ",
        slot);
  check(row_bytes <= shape.row_bytes, op, ": rows of ", row_bytes,
        " bytes are wider than the slab's ", shape.row_bytes);
}

inline const Run* runs_from(const char* op, const Tensor& runs, const SlabShape& shape,
                            const Tensor& like) {
  check_tensor(op, "runs", runs, kInt64, {{"runs", shape.peers * shape.experts + 1}, {"2", 2}},
               &like);
  return static_cast<const Run*>(runs.const_data_ptr());
}

}  // namespace moekernels::binding
