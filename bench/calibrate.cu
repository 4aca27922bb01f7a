// What the card gives by itself, one resource at a time: tensor cores from shared memory, L2
// through TMA, device memory, and latencies. Every kernel writes cycles of its SM;
// bench/calibrate.py turns them into rates.
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/sm90/ptx.cuh"

using namespace moekernels::cuda::sm90;

extern __shared__ __align__(1024) char shared[];

namespace {

__device__ int64_t cycles() {
  int64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

// m64n192k16, which no product has: 96 accumulators.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
__device__ void multiply_192(float (&d)[96], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, add, 1, 1, 0, 0;\n}"
      : D16(0), D16(16), D16(32), D16(48), D16(64), D16(80)
      : "l"(a), "l"(b), "r"(add));
}
#undef D4
#undef D16

// Two warpgroups multiply what lies in shared memory, as a product's consumers do, without waiting
// for loads.
template <int kColumns>
__device__ void wgmma_peak(const uint4* from, int steps, int64_t* taken, float* sink) {
  const int bytes = (128 + kColumns) * 128, group = threadIdx.x / 128;
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(shared)[i] = from[i];
  fence_async_proxy();
  __syncthreads();
  const uint64_t a = operand(shared_address(shared) + group * 8192, 8192);
  const uint64_t b = operand(shared_address(shared) + 16384, 8192);
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 0;
  const int64_t begin = cycles();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    fence_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kColumns == 192) {
        multiply_192(d, a + 2 * k, b + 2 * k, 1);
      } else {
        multiply<__nv_bfloat16, 0, 0>(d, a + 2 * k, b + 2 * k, 1);
      }
    }
    commit_products();
    wait_products<1>();
  }
  wait_products<0>();
  pin(d);
  if (threadIdx.x % 128 == 0) taken[blockIdx.x * 2 + group] = cycles() - begin;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sum += d[i];
  sink[blockIdx.x * 256 + threadIdx.x] = sum;
}

}  // namespace

// taken [blocks, 2]; a step is 64 of K: 128 x kColumns x 64 multiply-adds a block.
#define WGMMA_PEAK(columns)                                                             \
  extern "C" __global__ void __launch_bounds__(256, 1)                                  \
      wgmma_peak_##columns(const uint4* from, int steps, int64_t* taken, float* sink) { \
    wgmma_peak<columns>(from, steps, taken, sink);                                      \
  }
WGMMA_PEAK(128)
WGMMA_PEAK(192)
WGMMA_PEAK(256)

// Boxes of 64 lines (8 KiB) from `lines` of an array, six to a stage as in a product, four stages
// in flight; nobody reads them. taken [blocks].
extern "C" __global__ void tma_bandwidth(const __grid_constant__ CUtensorMap map, int lines,
                                         int steps, int64_t* taken) {
  constexpr int kStages = 4, kBoxes = 6;
  __shared__ uint64_t barriers[kStages];
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kStages; ++i) init_barrier(shared_address(&barriers[i]), 1);
  publish_barriers();
  const int64_t begin = cycles();
  int line = blockIdx.x * 64 * kBoxes % lines;
  for (int step = 0; step < steps + kStages; ++step) {
    const int stage = step % kStages;
    const uint32_t barrier = shared_address(&barriers[stage]);
    if (step >= kStages) wait(barrier, (step / kStages - 1) & 1);
    if (step >= steps) continue;
    arrive_and_expect(barrier, kBoxes * 8192);
    for (int box = 0; box < kBoxes; ++box) {
      load_tile(shared_address(shared) + (stage * kBoxes + box) * 8192, &map, 0, line, barrier);
      line = line + 64 < lines ? line + 64 : 0;
    }
  }
  taken[blockIdx.x] = cycles() - begin;
}

namespace {

__device__ uint32_t block_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// At the barrier that lies there in another block of the cluster.
__device__ void arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// A box for every block of `blocks`, and its bytes for the barrier that each has there.
__device__ void load_for(uint16_t blocks, uint32_t to, const CUtensorMap* map, int32_t x, int32_t y,
                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// As tma_bandwidth, but the blocks of a cluster need the same boxes: each loads its share of them
// for all. A stage is loaded again once every block has seen its last.
template <int kBlocks>
__device__ void multicast_bandwidth(const CUtensorMap* map, int lines, int steps, int64_t* taken) {
  constexpr int kStages = 4, kBoxes = 6;
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t rank = block_of_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&full[i]), 1);
      init_barrier(shared_address(&empty[i]), kBlocks);
    }
    publish_barriers();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    const int64_t begin = cycles();
    int line = blockIdx.x / kBlocks * 64 * kBoxes % lines;
    for (int step = 0; step < steps + kStages; ++step) {
      const int stage = step % kStages, round = step / kStages;
      const uint32_t loaded = shared_address(&full[stage]);
      if (step >= kStages) {
        wait(loaded, (round - 1) & 1);
        for (int block = 0; block < kBlocks; ++block)
          arrive_at(shared_address(&empty[stage]), block);
      }
      if (step >= steps) continue;
      if (step >= kStages) wait(shared_address(&empty[stage]), (round - 1) & 1);
      arrive_and_expect(loaded, kBoxes * 8192);
      for (int box = 0; box < kBoxes; ++box) {
        if (box % kBlocks == rank)
          load_for((1 << kBlocks) - 1, shared_address(shared) + (stage * kBoxes + box) * 8192, map,
                   0, line, loaded);
        line = line + 64 < lines ? line + 64 : 0;
      }
    }
    taken[blockIdx.x] = cycles() - begin;
  }
  sync_cluster();  // no block ends while another loads for it or arrives
}

}  // namespace

// taken [blocks].
extern "C" __global__ void __cluster_dims__(2, 1, 1)
    tma_multicast_2(const __grid_constant__ CUtensorMap map, int lines, int steps, int64_t* taken) {
  multicast_bandwidth<2>(&map, lines, steps, taken);
}

// taken [rounds]: one box from issue to the end of the wait, each from other lines.
extern "C" __global__ void tma_latency(const __grid_constant__ CUtensorMap map, int lines,
                                       int rounds, int64_t* taken) {
  __shared__ uint64_t barrier;
  if (threadIdx.x != 0) return;
  init_barrier(shared_address(&barrier), 1);
  publish_barriers();
  for (int round = 0; round < rounds; ++round) {
    const int64_t begin = cycles();
    arrive_and_expect(shared_address(&barrier), 8192);
    load_tile(shared_address(shared), &map, 0, round * 64 % lines, shared_address(&barrier));
    wait(shared_address(&barrier), round & 1);
    taken[round] = cycles() - begin;
  }
}

// taken [1]: so many times from one warp to the other and back.
extern "C" __global__ void mbarrier_latency(int rounds, int64_t* taken) {
  __shared__ uint64_t barriers[2];
  const uint32_t there = shared_address(&barriers[0]), back = shared_address(&barriers[1]);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    init_barrier(there, 1);
    init_barrier(back, 1);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;
  const int64_t begin = cycles();
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      arrive(there);
      wait(back, round & 1);
    } else {
      wait(there, round & 1);
      arrive(back);
    }
  }
  if (warp == 0) taken[0] = cycles() - begin;
}

// Reads `count` vectors once; what they add up to is written where it cannot be left out.
extern "C" __global__ void read_memory(const uint4* from, int64_t count, uint32_t* sink) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
#pragma unroll 8
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 v = __ldcs(from + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9e3779b9u) sink[0] = sum;
}
