// The exchange of rows and of whole tensors between the ranks of one machine, over `Slabs`.
//
// Every call is made by all ranks of the group in the same order. A post gives the own rows away
// and does not wait; the take that goes with it does. Addresses are those of contiguous CPU
// tensors, and stay valid from the post to the end of the take.
//
// Legend: T tokens, K top-k, E = P*e experts, e of each of P peers, R own rows, R' rows that come.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "slabs.h"

namespace moekernels::host {

// When what happened of one exchange, in nanoseconds of `now`, and what it moved.
struct Stamps {
  int64_t post;    // own rows were given away
  int64_t last;    // the last peer had given its away
  int64_t ready;   // all of them were here
  int64_t need;    // somebody asked for them
  int64_t got;     // who asked went on: a wait also takes what waking up does
  int64_t moving;  // nanoseconds in which this core moved rows
  int64_t bytes;   // that came from peers
  int64_t label;   // 4 x the layer + which of an exchange's `Way`s; `kWhole`: of whole tensors
};
enum Way { kOut, kBack, kGradOut, kGradBack };
inline constexpr int64_t kWhole = -1;

// What messages are, beside the tags of `send`.
enum Tag : uint32_t { kRowsOut = 1u << 31, kRowsBack, kAll, kGather, kParts, kSame };

// How a row lies in memory.
struct Width {
  int64_t row, weight;  // bytes; no weights: 0
};

// Local experts [first, end) of every peer.
struct Part {
  int64_t first, end;
  int64_t size() const { return end - first; }
  bool operator==(const Part&) const = default;
};

// Where the rows of one microbatch go in one layer: the own routing, whose addresses stay valid as
// long as this lives, and what came by it.
class Route {
 public:
  // token_of, slot_of [R]: t and t*K + k of the own rows, in expert order. outgoing [P, e]: how
  // many there are for each expert.
  Route(int64_t layer, int peers, int64_t experts, int64_t tokens, int64_t top_k, intptr_t token_of,
        intptr_t slot_of, intptr_t outgoing);

  // Of the own rows, the first for a peer's local expert x, or its next peer's where x is e.
  int64_t begin(int peer, int64_t x) const { return begins_[peer * experts + x]; }
  const int64_t* outgoing(int peer) const { return outgoing_ + peer * experts; }
  // Own rows [first, end) of x [T, H] to `row`, of weights [T, K] to `weight`.
  void copy(const char* x, const char* weights, Width width, int64_t first, int64_t end, char* row,
            char* weight) const;

  // [P, n] of the rows that came from each peer for each local expert of a part: room for them, or
  // what was told; std::runtime_error where nothing was.
  std::vector<int64_t>& room(Part part);
  const std::vector<int64_t>& came(Part part) const;

  const int64_t layer, experts;  // of a peer

 private:
  template <class Weight>
  void copy_as(const char* x, const char* weights, int64_t row_bytes, int64_t first, int64_t end,
               char* row, char* weight) const;

  struct Came {
    Part part;
    std::vector<int64_t> counts;
  };
  const int32_t *token_of_, *slot_of_;
  const int64_t* outgoing_;
  uint64_t tokens_, slots_;
  std::vector<int64_t> begins_;  // [E + 1]
  std::vector<Came> came_;
};

class Peers : public Slabs {
 public:
  using Slabs::Slabs;

  // A set link: every exchange arrives `latency` nanoseconds behind its last post, and behind
  // those before it at `rate` bytes a nanosecond; 0: as fast as memory is.
  int64_t latency = 0;
  double rate = 0;

  // Rows of x [T, H] to the peers that hold their experts, with their weights [T, K] behind them:
  // those of a part of each peer's. Returns the exchange's number.
  int post_out(Route& route, intptr_t x, intptr_t weights, Width width, Part part);
  // Waits, and tells the route how many come from whom; R' in all.
  int64_t arrive(int exchange);
  // rows [room, H] and weights [room] by local expert, then by peer; zeros behind the last, and
  // none of those that find no room. Where each expert's rows begin: offsets [n+1], unless 0.
  void take_out(int exchange, intptr_t rows, intptr_t weights, intptr_t offsets, int64_t room);

  // The way back: rows [room, H] and weights [room] as `take_out` gave them, to whom they came
  // from; zeros go for those that found no room.
  int post_back(Route& route, intptr_t rows, intptr_t weights, Width width, int64_t room,
                Part part);
  // Into rows [R, H] and weights [R] in the order of the own routing: those of the part.
  void take_back(int exchange, intptr_t rows, intptr_t weights);

  // Whole tensors. sends[p] bytes of x to peer p, receives[p] from it, in peer order.
  void all_to_all(intptr_t x, intptr_t out, const std::vector<int64_t>& sends,
                  const std::vector<int64_t>& receives, bool stamped);
  // The same `bytes` of x to all.
  void all_gather(intptr_t x, intptr_t out, int64_t bytes, bool stamped);
  // Sums over the ranks, in their order: of x [P, n] the own part's, or of x [n]; in fp32 at least.
  // `kind` of element: 0 fp32, 1 fp64, 2 bf16.
  void reduce_scatter(intptr_t x, intptr_t out, int64_t n, int kind) { sum(x, out, n, kind, true); }
  void all_reduce(intptr_t x, intptr_t out, int64_t n, int kind) { sum(x, out, n, kind, false); }
  void send(int lane, int peer, intptr_t x, int64_t bytes, uint32_t tag);
  void receive(int lane, int peer, uint32_t number, intptr_t out, int64_t bytes, uint32_t tag);

  std::vector<Stamps> take_stamps();

 private:
  struct Exchange {
    bool open = false;
    std::vector<uint32_t> numbers;
    std::vector<Message> messages;
    Stamps stamps{};
    Route* route = nullptr;
    Part part{};
    Width width{};
    const char *rows = nullptr, *weights = nullptr;
    int64_t room = 0;             // rows of what is sent back
    std::vector<int64_t> sizes;   // [P] that came
    std::vector<int64_t> placed;  // [P] of them
    std::vector<int64_t> begins;  // [P, n] of what is sent back, where they lie by expert

    // Rows [begin, begin + n) of what is sent back to `row`, their weights to `weight`.
    void copy_back(int64_t begin, int64_t n, char* row, char* weight) const;
  };

  int open(int64_t label);
  int post_rows(Route& route, intptr_t rows, intptr_t weights, Width width, Part part, Way way);
  // Where the rows of each expert begin among those that found room.
  void tell(const std::vector<int64_t>& counts, int64_t experts, int64_t room,
            int64_t* offsets) const;
  Exchange& at(int exchange);
  void arrive(Exchange& e, uint32_t tag, bool stamped);
  void close(Exchange& e, bool stamped);
  void sum(intptr_t x, intptr_t out, int64_t n, int kind, bool apart);
  template <class Each>
  void for_peers(const Each& each) {
    for (int i = 1; i < size(); ++i) each((rank() + i) % size());
  }

  std::vector<Exchange> exchanges_;
  std::vector<Stamps> stamps_;
  int64_t link_free_ = 0;
};

// std::runtime_error where they differ.
void expect_bytes(int peer, uint64_t came, int64_t wanted);

void bind_peers(pybind11::module_& m);

}  // namespace moekernels::host
