// A stable counting sort in four launches and no host sync: each warp counts its chunk of the
// slots, two scans say where the chunk's slots of each expert begin, and each warp places its chunk
// in order.
#include "route.cuh"
#include "common/launch.cuh"
#include "common/scan.cuh"
#include "sm90/entry.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 128;       // of the kernels that walk slots: four chunks a block
constexpr int kScanThreads = 1024;  // of the kernels that scan
constexpr int64_t kSharedBytes = 48 * 1024;

// A warp's counters: in shared memory where all warps' fit, else its row of begins itself.
__device__ int32_t* counters_of_warp(const RouteArgs& args, int64_t chunk, int32_t* shared) {
  return shared == nullptr ? args.begins + chunk * args.experts
                           : shared + (threadIdx.x / kWarp) * args.experts;
}

template <bool in_shared>
__global__ void __launch_bounds__(kThreads) route_count_slots(const RouteArgs args) {
  MOEKERNELS_DYNAMIC_SHARED(int32_t, shared);
  const int64_t chunk = warp_of_grid();
  if (chunk >= args.chunks) return;
  int32_t* counters = counters_of_warp(args, chunk, in_shared ? shared : nullptr);
  for (int64_t e = lane_id(); e < args.experts; e += kWarp) counters[e] = 0;
  __syncwarp();
  const int64_t end = min((chunk + 1) * args.chunk_slots, args.slots);
  for (int64_t s = chunk * args.chunk_slots + lane_id(); s < end; s += kWarp) {
    const int e = expert_of(args, s);
    if (e >= 0) atomicAdd(counters + e, 1);
  }
  if constexpr (in_shared) {
    __syncwarp();
    for (int64_t e = lane_id(); e < args.experts; e += kWarp) {
      args.begins[chunk * args.experts + e] = counters[e];
    }
  }
}

