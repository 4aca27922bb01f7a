// Ranks put rows into one another's slabs and take what came, right or with one planted bug.
//
// A slab: arrived [e] u32 | freed [P] u32 at 64 | rows [cap][32] floats at 128. Exchanges are
// numbered from 1; counters are never reset, what is awaited grows with the number.
#include <stdint.h>

enum Bug {
  none,
  flag_before_data,   // the counter is moved before the rows are written
  relaxed_red,        // it releases nothing
  red_of_device,      // or only to the own device
  acquire_of_device,  // awaited with the own device's scope
  relaxed_load,       // awaited without acquiring
  no_wait_group,      // bulk stores are only waited for as far as their source goes
  fence_by_one_lane,  // nothing orders the other lanes' stores before the lane that signals
  no_proxy_fence,     // bulk loads read what came without a proxy fence
  slot_not_freed,     // written again before it was read
  one_too_few,        // one arrival too few is awaited
  past_the_cap,       // rows past the slab's end are written
  empty_forgotten,    // no arrival for an expert without rows
  idle_rank_returns,  // a rank without tokens takes no part
  counter_reset,      // counters begin at zero again
  byte_flags,         // sources set bytes of one word
};
constexpr int kWidth = 32, kRowBytes = 4 * kWidth, kWarps = 2;

struct Peers {
  char* slab[8];
  int32_t rank, size;
  Bug bug;
};

__device__ uint32_t* arrived(const Peers& p, int rank, int expert) {
  return reinterpret_cast<uint32_t*>(p.slab[rank]) + expert;
}
__device__ uint32_t* freed(const Peers& p, int rank, int by) {
  return reinterpret_cast<uint32_t*>(p.slab[rank] + 64) + by;
}
__device__ float* row_of(const Peers& p, int rank, int row) {
  return reinterpret_cast<float*>(p.slab[rank] + 128) + row * kWidth;
}

__device__ uint32_t load(const Peers& p, const uint32_t* flag) {
  uint32_t value;
  if (p.bug == acquire_of_device) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } else if (p.bug == relaxed_load) {
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } else {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  }
  return value;
}
__device__ void await(const Peers& p, const uint32_t* flag, uint32_t least) {
  while (static_cast<int32_t>(load(p, flag) - least) < 0) {
  }
}
__device__ void signal(const Peers& p, uint32_t* flag) {
  if (p.bug == relaxed_red) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
  } else if (p.bug == red_of_device) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
  } else if (p.bug == byte_flags) {
    char* byte = reinterpret_cast<char*>(flag) + p.rank;
    asm volatile("st.release.sys.global.u8 [%0], %1;" ::"l"(byte), "r"(1) : "memory");
  } else {
    asm volatile("red.release.sys.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
  }
}

// counts [P][P*e]: rows of each source for each expert of all.
__device__ int rows_before(const int* counts, int peers, int experts, int expert, int source) {
  int rows = 0;
  for (int x = expert / experts * experts; x <= expert; ++x) {
    for (int s = 0; s < (x == expert ? source : peers); ++s)
      rows += counts[s * peers * experts + x];
  }
  return rows;
}

extern "C" __global__ void put(const Peers peers, const float* x, const int* counts, int experts,
                               int exchange, int cap, int bulk) {
  __shared__ alignas(128) float staged[kWarps][kWidth];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = peers.size * experts;
  const int* own = counts + peers.rank * all;
  int tokens = 0;
  for (int i = 0; i < all; ++i) tokens += own[i];
  if (peers.bug == idle_rank_returns && tokens == 0) return;
  for (int i = blockIdx.x * kWarps + warp; i < all; i += gridDim.x * kWarps) {
    const int expert = (peers.rank * experts + i) % all, to = expert / experts;
    int first = 0;
    for (int e = 0; e < expert; ++e) first += own[e];
    const int begin = rows_before(counts, peers.size, experts, expert, peers.rank);
    if (peers.bug == empty_forgotten && own[expert] == 0) continue;
    if (peers.bug != slot_not_freed) {
      if (lane == 0) await(peers, freed(peers, peers.rank, to), exchange - 1);
      __syncwarp();
    }
    uint32_t* flag = arrived(peers, to, expert % experts);
    if (peers.bug == flag_before_data && lane == 0) signal(peers, flag);
    for (int r = 0; r < own[expert]; ++r) {
      if (peers.bug != past_the_cap && begin + r >= cap) break;
      const float value = x[(first + r) * kWidth + lane];
      float* target = row_of(peers, to, begin + r);
      if (!bulk) {
        target[lane] = value;
        continue;
      }
      staged[warp][lane] = value;
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0) {
        const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(staged[warp]));
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                     "r"(from), "r"(kRowBytes)
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      }
      __syncwarp();
    }
    if (peers.bug != no_wait_group && lane == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    if (peers.bug == fence_by_one_lane) {
      if (lane == 0) __threadfence_system();
    } else {
      __syncwarp();
    }
    if (peers.bug != flag_before_data && lane == 0) signal(peers, flag);
  }
}

// A block for each of the own experts; ticket counts those that are through.
extern "C" __global__ void take(const Peers peers, float* out, const int* counts, uint32_t* ticket,
                                int exchange, int cap) {
  __shared__ alignas(128) float staged[kWidth];
  __shared__ alignas(8) uint64_t barrier;
  const int experts = gridDim.x, mine = peers.rank * experts + blockIdx.x;
  const uint32_t mbarrier = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  const uint32_t into = static_cast<uint32_t>(__cvta_generic_to_shared(staged));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(mbarrier) : "memory");
    uint32_t* flag = arrived(peers, peers.rank, blockIdx.x);
    if (peers.bug == counter_reset) {
      asm volatile("st.relaxed.sys.global.u32 [%0], 0;" ::"l"(flag) : "memory");
      await(peers, flag, peers.size);
    } else if (peers.bug == byte_flags) {
      await(peers, flag, peers.size == 2 ? 0x0101 : 0x010101);
    } else {
      await(peers, flag, exchange * peers.size - (peers.bug == one_too_few ? 1 : 0));
    }
    if (peers.bug != no_proxy_fence) asm volatile("fence.proxy.async.global;" ::: "memory");
  }
  __syncthreads();
  const int begin = rows_before(counts, peers.size, experts, mine, 0);
  const int end = rows_before(counts, peers.size, experts, mine, peers.size);
  for (int r = begin; r < end && r < cap; ++r) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(mbarrier),
                   "r"(kRowBytes)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
              "r"(into),
          "l"(row_of(peers, peers.rank, r)), "r"(kRowBytes), "r"(mbarrier)
          : "memory");
    }
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again;\n}" ::"r"(mbarrier),
        "r"(r - begin & 1)
        : "memory");
    out[r * kWidth + threadIdx.x] = staged[threadIdx.x];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(ticket, 1) != exchange * experts - 1) return;
  __threadfence();
  for (int s = 0; s < peers.size; ++s) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(freed(peers, s, peers.rank)),
                 "r"(exchange)
                 : "memory");
  }
}
