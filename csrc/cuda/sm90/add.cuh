// The weights' gradient on sm_90a as sums in fp32 that L2 adds to memory (bulk reductions): a tile
// leaves through its warp's staging in boxes, and no thread reads what it adds to or waits for it.
#pragma once

#include "kernel.cuh"
#include "rows.cuh"

namespace moekernels::cuda::sm90 {

// Writes 16 rows of 32 columns, 16 of this lane's accumulators, to a box with the 128-byte swizzle.
// `at`: where a pair of floats of this lane's row r lies, half of chunk 2 j + (lane % 4 / 2), which
// is at that XOR r. An odd row writes its j of XOR 2 first: 16 lanes meet no bank twice.
template <int kCount>
__device__ __forceinline__ void stage_box(const float (&d)[kCount], int part, uint32_t box,
                                          uint32_t at, int odd) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float *even = d + (part * 4 + j) * 4 + half * 2,
                  *other = d + (part * 4 + (j ^ 2)) * 4 + half * 2;
      put_pair(box + half * 8 * kLine + (at ^ (j << 5)), odd ? other[0] : even[0],
               odd ? other[1] : even[1]);
    }
  }
}
__device__ inline uint32_t place_in_box(int lane) {
  const int r = lane / 4, odd = r & 1;
  return r * kLine + (((lane % 4 / 2) ^ r ^ (odd << 2)) << 4) + lane % 2 * 8;
}

// dw [E, M, N] += C, as StoreGradient adds it, but that L2 takes numbers below 2^-126 for zero. A
// launch adds to every element once, so no order of the boxes changes a bit.
template <class T>
struct AddGradient {
  using Type = T;
  static constexpr int kColumns = 256;
  static constexpr bool kPrefetches = true;
  // A box of 16 rows by 32 columns is 16 lines with the 128-byte swizzle; staging holds two.
  static constexpr int kBoxRows = 16, kBoxColumns = 32, kBoxBytes = kStagingBytes / 2;
  struct Args {
    const CUtensorMap* sums;  // of dw, by boxes
    void* dw;
    int64_t m, n;
  };

  template <class Tile>
  static __device__ void prefetch(const Args& to, const Tile& tile, int lane) {
    StoreGradient<T, kColumns, true>::prefetch({to.dw, to.m, to.n}, tile, lane);
  }

  template <class Tile>
  static __device__ void clear(const Args&, const Tile&, int64_t, int) {}

  template <class Tile>
  static __device__ void store(const Args& to, const Tile& tile, float (&d)[kColumns / 2],
                               char* staging, int64_t row, int lane) {
    if (row >= to.m) return;
    const int32_t column = tile.column_tile * kColumns;
    const uint32_t at = place_in_box(lane);
#pragma unroll
    for (int part = 0; part < kColumns / kBoxColumns; ++part) {
      if (column + part * kBoxColumns >= to.n) break;
      const uint32_t box = shared_address(staging) + part % 2 * kBoxBytes;
      if (lane == 0) part == 0 ? wait_bulk<0>() : wait_bulk_read<1>();  // the box is free again
      __syncwarp();
      stage_box(d, part, box, at, lane / 4 & 1);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        add_tile(to.sums, box, column + part * kBoxColumns, static_cast<int32_t>(row), tile.group);
        commit_bulk();
      }
    }
  }
};

// As `product` summed over rows, with the map of what it adds to.
template <class Epilogue>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_into_sums(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map,
                      const __grid_constant__ CUtensorMap sums, const ProductArgs args, void* dw,
                      const int64_t m, const int64_t n, const Probe probe) {
  run_product<Epilogue, true, true>(Loaded{&a_map, &b_map}, args, {&sums, dw, m, n}, probe);
  wait_bulk_read<0>();  // shared memory lasts as long as the block
}

}  // namespace moekernels::cuda::sm90
