// route: a stable counting sort of the choices by expert. See moekernels/ops/route.py for the
// meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

// The slots are cut into chunks; each chunk counts on its own, then each places its slots. As the
// sort is stable, the result does not depend on the number of chunks.
struct RouteArgs {
  const void* ids;      // [T, K] int32 or int64, outside [0, E): dropped
  const void* weights;  // [T, K] fp32 or fp64, for drop by weight; else null
  int64_t* counts;      // [E] rows kept
  int64_t* offsets;     // [E+1]
  int32_t* row_of;      // [T, K]
  int32_t* token_of;    // [R]
  int32_t* slot_of;     // [R]
  int32_t*
      begins;  // [chunks, E] scratch: how many, then where each chunk's slots of an expert begin
  int32_t* order;         // [T*K] scratch, only with weights: all slots by expert
  int32_t* order_begins;  // [E+1] scratch beside it, the device's: where an expert's slots begin in
                          // `order`
  int64_t slots, top_k, experts, num_rows, chunks, alignment;
  int64_t chunk_slots;  // slots of a chunk, the device's
  int64_t capacity;     // rows an expert takes at most, < 0: no limit
  bool wide_ids, wide_weights;
};

namespace cuda {
// How many slots a chunk takes; it depends on sizes alone.
int64_t route_chunk_slots(int64_t slots, int64_t experts);
// The blocks of a launch that routes alone: `begins` has a row for each, however few the chunks.
constexpr int64_t kRouteBlocks = 8;
void route(const RouteArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(route_count, const RouteArgs& args, int64_t chunk_begin, int64_t chunk_end)
MOEKERNELS_CPU_KERNEL(route_scan, const RouteArgs& args)
MOEKERNELS_CPU_KERNEL(route_place, const RouteArgs& args, int64_t chunk_begin, int64_t chunk_end)
