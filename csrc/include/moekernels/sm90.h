// Beside the wgmma products: settings that may change from launch to launch, and what the watchdog
// and trace builds of the library record. None changes a bit of any result.
#pragma once

#include "moekernels/common.h"

namespace moekernels::cuda::sm90 {

// 0: as the table of tiles and the launcher's arithmetic say.
struct Settings {
  int stages =
      0;  // of the ring, 2 or more; a launch for which shared memory has no room for them fails
  int band = 0;  // rows of tiles that are worked off column by column; -n: at most n, a group's
                 // bands of one height
  int grid = 0;  // blocks, where there are as many tiles
  int promotion = 0;  // bytes that a load brings to L2: 64, 128 or 256
  int prefetch =
      -1;  // 1: what an epilogue reads comes to L2 while the product runs; -1: as the table says
  int bulk_sums = -1;  // 1: L2 adds to fp32 gradients; 0: threads load, add and store; -1: as the
                       // table says
  int style = -1, pair = -1;  // GemmStyle, GemmPair; a launch that has no such kernel fails
  int gather = -1;  // 1: products of the direct style gather x's rows; 0: they are permuted before;
                    // -1: as the table says, and where it does not, the columns that each row meets
  int join = -1;    // 1: the weights' gradients of several microbatches are added by one launch; 0:
                    // by one each; -1: as the table says, and where it does not, of few rows that
                    // nobody gathers
  int chain = -1, route_at_once = -1;  // of LaunchOrder; -1: as kLaunchOrder says
};
constexpr int kMostBand = 64, kMostGrid = 1024, kLoggedLaunches = 64;

// What the kernels of this library were compiled as.
enum class Build : int { plain, watchdog, trace };

// Of a traced tile, in one row of numbers: the device's clock in ns, then the SM's in cycles.
enum class TraceField : int {
  globaltimer,
  begin,
  sums_done,
  end,
  waited,
  sm,
  steps,
  group,
  row,
  column_tile
};
constexpr int kTraceFields = 10, kTraceRoles = 3;  // roles: two consumer warpgroups, the producer

// For every launch of this process from now on.
void set(const Settings& settings);
Build build();
// A wait that lasts longer stops the kernel; 0: none does.
void watch(int64_t limit_ns);
// Which waits were stopped, in words; empty: none.
const char* stuck();
// The products launched since this was last asked, at most the last kLoggedLaunches:
// "experts_up_sm90,experts_down_sm90".
const char* launched();
// The next launches write records [launches, blocks, kTraceRoles, tiles, kTraceFields] of their
// first blocks and tiles.
void trace(int64_t* records, int64_t launches, int64_t blocks, int64_t tiles);

}  // namespace moekernels::cuda::sm90
