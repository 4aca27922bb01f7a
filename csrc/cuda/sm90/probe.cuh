// What the products of sm_90a tell of themselves in two builds of their own, at no cost to the
// ordinary one: MOEKERNELS_WATCHDOG bounds every wait and says which one did not end;
// MOEKERNELS_TRACE stamps the parts of every tile.
#pragma once

#include "moekernels/sm90.h"
#include "ptx.cuh"

#ifndef MOEKERNELS_WATCHDOG
#define MOEKERNELS_WATCHDOG 0
#endif
#ifndef MOEKERNELS_TRACE
#define MOEKERNELS_TRACE 0
#endif

namespace moekernels::cuda::sm90 {

// The warps that wait: eight of the consumers, the loading one, the storers of a hidden epilogue.
constexpr int kWatchedWarps = 12, kStuckRecords = kMostGrid * kWatchedWarps;

// A wait that did not end, written by lane 0 of its warp to memory of the host.
struct StuckWait {
  int32_t found, block, warp, awaited, stage, phase, step, group;
};

// An argument of every product, read in those builds alone.
struct Probe {
  StuckWait* stuck;  // [kMostGrid, kWatchedWarps] or null
  int64_t limit_ns;
  int64_t* trace;  // [blocks, kTraceRoles, tiles, kTraceFields] or null
  int32_t blocks, tiles;
};

__device__ inline uint64_t global_timer() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ inline uint64_t clock_now() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t));
  return t;
}
__device__ inline uint32_t sm_id() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}

// What a barrier tells: a stage is free or full, a packed strip is stored or there (hidden.cuh), a
// consumer may multiply (pingpong.cuh).
enum class Awaited : int32_t { empty, full, stored, packed, turn };

// Which barrier a thread waits at, for what, and when. stage: or the strip, or the consumer.
struct WaitAt {
  uint32_t barrier, parity;
  Awaited awaited;
  int32_t stage, step;
};

struct PlainObserver {
  __device__ PlainObserver(const Probe&, int, int) {}
  template <class Tile>
  __device__ void begin(const Tile&, int32_t) {}
  __device__ void wait(const WaitAt& at) { sm90::wait(at.barrier, at.parity); }
  __device__ void sums_done() {}
  __device__ void end() {}
};

struct WatchdogObserver : PlainObserver {
  const Probe& probe;
  int warp, lane;
  int32_t group = 0;

  __device__ WatchdogObserver(const Probe& to, int warp_of_block, int lane_of_warp)
      : PlainObserver(to, warp_of_block, lane_of_warp),
        probe(to),
        warp(warp_of_block),
        lane(lane_of_warp) {}
  template <class Tile>
  __device__ void begin(const Tile& tile, int32_t) {
    group = tile.group;
  }
  __device__ void wait(const WaitAt& at) {
    if (probe.limit_ns == 0) return sm90::wait(at.barrier, at.parity);
    const uint64_t begin = global_timer();
    while (!try_wait(at.barrier, at.parity)) {
      if (global_timer() - begin > static_cast<uint64_t>(probe.limit_ns)) stop(at);
    }
  }

 private:
  __device__ void stop(const WaitAt& at) {
    if (lane == 0 && probe.stuck != nullptr && blockIdx.x < kMostGrid) {
      StuckWait* to = probe.stuck + blockIdx.x * kWatchedWarps + warp;
      *to = {1,        static_cast<int32_t>(blockIdx.x), warp,    static_cast<int32_t>(at.awaited),
             at.stage, static_cast<int32_t>(at.parity),  at.step, group};
      __threadfence_system();
    }
    const uint64_t begin = global_timer();  // the others that are stuck say so too
    while (global_timer() - begin < static_cast<uint64_t>(probe.limit_ns) / 4) {
    }
    __trap();
  }
};

// The first lane of each role writes for it.
struct TraceObserver {
  int64_t* record;  // of the next tile, or null
  int32_t left;
  uint32_t waited = 0;  // cycles

  __device__ TraceObserver(const Probe& probe, int warp, int lane)
      : record(nullptr), left(probe.tiles) {
    const bool writes =
        warp % 4 == 0 && lane == 0 && static_cast<int32_t>(blockIdx.x) < probe.blocks;
    if (writes && probe.trace != nullptr && left > 0) {
      record = probe.trace + int64_t{blockIdx.x * kTraceRoles + warp / 4} * left * kTraceFields;
    }
  }
  template <class Tile>
  __device__ void begin(const Tile& tile, int32_t steps) {
    if (record == nullptr) return;
    waited = 0;
    put(TraceField::globaltimer, global_timer());
    put(TraceField::sm, sm_id());
    put(TraceField::steps, steps);
    put(TraceField::group, tile.group);
    put(TraceField::row, tile.row);
    put(TraceField::column_tile, tile.column_tile);
    put(TraceField::begin, clock_now());
  }
  __device__ void wait(const WaitAt& at) {
    const uint32_t begin = static_cast<uint32_t>(clock_now());
    sm90::wait(at.barrier, at.parity);
    waited += static_cast<uint32_t>(clock_now()) - begin;
  }
  __device__ void sums_done() { put(TraceField::sums_done, clock_now()); }
  __device__ void end() {
    if (record == nullptr) return;
    put(TraceField::end, clock_now());
    put(TraceField::waited, waited);
    record = --left > 0 ? record + kTraceFields : nullptr;
  }

 private:
  __device__ void put(TraceField field, int64_t value) {
    if (record != nullptr) record[static_cast<int>(field)] = value;
  }
};

#if MOEKERNELS_WATCHDOG
using Observer = WatchdogObserver;
#elif MOEKERNELS_TRACE
using Observer = TraceObserver;
#else
using Observer = PlainObserver;
#endif

}  // namespace moekernels::cuda::sm90
