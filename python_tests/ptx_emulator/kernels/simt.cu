// Plain SIMT kernels as they occur in gating and routing; the emulator's tests hold them to numpy.
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>

// One warp a token: softmax over E <= 256 logits, the K largest in descending order.
extern "C" __global__ void top_k(const float* __restrict__ logits, float* __restrict__ weights,
                                 int* __restrict__ ids, int T, int E, int K) {
  constexpr int kPerLane = 8;
  const int lane = threadIdx.x % 32, t = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (t >= T) return;
  float score[kPerLane], largest = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    score[i] = i * 32 + lane < E ? logits[(int64_t)t * E + i * 32 + lane] : -INFINITY;
    largest = fmaxf(largest, score[i]);
  }
  for (int o = 16; o; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += score[i] = __expf(score[i] - largest);
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  for (int k = 0; k < K; ++k) {
    float best = -1;
    int at = E;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (score[i] > best) best = score[i], at = i * 32 + lane;
    for (int o = 16; o; o >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, o);
      const int other_at = __shfl_xor_sync(~0u, at, o);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (i * 32 + lane == at) score[i] = -1;
    if (lane == 0) {
      weights[(int64_t)t * K + k] = best / sum;
      ids[(int64_t)t * K + k] = at;
    }
  }
}

// Stable counting sort of n ids below 256 by one block of 256 threads: where each element goes.
extern "C" __global__ void __launch_bounds__(256)
    counting_sort(const int* __restrict__ ids, int n, int* __restrict__ offsets,
                  int* __restrict__ row_of) {
  __shared__ int next[256], in_warp[8][256], warp_sum[8];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  next[t] = 0;
  __syncthreads();
  for (int i = t; i < n; i += 256) atomicAdd(&next[ids[i]], 1);
  __syncthreads();
  const int count = next[t];
  int scan = count;
  for (int o = 1; o < 32; o <<= 1) {
    const int other = __shfl_up_sync(~0u, scan, o);
    if (lane >= o) scan += other;
  }
  if (lane == 31) warp_sum[warp] = scan;
  __syncthreads();
  for (int w = 0; w < warp; ++w) scan += warp_sum[w];
  offsets[t + 1] = scan;
  if (t == 0) offsets[0] = 0;
  next[t] = scan - count;
  for (int base = 0; base < n; base += 256) {
    for (int w = 0; w < 8; ++w) in_warp[w][t] = 0;
    __syncthreads();
    const int i = base + t, id = i < n ? ids[i] : -1;
    const unsigned same = __match_any_sync(~0u, id);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (i < n && rank == 0) in_warp[warp][id] = __popc(same);
    __syncthreads();
    if (i < n) {
      int row = next[id] + rank;
      for (int w = 0; w < warp; ++w) row += in_warp[w][id];
      row_of[i] = row;
    }
    __syncthreads();
    for (int w = 0; w < 8; ++w) next[t] += in_warp[w][t];
    __syncthreads();
  }
}

// y[t] = sum over k of weights[t, k] * rows[row_of[t, k]], 8 bf16 a thread, one block a token.
extern "C" __global__ void combine(const __nv_bfloat16* __restrict__ rows,
                                   const int* __restrict__ row_of,
                                   const float* __restrict__ weights, __nv_bfloat16* __restrict__ y,
                                   int H, int K) {
  const int64_t t = blockIdx.x;
  for (int h = 8 * threadIdx.x; h < H; h += 8 * blockDim.x) {
    float sum[8] = {};
    for (int k = 0; k < K; ++k) {
      const int row = row_of[t * K + k];
      if (row < 0) continue;
      const uint4 packed = *reinterpret_cast<const uint4*>(rows + (int64_t)row * H + h);
      const __nv_bfloat162* pair = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = __bfloat1622float2(pair[j]);
        sum[2 * j] += weights[t * K + k] * v.x;
        sum[2 * j + 1] += weights[t * K + k] * v.y;
      }
    }
    __nv_bfloat162 out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = __floats2bfloat162_rn(sum[2 * j], sum[2 * j + 1]);
    *reinterpret_cast<uint4*>(y + t * H + h) = *reinterpret_cast<uint4*>(out);
  }
}

// Local memory with a run-time index, and block-wide reductions by barrier.
extern "C" __global__ void votes(const int* __restrict__ x, int* __restrict__ y) {
  int history[8];
  for (int i = 0; i < 8; ++i) history[i] = x[threadIdx.x] + i * i;
  const int count = __syncthreads_count(x[threadIdx.x] & 1);
  const int any = __syncthreads_or(x[threadIdx.x] == 7),
            all = __syncthreads_and(x[threadIdx.x] < 99);
  y[threadIdx.x] = history[x[threadIdx.x] & 7] + 1000 * count + 100000 * any + 1000000 * all;
}
