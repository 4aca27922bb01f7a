// sm_90a: a persistent grouped GEMM of wgmma, TMA and an mbarrier ring, each time with one planted
// bug, and C = A^T B with operands transposed by the tensor core and a TMA store.
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

enum Bug {
  kNone,
  kFreedEarly,
  kWrongStride,
  kWrongSwizzle,
  kNoLastWait,
  kTooManyBytes,
  kTooFewBytes,
  kNoFullWait,
  kNoEmptyWait,
  kOneConsumerFrees,
  kSharedAccumulators,
};
constexpr int kM = 128, kN = 64, kK = 64,
              kStages = 3;  // a tile; 64 rows for each of two warpgroups
constexpr int kTileBytes = (kM + kN) * kK * 2;

struct __align__(1024) Ring {
  __nv_bfloat16 a[kStages][kM * kK], b[kStages][kN * kK];
  uint64_t full[kStages], empty[kStages];
};

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
      "@!p bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void load(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ void load(void* to, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// swizzle: 1 is 128 bytes, 2 is 64
__device__ uint64_t descriptor(const void* p, int stride_bytes, int swizzle = 1) {
  return (shared_address(p) & 0x3FFFF) >> 4 | uint64_t(1) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(swizzle) << 62;
}
// Both operands along K (kTransposed 0) or along M and N (1).
template <int kTransposed>
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int add) {
#define D8(i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, %35;\n}"
      : D8(0), D8(8), D8(16), D8(24)
      : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
}
__device__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

struct Tile {
  int expert, row, end, column;
};
__device__ bool find_tile(int index, const int* offsets, int E, int column_tiles, Tile& tile) {
  for (int e = 0; e < E; ++e) {
    const int tiles = (offsets[e + 1] - offsets[e] + kM - 1) / kM * column_tiles;
    if (index < tiles) {
      tile = {e, offsets[e] + index / column_tiles * kM, offsets[e + 1], index % column_tiles * kN};
      return true;
    }
    index -= tiles;
  }
  return false;
}

