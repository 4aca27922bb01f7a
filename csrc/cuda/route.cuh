// What the ways to route share: the expert of a slot.
#pragma once

#include "common/warp.cuh"
#include "moekernels/route.h"

namespace moekernels::cuda {

__device__ inline int64_t id_of(const RouteArgs& args, int64_t slot) {
  return args.wide_ids ? static_cast<const int64_t*>(args.ids)[slot]
                       : static_cast<const int32_t*>(args.ids)[slot];
}

// The expert of a slot, -1 where the slot is dropped or past the end.
__device__ inline int expert_of(const RouteArgs& args, int64_t slot) {
  if (slot >= args.slots) return -1;
  const int64_t id = id_of(args, slot);
  return inside(id, args.experts) ? static_cast<int>(id) : -1;
}

}  // namespace moekernels::cuda
