// All choices routed by one launch of one cluster, where four launches would take longer than their
// work: each block counts its choices, tells the others, and places them. The rows are those of
// route.cu: a stable sort has one result.
#include "common/scan.cuh"
#include "mma/launch.cuh"
#include "route.cuh"
#include "sm90/chained.cuh"
#include "sm90/entry.cuh"
#include "sm90/run.cuh"

namespace moekernels::cuda::sm90 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
// A warp takes 256 slots at most, and its counters have room beside those of the block's others.
constexpr int64_t kSlotsOfWarp = 256, kMostExperts = 1024;
constexpr int64_t kMostSlots = kRouteBlocks * kWarps * kSlotsOfWarp;

// Of a block, in shared memory.
struct Counts {
  int64_t* scratch;             // [kWarps]
  int32_t* of_warps;            // [kWarps, E] slots of each expert, then those before this warp's
  int32_t *first, *end, *rows;  // [E] the block's first row, where the rows kept end; [E+1] where
                                // an expert's rows begin

  static __host__ __device__ int64_t bytes(int64_t experts) {
    return kWarps * 8 + ((kWarps + 3) * experts + 1) * 4;
  }
  __device__ Counts(char* shared, int64_t experts)
      : scratch(reinterpret_cast<int64_t*>(shared)),
        of_warps(reinterpret_cast<int32_t*>(shared + kWarps * 8)),
        first(of_warps + kWarps * experts),
        end(first + experts),
        rows(end + experts) {}
};

// Slots of a warp, a multiple of the lanes: the warps of all blocks take them in order.
__device__ inline int64_t slots_of_warp(const RouteArgs& args) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  return (args.slots + warps * kWarp - 1) / (warps * kWarp) * kWarp;
}

// Calls f(slot, its expert or -1, how many lower lanes have the same, how many lanes) for the
// warp's slots in their order, by whole warps.
template <class F>
__device__ __forceinline__ void for_slots(const RouteArgs& args, const F& f) {
  const int64_t count = slots_of_warp(args), begin = warp_of_grid() * count;
  const int64_t end = min(begin + count, args.slots);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane_id();
    const int e = slot < end ? expert_of(args, slot) : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    f(slot < end ? slot : -1, e, __popc(same & ((1u << lane_id()) - 1)), __popc(same));
    __syncwarp();
  }
}

// of_warps: from counts to sums over the warps before; what all of them have goes to the block's
// row of begins.
__device__ inline void scan_warps(const RouteArgs& args, const Counts& counts) {
  for (int64_t e = threadIdx.x; e < args.experts; e += kThreads) {
    int32_t before = 0;
    for (int w = 0; w < kWarps; ++w) {
      int32_t& here = counts.of_warps[w * args.experts + e];
      const int32_t n = here;
      here = before;
      before += n;
    }
    args.begins[blockIdx.x * args.experts + e] = before;
  }
}

// Where each expert's rows lie, which every block finds for itself; the first one tells.
__device__ inline void scan_experts(const RouteArgs& args, const Counts& counts) {
  int64_t begin = 0;
  for (int64_t first = 0; first < args.experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    int64_t total = 0, before = 0;
    for (int64_t b = 0; e < args.experts && b < gridDim.x; ++b) {
      const int32_t n = args.begins[b * args.experts + e];
      before += b < blockIdx.x ? n : 0;
      total += n;
    }
    const int64_t kept = args.capacity >= 0 && total > args.capacity ? args.capacity : total;
    const int64_t padded = (kept + args.alignment - 1) / args.alignment * args.alignment;
    int64_t sum;
    const int64_t at = begin + block_exclusive_sum<kThreads>(padded, counts.scratch, &sum);
    if (e < args.experts) {
      counts.first[e] = static_cast<int32_t>(at + before);
      counts.end[e] = static_cast<int32_t>(at + kept);
      counts.rows[e] = static_cast<int32_t>(at);
      if (blockIdx.x == 0) {
        args.counts[e] = kept;
        args.offsets[e] = at;
      }
    }
    begin += sum;
  }
  if (threadIdx.x == 0) {
    counts.rows[args.experts] = static_cast<int32_t>(begin);
    if (blockIdx.x == 0) args.offsets[args.experts] = begin;
  }
}

// Rows that no slot has: between an expert's and the next one's, and behind the last.
__device__ inline void clear_unused(const RouteArgs& args, const Counts& counts) {
  const int64_t warp = warp_of_grid(), warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const auto clear = [&](int64_t begin, int64_t end, int64_t step) {
    for (int64_t r = begin + lane_id(); r < end; r += step) args.token_of[r] = args.slot_of[r] = -1;
  };
  for (int64_t e = warp; e < args.experts; e += warps)
    clear(counts.end[e], counts.rows[e + 1], kWarp);
  clear(counts.rows[args.experts] + warp * kWarp, args.num_rows, warps * kWarp);
}

template <bool kChained>
__global__ void __launch_bounds__(kThreads) route_at_once(const RouteArgs args) {
  extern __shared__ __align__(16) char shared[];
  if constexpr (kChained) follow();
  const Counts counts(shared, args.experts);
  int32_t* of_warp = counts.of_warps + threadIdx.x / kWarp * args.experts;
  for (int64_t e = lane_id(); e < args.experts; e += kWarp) of_warp[e] = 0;
  __syncwarp();
  for_slots(args, [&](int64_t, int e, int rank, int same) {
    if (e >= 0 && rank == 0) of_warp[e] += same;
  });
  __syncthreads();
  scan_warps(args, counts);
  __syncthreads();
  if (gridDim.x > 1) meet_cluster();
  scan_experts(args, counts);
  __syncthreads();
  clear_unused(args, counts);
  for_slots(args, [&](int64_t slot, int e, int rank, int same) {
    int32_t r = -1;
    if (e >= 0) {
      r = counts.first[e] + of_warp[e] + rank;
      if (r >= counts.end[e]) r = -1;
    }
    __syncwarp();
    if (e >= 0 && rank == 0) of_warp[e] += same;
    if (slot < 0) return;
    if (r >= 0) {
      args.slot_of[r] = static_cast<int32_t>(slot);
      args.token_of[r] = static_cast<int32_t>(slot / args.top_k);
    }
    args.row_of[slot] = r;
  });
}

}  // namespace

bool route(const RouteArgs& args, Stream stream) {
  const LaunchOrder order = launches();
  if (!order.route_at_once || args.order != nullptr || args.slots > kMostSlots ||
      args.experts > kMostExperts || capability() / 10 != 9) {
    return false;
  }
  // As many warps as find 64 slots each.
  const int64_t blocks = ceil_div(args.slots, kWarps * 64);
  const int size = static_cast<int>(blocks < 1 ? 1 : blocks < kRouteBlocks ? blocks : kRouteBlocks);
  const auto kernel = order.chain ? route_at_once<true> : route_at_once<false>;
  const int64_t bytes = Counts::bytes(args.experts);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "route");
  launch_as({.cluster = size, .chained = order.chain}, "route", kernel, size, kThreads, bytes,
            stream, args);
  return true;
}

}  // namespace moekernels::cuda::sm90
