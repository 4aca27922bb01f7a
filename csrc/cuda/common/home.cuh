// Rows that come home are counted at their owner, by blocks.
#pragma once

#include "common/flags.cuh"
#include "moekernels/exchange.h"

namespace moekernels::cuda {

// One thread, behind the stores of `count` rows from place `begin` on; those that found no room
// are not counted.
__device__ inline void count_home(const Slab& owner, int64_t slot, int64_t begin, int64_t count,
                                  int64_t units) {
  const int64_t room = owner.shape.back;
  if (begin + count > room) count = room - begin;
  for (int64_t block = begin / kHomeRows; count > 0 && block * kHomeRows < begin + count; ++block) {
    add_release(owner.returned(slot, block),
                static_cast<uint32_t>(rows_of_block(block, begin, count) * units));
  }
}

}  // namespace moekernels::cuda