template <Bug kBug>
__device__ void run(const CUtensorMap* rows, const CUtensorMap* weights, const int* offsets,
                    __nv_bfloat16* out, int E, int N, int K) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Ring& ring = *reinterpret_cast<Ring*>(dynamic);
  const int group = threadIdx.x / 128, t = threadIdx.x % 128, steps = K / kK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s)
      init(&ring.full[s], 1), init(&ring.empty[s], kBug == kOneConsumerFrees ? 1 : 2);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Tile tile;
  int stage = 0, phase = group == 2;
  if (group == 2) {  // the producer
    if (t != 0) return;
    for (int i = blockIdx.x; find_tile(i, offsets, E, N / kN, tile); i += gridDim.x)
      for (int k = 0; k < K; k += kK) {
        if (kBug != kNoEmptyWait) wait(&ring.empty[stage], phase);
        const int wrong = kBug == kTooManyBytes ? 16 : kBug == kTooFewBytes ? -kN * kK * 2 : 0;
        expect(&ring.full[stage], kTileBytes + wrong);
        load(ring.a[stage], rows, k, tile.row, &ring.full[stage]);
        load(ring.b[stage], weights, k, tile.column, tile.expert, &ring.full[stage]);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    return;
  }
  for (int i = blockIdx.x; find_tile(i, offsets, E, N / kN, tile); i += gridDim.x) {
    float d[32];
    int previous = -1;
    for (int step = 0; step < steps; ++step) {
      if (kBug != kNoFullWait) wait(&ring.full[stage], phase);
      const int stride = kBug == kWrongStride ? 512 : 1024;
      fence_products();
#pragma unroll
      for (int k = 0; k < kK; k += 16)
        multiply<0>(
            d,
            descriptor(&ring.a[stage][group * 64 * kK + k], stride, kBug == kWrongSwizzle ? 2 : 1),
            descriptor(&ring.b[stage][k], 1024), step + k > 0);
      commit_products();
      wait_products<1>();  // all but the products just issued
      if (kBug == kFreedEarly) previous = stage;
      if (previous >= 0 && t == 0) arrive(&ring.empty[previous]);
      if (kBug == kSharedAccumulators) d[0] *= 2;  // while the last products still add to them
      previous = stage;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    if (kBug != kNoLastWait) wait_products<0>();
    if (kBug != kFreedEarly && t == 0) arrive(&ring.empty[previous]);
    const int row = tile.row + group * 64 + t / 32 * 16 + t % 32 / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + 8 * half < tile.end) {
          const int column = tile.column + 8 * j + t % 4 * 2;
          *reinterpret_cast<__nv_bfloat162*>(out + int64_t(row + 8 * half) * N + column) =
              __floats2bfloat162_rn(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
        }
  }
}
#define GROUPED_GEMM(name, bug)                                                                   \
  extern "C" __global__ void __launch_bounds__(384, 1)                                            \
      name(const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap weights, \
           const int* offsets, __nv_bfloat16* out, int E, int N, int K) {                         \
    run<bug>(&rows, &weights, offsets, out, E, N, K);                                             \
  }
GROUPED_GEMM(grouped_gemm, kNone)
GROUPED_GEMM(stage_freed_early, kFreedEarly)
GROUPED_GEMM(wrong_stride, kWrongStride)
GROUPED_GEMM(wrong_swizzle, kWrongSwizzle)
GROUPED_GEMM(no_last_wait, kNoLastWait)
GROUPED_GEMM(too_many_bytes, kTooManyBytes)
GROUPED_GEMM(too_few_bytes, kTooFewBytes)
GROUPED_GEMM(no_full_wait, kNoFullWait)
GROUPED_GEMM(no_empty_wait, kNoEmptyWait)
GROUPED_GEMM(one_consumer_frees, kOneConsumerFrees)
GROUPED_GEMM(shared_accumulators, kSharedAccumulators)

// C = A^T B with A [R, 64] and B [R, 64], R a multiple of 64; C leaves by stmatrix and TMA.
enum StoreBug { kRight, kNoProxyFence, kNoStoreWait, kNoBarrierBeforeStore };
template <StoreBug kBug>
__device__ void transposed(const CUtensorMap* a, const CUtensorMap* b, const CUtensorMap* c,
                           int R) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Ring& ring = *reinterpret_cast<Ring*>(dynamic);
  const int t = threadIdx.x, lane = t % 32;
  if (t == 0) init(&ring.full[0], 1);
  __syncthreads();
  float d[32];
  for (int r = 0; r < R; r += 64) {
    if (t == 0) {
      expect(&ring.full[0], 2 * 64 * 64 * 2);
      load(ring.a[0], a, 0, r, &ring.full[0]);
      load(ring.b[0], b, 0, r, &ring.full[0]);
    }
    wait(&ring.full[0], r / 64 % 2);
    fence_products();
#pragma unroll
    for (int k = 0; k < 64; k += 16)
      multiply<1>(d, descriptor(&ring.a[0][k * 64], 1024), descriptor(&ring.b[0][k * 64], 1024),
                  r + k > 0);
    commit_products();
    wait_products<0>();
    __syncthreads();
  }
  // 16 rows a warp, 16 columns a stmatrix, in the 128-byte swizzle of the tensor map.
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(d[8 * j + 2 * i], d[8 * j + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const int row = t / 32 * 16 + lane % 16, chunk = (2 * j + lane / 16) ^ (row % 8);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(&ring.a[1][row * 64 + chunk * 8])),
                 "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                 : "memory");
  }
  if (kBug != kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (kBug != kNoBarrierBeforeStore) __syncthreads();
  if (t == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %2}], [%1];" ::"l"(c),
        "r"(shared_address(ring.a[1])), "r"(0)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (kBug != kNoStoreWait) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
#define TRANSPOSED(name, bug)                                                     \
  extern "C" __global__ void name(const __grid_constant__ CUtensorMap a,          \
                                  const __grid_constant__ CUtensorMap b,          \
                                  const __grid_constant__ CUtensorMap c, int R) { \
    transposed<bug>(&a, &b, &c, R);                                               \
  }
TRANSPOSED(transposed_gemm, kRight)
TRANSPOSED(no_proxy_fence, kNoProxyFence)
TRANSPOSED(no_store_wait, kNoStoreWait)
TRANSPOSED(no_barrier_before_store, kNoBarrierBeforeStore)
