// Finds a block's row tile with a warp, 32 groups at a time: row_tile of moekernels/gemm_tiles.h,
// faster.
#pragma once

#include "moekernels/gemm_tiles.h"
#include "warp.cuh"

namespace moekernels::cuda {

// Called by whole warps; every lane has the answer.
__device__ inline RowTile find_row_tile(const int64_t* offsets, int64_t experts, int64_t rows,
                                        int64_t tile, int64_t index) {
  const int lane = lane_id();
  for (int64_t first = 0; first <= experts; first += 32) {
    const int64_t group = first + lane;
    RowRange range{0, 0};
    if (group <= experts) range = rows_of_group(offsets, group, experts, rows);
    const int64_t count = tile_count(range.end - range.begin, tile);
    int64_t before = count;  // inclusive sum over the lanes, then exclusive
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t left = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += left;
    }
    const int64_t total = __shfl_sync(kAllLanes, before, 31);
    before -= count;
    if (index < total) {
      const unsigned mine = __ballot_sync(kAllLanes, index >= before && index < before + count);
      const int owner = __ffs(mine) - 1;
      const int64_t begin = range.begin + (index - before) * tile;
      const int64_t end = begin + tile < range.end ? begin + tile : range.end;
      return {first + owner, __shfl_sync(kAllLanes, begin, owner),
              __shfl_sync(kAllLanes, end, owner)};
    }
    index -= total;
  }
  return {-1, 0, 0};
}

}  // namespace moekernels::cuda
