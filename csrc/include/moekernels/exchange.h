// exchange: rows put straight into memory that ranks share, to their place by expert, and results
// pushed back to theirs. See moekernels/ops/exchange.py for the meaning.
//
// Every rank has a slab, which all ranks of the group address. Exchanges go through its slots in
// turn; no counter is ever reset: what is awaited grows with every use, and so wraps around with
// it. A counter is one 32-bit word. Numbers of uses lie in the slab, not in arguments, so a
// recorded launch can be repeated.
#pragma once

#include "moekernels/experts.h"
#include "moekernels/grouped_gemm.h"

namespace moekernels {

inline constexpr int kMostPeers = 16;
// Rows that come home are counted by so many, in the order of their owner's routing: whoever sums
// them begins with those that are here.
inline constexpr int64_t kHomeRows = 64;

// The same for all ranks of a group.
struct SlabShape {
  int64_t peers, experts;  // P; e, the experts of each
  int64_t slots;
  int64_t rows;       // that a slot takes in from all peers
  int64_t back;       // that come home to a slot
  int64_t row_bytes;  // of the widest row
};

// Where things lie in a slab.
struct Slab {
  char* base;
  SlabShape shape;

  static constexpr int64_t kLine = 128, kWeightBytes = 8;
  static constexpr int64_t kTickets = 4;  // send and receive, out and back

  // Written by peers: [P] number of the last counts that each wrote.
  MOEKERNELS_BOTH uint32_t* ready(int64_t peer) const { return words(0) + peer; }
  // [P, P*e] rows of each source for each expert of all, of two calls in turn.
  MOEKERNELS_BOTH int32_t* table(uint32_t number) const {
    const int64_t bytes = lines(shape.peers * shape.peers * shape.experts * 4);
    return reinterpret_cast<int32_t*>(base + lines(shape.peers * 4) + number % 2 * bytes);
  }
  // Rows that have come for each local expert, and home for each block of kHomeRows.
  MOEKERNELS_BOTH uint32_t* arrived(int64_t slot, int64_t expert) const {
    return words(flags_at() + slot * flag_bytes()) + expert;
  }
  MOEKERNELS_BOTH uint32_t* returned(int64_t slot, int64_t block) const {
    return arrived(slot, shape.experts) + block;
  }
  MOEKERNELS_BOTH int64_t home_blocks() const {
    return shape.back > kHomeRows ? (shape.back + kHomeRows - 1) / kHomeRows : 1;
  }
  // How often a peer has read what this rank put into its slot.
  MOEKERNELS_BOTH uint32_t* freed(int64_t slot, int64_t peer, bool back) const {
    return returned(slot, home_blocks()) + (back ? shape.peers : 0) + peer;
  }

  // Written by this rank alone, between launches: how often it has called, sent and received.
  MOEKERNELS_BOTH uint32_t* called() const { return words(state_at()); }
  MOEKERNELS_BOTH uint32_t* sent(int64_t slot, bool back) const {
    return words(state_at() + kLine + slot * state_bytes()) + back;
  }
  MOEKERNELS_BOTH uint32_t* received(int64_t slot, bool back) const { return sent(slot, back) + 2; }
  MOEKERNELS_BOTH uint32_t* ticket(int64_t slot, bool back, bool send) const {
    return sent(slot, back) + 4 + (send ? 2 : 0);
  }
  // What `arrived` and, behind them, `returned` had reached before this use.
  MOEKERNELS_BOTH uint32_t* expected(int64_t slot, int64_t expert) const {
    return sent(slot, false) + 4 + kTickets + expert;
  }

  // Which tile a product of this slot's rows claims next; zero between launches.
  MOEKERNELS_BOTH uint32_t* claims(int64_t slot) const {
    return expected(slot, shape.experts + home_blocks());
  }

  MOEKERNELS_BOTH char* rows(int64_t slot, bool back) const {
    return base + data_at() + slot * data_bytes() + (back ? part_bytes(shape.rows) : 0);
  }
  MOEKERNELS_BOTH char* weights(int64_t slot, bool back) const {
    return rows(slot, back) + lines((back ? shape.back : shape.rows) * shape.row_bytes);
  }
  MOEKERNELS_BOTH int64_t bytes() const { return data_at() + shape.slots * data_bytes(); }

