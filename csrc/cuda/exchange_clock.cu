// One block, a warp for each peer: the lower rank of a pair asks the other's time, and tells it
// what it found.
#include "moekernels/exchange_clock.h"

#include "common/flags.cuh"
#include "common/launch.cuh"

namespace moekernels::cuda {
namespace {

__global__ void __launch_bounds__(kMostPeers* kWarp) read_clocks(const ClockArgs args) {
  const int64_t peer = threadIdx.x / kWarp;
  const ClockWords own = args.of(args.rank), there = args.of(peer);
  const uint32_t before = *own.before(), last = before + kClockTurns + 1;
  const auto wait = [&](const uint32_t* word, uint32_t least) {
    await(word, least, own.base, args.rank, args.patience, args.stuck);
  };
  if (threadIdx.x % kWarp == 0) {
    int64_t ahead = 0;
    if (args.rank < peer) {
      int64_t quickest = INT64_MAX;
      for (uint32_t turn = before + 1; turn != last; ++turn) {
        const int64_t begin = nanoseconds();
        store_release(there.asked(args.rank), turn);
        wait(own.answered(peer), turn);
        const int64_t took = nanoseconds() - begin;
        if (took < quickest) {
          quickest = took;
          ahead = *own.time(peer) - (begin + took / 2);
        }
      }
      *there.time(args.rank) = ahead;
      store_release(there.asked(args.rank), last);
    } else if (args.rank > peer) {
      for (uint32_t turn = before + 1; turn != last; ++turn) {
        wait(own.asked(peer), turn);
        *there.time(args.rank) = nanoseconds();
        store_release(there.answered(args.rank), turn);
      }
      wait(own.asked(peer), last);
      ahead = -*own.time(peer);
    }
    args.ahead[peer] = ahead;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *own.before() = last;
    args.ahead[args.peers] = nanoseconds();
  }
}

}  // namespace

void exchange_clock(const ClockArgs& args, Stream stream) {
  launch("exchange_clock", read_clocks, 1, static_cast<int>(args.peers) * kWarp, 0, stream, args);
}

}  // namespace moekernels::cuda
