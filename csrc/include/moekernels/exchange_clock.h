// exchange_clock: what the clocks of ranks that exchange rows differ by, found by asking each other
// the time over memory that they share. See moekernels/ops/exchange_clock.py for the meaning.
#pragma once

#include "moekernels/exchange.h"

namespace moekernels {

// What each rank has for the others to write, 16 bytes for each; no word is ever reset.
struct ClockWords {
  char* base;
  int64_t peers;

  static constexpr int64_t kEach = 16;
  // By the peer: how often it has asked, and answered.
  MOEKERNELS_BOTH uint32_t* asked(int64_t peer) const { return words(peer * kEach); }
  MOEKERNELS_BOTH uint32_t* answered(int64_t peer) const { return words(peer * kEach) + 1; }
  // The time of its answer, or behind the last what it found.
  MOEKERNELS_BOTH int64_t* time(int64_t peer) const {
    return reinterpret_cast<int64_t*>(base + peer * kEach + 8);
  }
  // By this rank, between launches: how often each pair had asked.
  MOEKERNELS_BOTH uint32_t* before() const { return words(peers * kEach); }
  MOEKERNELS_BOTH static int64_t bytes(int64_t peers) { return (peers + 1) * kEach; }

 private:
  MOEKERNELS_BOTH uint32_t* words(int64_t at) const {
    return reinterpret_cast<uint32_t*>(base + at);
  }
};

struct ClockArgs {
  char* words[kMostPeers];
  int64_t peers, rank;
  int64_t patience;  // nanoseconds after which a wait gives up; 0: never
  int64_t* stuck;    // [4] rank, offset of the word, value, wanted; or null
  int64_t* ahead;    // [P+1] nanoseconds by which each peer's clock is ahead; then the own time

  MOEKERNELS_BOTH ClockWords of(int64_t peer) const { return {words[peer], peers}; }
};
inline constexpr uint32_t kClockTurns = 8;  // of asking; the quickest answer counts

namespace cuda {
void exchange_clock(const ClockArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(exchange_clock, const ClockArgs& args)