 private:
  MOEKERNELS_BOTH static int64_t lines(int64_t bytes) {
    return (bytes + kLine - 1) / kLine * kLine;
  }
  MOEKERNELS_BOTH uint32_t* words(int64_t at) const {
    return reinterpret_cast<uint32_t*>(base + at);
  }
  MOEKERNELS_BOTH int64_t flags_at() const {
    return lines(shape.peers * 4) + 2 * lines(shape.peers * shape.peers * shape.experts * 4);
  }
  MOEKERNELS_BOTH int64_t flag_bytes() const {
    return lines((shape.experts + home_blocks() + 2 * shape.peers) * 4);
  }
  MOEKERNELS_BOTH int64_t state_at() const { return flags_at() + shape.slots * flag_bytes(); }
  MOEKERNELS_BOTH int64_t state_bytes() const {
    return lines((4 + kTickets + shape.experts + home_blocks() + 1) * 4);
  }
  MOEKERNELS_BOTH int64_t data_at() const {
    return state_at() + kLine + shape.slots * state_bytes();
  }
  MOEKERNELS_BOTH int64_t part_bytes(int64_t rows) const {
    return lines(rows * shape.row_bytes) + lines(rows * kWeightBytes);
  }
  MOEKERNELS_BOTH int64_t data_bytes() const {
    return part_bytes(shape.rows) + part_bytes(shape.back);
  }
};

// When what happened of one exchange: words that every rank has, in nanoseconds of its own clock
// but where a peer wrote them, in that one's. moekernels/parallel/device_stamps.py reads them.
struct Record {
  int64_t* word;

  static constexpr int64_t kOwn = 8, kEach = 3;
  MOEKERNELS_BOTH static int64_t words(int64_t peers) { return kOwn + kEach * peers; }
  // The first of some moments is kept as the greatest of how long before the end of all time they
  // are: what nobody wrote is zero.
  MOEKERNELS_BOTH static int64_t early(int64_t time) { return INT64_MAX - time; }

  // When somebody first asked for rows; early.
  MOEKERNELS_BOTH int64_t* need() const { return word; }
  // For how long readers waited, in all, and how many asked at all: blocks of the product that
  // reads rows while they come, warps of the kernel that takes them.
  MOEKERNELS_BOTH int64_t* waited(bool taking) const { return word + (taking ? 3 : 1); }
  MOEKERNELS_BOTH int64_t* readers(bool taking) const { return waited(taking) + 1; }
  MOEKERNELS_BOTH int64_t* copied() const { return word + 5; }  // the most that a warp took to
  MOEKERNELS_BOTH int64_t* rows() const { return word + 6; }    // that came
  // When blocks of this rank began to send, until the last of them tells peers; early.
  MOEKERNELS_BOTH int64_t* sending() const { return word + 7; }
  // Of each peer, by its clock: when it began to send, and had given this rank its last row; then,
  // by the own clock, when this rank had given it the last of its own.
  MOEKERNELS_BOTH int64_t* began(int64_t peer) const { return word + kOwn + peer * kEach; }
  MOEKERNELS_BOTH int64_t* ended(int64_t peer) const { return began(peer) + 1; }
  MOEKERNELS_BOTH int64_t* given(int64_t peer) const { return began(peer) + 2; }
};

struct PeerSlabs {
  char* slab[kMostPeers];  // by value: an address is no dependent load
  SlabShape shape;
  int64_t rank;
  int64_t patience;             // nanoseconds after which a wait gives up; 0: never
  int64_t* stuck;               // [4] rank, offset of the word in the slab, value, wanted; or null
  int64_t* record[kMostPeers];  // of this exchange, at every rank; or null

