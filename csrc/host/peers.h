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
  int64_t label;
};

// How a row lies in memory.
struct Width {
  int64_t row, weight;  // bytes; no weights: 0
};

class Peers : public Slabs {
 public:
  using Slabs::Slabs;

  // A set link: every exchange arrives `latency` nanoseconds behind its last post, and behind
  // those before it at `rate` bytes a nanosecond; 0: as fast as memory is.
  int64_t latency = 0;
  double rate = 0;
  int64_t label = 0;  // what the next exchanges are called in their stamps

  // Rows x[slot_of[r] / K] of the own routing, in expert order, to the peers that hold their
  // experts, with their weights [T, K] behind them: those of the local experts [first, first + n)
  // of each peer. counts [P, e]: own rows for each expert. Returns the exchange's number.
  int post_out(intptr_t x, intptr_t weights, intptr_t slot_of, int64_t slots, int64_t top_k,
               Width width, intptr_t counts, int64_t experts, int64_t first, int64_t n);
  // Waits: into `told` counts [P, n] of the rows from each peer for each local expert, and behind
  // them offsets [n+1] of each expert's among all; R' in all.
  int64_t arrive(int exchange, intptr_t told);
  // rows [room, H] and weights [room] by local expert, then by peer; zeros behind the last, and
  // none of those that find no room.
  void take_out(int exchange, intptr_t rows, intptr_t weights, int64_t room);

  // The way back: rows [room, H] and weights [room] as `take_out` gave them, to whom they came
  // from; zeros go for those that found no room.
  int post_back(intptr_t rows, intptr_t weights, Width width, intptr_t counts, int64_t experts,
                int64_t room);
  // Into rows [R, H] and weights [R] in the order of the own routing, of which counts [P, e] went
  // to each expert: those of the local experts from `first` on, as many as were posted.
  void take_back(int exchange, intptr_t rows, intptr_t weights, intptr_t counts, int64_t experts,
                 int64_t first);

  // Whole tensors. sends[p] bytes of x to peer p, receives[p] from it, in peer order.
  void all_to_all(intptr_t x, intptr_t out, const std::vector<int64_t>& sends,
                  const std::vector<int64_t>& receives, bool stamped);
  // The same `bytes` of x to all.
  void all_gather(intptr_t x, intptr_t out, int64_t bytes, bool stamped);
  void send(int lane, int peer, intptr_t x, int64_t bytes, uint32_t tag);
  void receive(int lane, int peer, uint32_t number, intptr_t out, int64_t bytes, uint32_t tag);

  std::vector<Stamps> take_stamps();

 private:
  struct Exchange {
    bool open = false;
    std::vector<uint32_t> numbers;
    std::vector<Message> messages;
    Stamps stamps{};
    Width width{};
    const char *rows = nullptr, *weights = nullptr;
    const int32_t* slot_of = nullptr;
    const int64_t* own_counts = nullptr;  // [P, e] of the own rows (out), of those that came (back)
    int64_t slots = 0, top_k = 1;
    int64_t all = 0, first = 0, experts = 0;  // e, and which of them
    int64_t room = 0;                         // rows of what is sent back
    std::vector<int64_t> counts;              // [P, n] of the rows that came

    // Own rows [begin, end) of the routing to `row`, their weights to `weight`.
    void copy_own(int64_t begin, int64_t end, char* row, char* weight) const;
    // Rows [begin, begin + n) of what is sent back to `row`, their weights to `weight`.
    void copy_back(int64_t begin, int64_t n, char* row, char* weight) const;
  };

  int open();
  Exchange& at(int exchange);
  void arrive(Exchange& e, uint32_t tag, bool stamped);
  void close(Exchange& e, bool stamped);
  template <class Each>
  void for_peers(const Each& each) {
    for (int i = 1; i < size(); ++i) each((rank() + i) % size());
  }

  std::vector<Exchange> exchanges_;
  std::vector<Stamps> stamps_;
  int64_t link_free_ = 0;
};

void bind_peers(pybind11::module_& m);

}  // namespace moekernels::host
