// C = A * B^T (+ C) in bf16 with cp.async, ldmatrix and mma.sync: a 64x64x32 tile, two stages.
#include <cuda_bf16.h>
#include <stdint.h>

enum Bug { kNone, kNoWait, kNoBarrier };
constexpr int kTile = 64, kDepth = 32, kPitch = kDepth + 8;

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Rows row0.. of a [rows, K] matrix into shared memory; rows beyond the end become zeros.
__device__ void load_tile(__nv_bfloat16 (*tile)[kPitch], const __nv_bfloat16* x, int row0, int rows,
                          int k0, int K) {
  for (int i = threadIdx.x; i < kTile * kDepth / 8; i += blockDim.x) {
    const int r = i / (kDepth / 8), c = i % (kDepth / 8) * 8, row = row0 + r;
    const int bytes = row < rows ? 16 : 0;
    const __nv_bfloat16* from = x + (int64_t)(row < rows ? row : 0) * K + k0 + c;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&tile[r][c])),
                 "l"(from), "r"(bytes));
  }
}

template <Bug kBug>
__device__ void gemm_tile(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N,
                          int K) {
  __shared__ __align__(16) __nv_bfloat16 a[2][kTile][kPitch], b[2][kTile][kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile, steps = K / kDepth;
  float sum[8][4] = {};
  load_tile(a[0], A, row0, M, 0, K);
  load_tile(b[0], B, col0, N, 0, K);
  asm volatile("cp.async.commit_group;");
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) {
      load_tile(a[(s + 1) % 2], A, row0, M, (s + 1) * kDepth, K);
      load_tile(b[(s + 1) % 2], B, col0, N, (s + 1) * kDepth, K);
    }
    asm volatile("cp.async.commit_group;");
    if (kBug == kNoWait)
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(left[0]), "=r"(left[1]), "=r"(left[2]), "=r"(left[3])
                   : "r"(shared_address(&a[s % 2][warp * 16 + lane % 16][k + lane / 16 * 8])));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t right[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(right[0]), "=r"(right[1])
                     : "r"(shared_address(&b[s % 2][j * 8 + lane % 8][k + lane / 8 % 2 * 8])));
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
      }
    }
    if (kBug != kNoBarrier) __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int col = col0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < M && col < N) C[(int64_t)row * N + col] = sum[j][i];
    }
}
#define GEMM(name, bug)                                                                            \
  extern "C" __global__ void name(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, \
                                  int N, int K) {                                                  \
    gemm_tile<bug>(A, B, C, M, N, K);                                                              \
  }
GEMM(gemm, kNone)
GEMM(gemm_without_wait, kNoWait)
GEMM(gemm_without_barrier, kNoBarrier)

// y = x^T for one 16x16 tile of b16, by ldmatrix.trans.
extern "C" __global__ void transpose_tile(const uint16_t* x, uint32_t* y) {
  __shared__ __align__(16) uint16_t tile[16][16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i / 16][i % 16] = x[i];
  __syncwarp();
  uint32_t part[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(shared_address(&tile[lane % 16][lane / 16 * 8])));
  // Part 0 is the upper left 8x8 block, 1 lower left, 2 upper right, 3 lower right, each
  // transposed.
  for (int p = 0; p < 4; ++p) y[(p / 2 * 8 + lane / 4) * 8 + p % 2 * 4 + lane % 4] = part[p];
}