  MOEKERNELS_BOTH Slab of(int64_t peer) const { return {slab[peer], shape}; }
  MOEKERNELS_BOTH Slab own() const { return of(rank); }
  MOEKERNELS_BOTH bool stamped() const { return record[0] != nullptr; }
  MOEKERNELS_BOTH Record stamps(int64_t peer) const { return {record[peer]}; }
};

// A run: rows from `begin` on, up to the next one's, go to `place` and after in the peer's slot.
struct Run {
  int64_t begin, place;
};

struct CountsArgs {
  PeerSlabs peers;
  const int64_t* counts;  // [P*e] own rows for each expert; negative counts are none
  int64_t room;           // rows of those that come for which there is memory
  int64_t* came;          // [P, e] rows from each peer for each local expert
  int64_t* offsets;       // [e+1] where each local expert's rows begin
  int64_t* held;          // [e+1] the same, none beyond the room
  Run* out;               // [P*e+1] own rows by expert; the last begins behind all
  Run* back;              // [e*P+1] rows that came, by local expert, then by peer
  int64_t* needed;        // [2] the most rows that come to any rank, and that any sends
  int64_t* most;          // [1] grows to the first of them, or null
};

struct SendArgs {
  PeerSlabs peers;
  const void* rows;         // [*, H]
  const void* weights;      // of the rows' slots, or null
  const int32_t* slot_of;   // [R] where row r is slot_of[r] / top_k, or null: rows as they lie
  int64_t top_k, slots_of;  // slots_of: T*K, slots outside are not sent
  const Run* runs;
  int64_t num_runs, num_rows;  // of runs that reach beyond the rows, zeros are sent
  int64_t row_bytes, weight_bytes;
  int64_t slot;
  bool back;
  int64_t first = 0;  // a product has sent the rows before this one
  int64_t units = 1;  // that a row counts
};

struct ReceiveArgs {
  PeerSlabs peers;
  const int64_t* offsets;  // [e+1] by local expert, or null on the way back
  const int64_t* total;    // [1] rows that come
  void* rows;              // [num_rows, H]; behind those that came, zeros
  void* weights;           // [num_rows], or null
  int64_t num_rows;
  int64_t row_bytes, weight_bytes;
  int64_t slot;
  bool back;
  int64_t units = 1;
};

// Rows of a slot that may still be on their way: a product reads those of an expert once all of
// them have come (csrc/cuda/sm90/arriving.cuh). They are received in a later launch.
struct Arriving {
  PeerSlabs peers;
  int64_t slot;
  const int64_t* offsets;  // [e+1] of all that come
};

// The rows [begin, begin + count) of a slot's way home that are of a block.
MOEKERNELS_BOTH inline int64_t rows_of_block(int64_t block, int64_t begin, int64_t count) {
  const int64_t first = block * kHomeRows, end = first + kHomeRows;
  const int64_t from = begin > first ? begin : first;
  const int64_t to = begin + count < end ? begin + count : end;
  return to > from ? to - from : 0;
}

// Where a product's rows go home to (csrc/cuda/sm90/going.cuh); a row counts a unit for each
// kHomeColumns columns. Rows that it does not have are sent in a later launch.
struct Going {
  PeerSlabs peers;
  int64_t slot;
  const Run* runs;       // [e*P+1]
  const float* weights;  // [R] that go with the rows, or null
  int32_t width;
};
inline constexpr int kHomeColumns = 128;
MOEKERNELS_BOTH inline int64_t home_units(int64_t width) {
  return width > kHomeColumns ? (width + kHomeColumns - 1) / kHomeColumns : 1;
}

namespace cuda {
void gather_counts(const CountsArgs& args, Stream stream);
void send_rows(const SendArgs& args, Stream stream);
void receive_rows(const ReceiveArgs& args, Stream stream);

// Products over rows of an exchange; false: none is for these arguments, and nothing has run. x, or
// dy, is the slot's memory; what goes home needs no y or out.
bool experts_up(const ExpertsUpArgs& args, const Arriving& from, Stream stream);
bool experts_dact(const ExpertsDActArgs& args, const Arriving& from, Stream stream);
bool experts_down(const ExpertsDownArgs& args, const Going& home, Stream stream);
bool grouped_gemm(const GroupedGemmArgs& args, const Going& home, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(gather_counts, const CountsArgs& args)
MOEKERNELS_CPU_KERNEL(send_rows, const SendArgs& args)
MOEKERNELS_CPU_KERNEL(receive_rows, const ReceiveArgs& args)