// begins[c][e]: from counts to exclusive sums over the chunks; the totals go to counts[e]. A block
// takes 32 experts, a lane each, and its 32 warps take a span of the chunks each.
__global__ void __launch_bounds__(kScanThreads) route_scan_chunks(const RouteArgs args) {
  __shared__ int32_t sums[kScanThreads / kWarp][kWarp];
  const int warp = threadIdx.x / kWarp, lane = lane_id();
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t span = (args.chunks + kScanThreads / kWarp - 1) / (kScanThreads / kWarp);
  const int64_t first = warp * span, last = min(first + span, args.chunks);
  int32_t sum = 0;
  if (e < args.experts) {
#pragma unroll 8
    for (int64_t c = first; c < last; ++c) sum += args.begins[c * args.experts + e];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += sums[w][lane];
  if (e >= args.experts) return;
#pragma unroll 8
  for (int64_t c = first; c < last; ++c) {
    int32_t& here = args.begins[c * args.experts + e];
    const int32_t n = here;
    here = before;
    before += n;
  }
  if (warp == kScanThreads / kWarp - 1) args.counts[e] = before;
}

// counts: from all slots of an expert to the rows kept; offsets, and where `order` holds an
// expert's slots. One block.
__global__ void __launch_bounds__(kScanThreads) route_scan_experts(const RouteArgs args) {
  __shared__ int64_t scratch[kScanThreads / kWarp];
  int64_t begin = 0, order_begin = 0;
  for (int64_t first = 0; first < args.experts; first += kScanThreads) {
    const int64_t e = first + threadIdx.x;
    const int64_t total = e < args.experts ? args.counts[e] : 0;
    const int64_t kept = args.capacity >= 0 && total > args.capacity ? args.capacity : total;
    const int64_t rows = (kept + args.alignment - 1) / args.alignment * args.alignment;
    int64_t sum;
    const int64_t before = block_exclusive_sum<kScanThreads>(rows, scratch, &sum);
    if (e < args.experts) {
      args.counts[e] = kept;
      args.offsets[e] = begin + before;
    }
    begin += sum;
    if (args.order != nullptr) {
      const int64_t before_in_order = block_exclusive_sum<kScanThreads>(total, scratch, &sum);
      if (e < args.experts)
        args.order_begins[e] = static_cast<int32_t>(order_begin + before_in_order);
      order_begin += sum;
    }
  }
  if (threadIdx.x == 0) {
    args.offsets[args.experts] = begin;
    if (args.order != nullptr) args.order_begins[args.experts] = static_cast<int32_t>(order_begin);
  }
}

// Unused rows: those between an expert's rows and the next expert's, and those behind the last.
__device__ void clear_unused(const RouteArgs& args, int64_t warp, int64_t warps) {
  for (int64_t e = warp; e < args.experts; e += warps) {
    for (int64_t r = args.offsets[e] + args.counts[e] + lane_id(); r < args.offsets[e + 1];
         r += kWarp) {
      args.token_of[r] = args.slot_of[r] = -1;
    }
  }
  for (int64_t r = args.offsets[args.experts] + warp * kWarp + lane_id(); r < args.num_rows;
       r += warps * kWarp) {
    args.token_of[r] = args.slot_of[r] = -1;
  }
}

// Each warp takes its slots in order, 32 at a time: a lane's rank is the number of lower lanes with
// the same expert.
template <bool in_shared>
__global__ void __launch_bounds__(kThreads) route_place_slots(const RouteArgs args) {
  MOEKERNELS_DYNAMIC_SHARED(int32_t, shared);
  const int64_t chunk = warp_of_grid();
  clear_unused(args, chunk, static_cast<int64_t>(gridDim.x) * (kThreads / kWarp));
  if (chunk >= args.chunks) return;
  const int lane = lane_id();
  int32_t* next = counters_of_warp(args, chunk, in_shared ? shared : nullptr);
  for (int64_t e = lane; e < args.experts; e += kWarp) {
    const int64_t begin = args.order != nullptr ? args.order_begins[e] : args.offsets[e];
    next[e] = static_cast<int32_t>(begin) + args.begins[chunk * args.experts + e];
  }
  __syncwarp();
  const int64_t end = min((chunk + 1) * args.chunk_slots, args.slots);
  for (int64_t first = chunk * args.chunk_slots; first < end; first += kWarp) {
    const int64_t s = first + lane;
    const int e = s < end ? expert_of(args, s) : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    int32_t r = e >= 0 ? next[e] + rank : -1;
    __syncwarp();
    if (e >= 0 && rank == 0) next[e] += __popc(same);
    __syncwarp();
    if (s >= end) continue;
    if (args.order != nullptr) {  // the rows are given out by route_keep_heaviest
      if (e >= 0) args.order[r] = static_cast<int32_t>(s);
      args.row_of[s] = -1;
      continue;
    }
    if (e >= 0 && args.capacity >= 0 && r >= args.offsets[e] + args.counts[e]) r = -1;
    if (r >= 0) {
      args.slot_of[r] = static_cast<int32_t>(s);
      args.token_of[r] = static_cast<int32_t>(s / args.top_k);
    }
    args.row_of[s] = r;
  }
}

// A key that orders like the weight: NaN above all, both zeros alike.
__device__ uint32_t key_of(const RouteArgs& args, int32_t slot) {
  const float w = static_cast<const float*>(args.weights)[slot];
  if (w != w) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(w + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One block an expert: finds the key that `capacity` slots reach, eight bits at a time, then gives
// rows to the slots above it and to the first of those that tie with it, in their order.
__global__ void __launch_bounds__(kScanThreads) route_keep_heaviest(const RouteArgs args) {
  __shared__ int32_t bins[256];
  __shared__ int64_t scratch[kScanThreads / kWarp];
  __shared__ uint32_t found;
  __shared__ int64_t still_wanted;
  const int64_t e = blockIdx.x;
  const int32_t* slots = args.order + args.order_begins[e];
  const int64_t n = args.order_begins[e + 1] - args.order_begins[e], kept = args.counts[e];
  uint32_t threshold = 0;
  int64_t ties = n;  // how many of those at the threshold are kept
  if (kept < n && kept > 0) {
    int64_t wanted = kept;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int b = threadIdx.x; b < 256; b += kScanThreads) bins[b] = 0;
      __syncthreads();
      const uint32_t decided = shift == 24 ? 0 : ~0u << (shift + 8);
      for (int64_t i = threadIdx.x; i < n; i += kScanThreads) {
        const uint32_t key = key_of(args, slots[i]);
        if ((key & decided) == (threshold & decided)) atomicAdd(bins + (key >> shift & 255), 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int64_t left = wanted;
        int digit = 255;
        for (; digit > 0 && bins[digit] < left; --digit) left -= bins[digit];
        found = static_cast<uint32_t>(digit) << shift;
        still_wanted = left;
      }
      __syncthreads();
      threshold |= found;
      wanted = still_wanted;
      __syncthreads();
    }
    ties = wanted;
  }
  int64_t row = args.offsets[e], seen = 0;
  for (int64_t first = 0; first < n && kept > 0; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t slot = i < n ? slots[i] : -1;
    const uint32_t key = i < n ? key_of(args, slot) : 0;
    const bool tie = i < n && (kept == n || key == threshold);
    int64_t sum;
    const int64_t earlier = seen + block_exclusive_sum<kScanThreads>(tie, scratch, &sum);
    seen += sum;
    const bool keep = i < n && ((kept < n && key > threshold) || (tie && earlier < ties));
    const int64_t r = row + block_exclusive_sum<kScanThreads>(keep, scratch, &sum);
    row += sum;
    if (!keep) continue;
    args.row_of[slot] = static_cast<int32_t>(r);
    args.slot_of[r] = slot;
    args.token_of[r] = static_cast<int32_t>(slot / args.top_k);
  }
}

}  // namespace

int64_t route_chunk_slots(int64_t slots, int64_t experts) {
  // Enough chunks to fill a device, each large enough that its counters cost less than its slots.
  const int64_t wanted = ceil_div(ceil_div(slots, 2048), kWarp) * kWarp;
  const int64_t least = ceil_div(experts > 256 ? experts : 256, kWarp) * kWarp;
  return wanted > least ? wanted : least;
}

void route(const RouteArgs& args, Stream stream) {
  if constexpr (sm90::kBuilt) {
    if (sm90::route(args, stream)) return;
  }
  const int64_t blocks = args.chunks > 0 ? ceil_div(args.chunks, kThreads / kWarp)
                                         : 1;  // unused rows are left without slots
  const int64_t bytes = args.experts * (kThreads / kWarp) * static_cast<int64_t>(sizeof(int32_t));
  const bool in_shared = bytes <= kSharedBytes;
  const int64_t shared = in_shared ? bytes : 0;
  launch("route", in_shared ? route_count_slots<true> : route_count_slots<false>, blocks, kThreads,
         shared, stream, args);
  launch("route", route_scan_chunks, ceil_div(args.experts, kWarp), kScanThreads, 0, stream, args);
  launch("route", route_scan_experts, 1, kScanThreads, 0, stream, args);
  launch("route", in_shared ? route_place_slots<true> : route_place_slots<false>, blocks, kThreads,
         shared, stream, args);
  if (args.order != nullptr) {
    launch("route", route_keep_heaviest, args.experts, kScanThreads, 0, stream, args);
  }
}

}  // namespace moekernels::cuda
