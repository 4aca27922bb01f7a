// The instructions of sm_90 that C++ has no words for: mbarriers, TMA, warpgroup products, matrix
// stores.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moekernels::cuda::sm90 {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers: shared addresses, so that a ring of them is one base and an offset
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What the initialising thread wrote is seen by other threads and by TMA, once a __syncthreads
// follows.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity is over.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether that phase is over; waits for a while, as long as the hardware sees fit.
__device__ inline bool try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

// ---- TMA
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ inline void load_tile(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void load_tile(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y,
                                 int32_t z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// What was written to shared memory before is seen by TMA and by products after.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Brings bytes to L2; address and count are multiples of 16.
__device__ inline void prefetch_bytes(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// Adds a tile of fp32 in shared memory to global memory; what lies outside the map is left out.
__device__ inline void add_tile(const CUtensorMap* map, uint32_t from, int32_t x, int32_t y,
                                int32_t z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(from), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the latest kLeft groups of this thread have ended, or have read shared memory.
template <int kLeft>
__device__ inline void wait_bulk() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}
template <int kLeft>
__device__ inline void wait_bulk_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
__device__ inline void put_pair(uint32_t to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
}

// ---- registers and barriers of warpgroups
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kThreads>
__device__ inline void sync_named(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// All threads of the cluster that live.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- warpgroup products
// An operand in shared memory, in lines of 128 bytes with the 128-byte swizzle; 8 lines lie 1024
// bytes apart. Along K (K-major) a line is 64 elements of K; along M or N a line is 64 of those,
// and the next 64 lie `leading_bytes` on.
__device__ inline uint64_t operand(uint32_t address, uint32_t leading_bytes,
                                   uint32_t stride_bytes = 1024) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t(stride_bytes >> 4) << 32 | uint64_t(leading_bytes >> 4) << 16 |
         (address & 0x3FFFF) >> 4;
}
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving reads and writes of accumulators over a wait or a fence.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MOEKERNELS_REGS_64                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"             \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOEKERNELS_REGS_128                                                                      \
  MOEKERNELS_REGS_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MOEKERNELS_D8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOEKERNELS_D64(i)                                                               \
  MOEKERNELS_D8(i), MOEKERNELS_D8(i + 8), MOEKERNELS_D8(i + 16), MOEKERNELS_D8(i + 24), \
      MOEKERNELS_D8(i + 32), MOEKERNELS_D8(i + 40), MOEKERNELS_D8(i + 48), MOEKERNELS_D8(i + 56)
#define MOEKERNELS_WGMMA(columns, type, registers, at_a, at_b, at_add, at_ta, at_tb, ...)          \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" at_add                                     \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers \
               "}, %" at_a ", %" at_b ", add, 1, 1, %" at_ta ", %" at_tb ";\n}"                    \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA), "n"(kTransposedB))

// d (+)= a b over 16 of K, d [64, kCount * 2]: element 4j + 2h + i of a thread is row (its group of
// 4 lanes) + 8h, column 8j + 2 (its place in the group) + i.
template <class T, int kTransposedA, int kTransposedB>
__device__ inline void multiply(float (&d)[128], uint64_t a, uint64_t b, int add) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    MOEKERNELS_WGMMA("256", "f16", MOEKERNELS_REGS_128, "128", "129", "130", "131", "132",
                     MOEKERNELS_D64(0), MOEKERNELS_D64(64));
  } else {
    MOEKERNELS_WGMMA("256", "bf16", MOEKERNELS_REGS_128, "128", "129", "130", "131", "132",
                     MOEKERNELS_D64(0), MOEKERNELS_D64(64));
  }
}
template <class T, int kTransposedA, int kTransposedB>
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    MOEKERNELS_WGMMA("128", "f16", MOEKERNELS_REGS_64, "64", "65", "66", "67", "68",
                     MOEKERNELS_D64(0));
  } else {
    MOEKERNELS_WGMMA("128", "bf16", MOEKERNELS_REGS_64, "64", "65", "66", "67", "68",
                     MOEKERNELS_D64(0));
  }
}
// The same over 32 of K, of bytes that are e4m3; both operands lie along K.
__device__ inline void multiply_e4m3(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MOEKERNELS_REGS_64
      "}, %64, %65, add, 1, 1;\n}"
      : MOEKERNELS_D64(0)
      : "l"(a), "l"(b), "r"(add));
}
#undef MOEKERNELS_REGS_64
#undef MOEKERNELS_REGS_128
#undef MOEKERNELS_D8
#undef MOEKERNELS_D64
#undef MOEKERNELS_WGMMA

// ---- fragments
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
__device__ inline float2 unpack(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void store_matrices(uint32_t row_address, const uint32_t (&m)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
      : "memory");
}

}  // namespace moekernels::cuda::sm90
