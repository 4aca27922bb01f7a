// Compiled once for each ISA level: CMake sets MOEKERNELS_ISA to the level's namespace. Ranks on
// one machine have one clock; they meet all the same, so that what each wrote before is seen by
// all.
#include "moekernels/exchange_clock.h"

#include <chrono>

#include "exchange_flags.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

void exchange_clock(const ClockArgs& args) {
  const ClockWords own = args.of(args.rank);
  const uint32_t number = *own.before() + kClockTurns + 1;
  for (int64_t p = 0; p < args.peers; ++p) store_flag(args.of(p).asked(args.rank), number);
  for (int64_t p = 0; p < args.peers; ++p) {
    wait_for_flag(own.asked(p), number, {own.base, args.rank, args.patience});
    args.ahead[p] = 0;
  }
  *own.before() = number;
  args.ahead[args.peers] = nanoseconds();
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
