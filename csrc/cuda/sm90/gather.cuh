// Products of sm_90a that read x [tokens, width] through token_of: the producer's four warps bring
// the rows of one operand by copies of 16 bytes, where TMA would want them to lie in a row. TMA
// brings the other operand, and one barrier counts both.
#pragma once

#include "add.cuh"
#include "kernel.cuh"

namespace moekernels::cuda::sm90 {

struct Gather {
  const void* x;
  const int32_t* token_of;  // [rows]; outside [0, tokens): the row is zero
  int64_t tokens;
  int32_t width;  // elements of a row
};

// Copies 16 bytes, or zeros.
__device__ inline void copy_chunk(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// This thread arrives once its copies have landed.
__device__ inline void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Where a product's stages come from (Loaded is the other way). kOfB: B is gathered, not A, which
// only sums over rows have.
template <bool kOfB>
struct Gathered {
  static constexpr int kArrivals = 1 + kWarpgroup;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  const CUtensorMap* other;
  const Gather& from;

  __device__ void prefetch() const { prefetch_map(other); }
  __device__ void begin() const {}
  template <bool kOverRows>
  __device__ TileGrid count(const ProductShared& s, const ProductArgs& args) const {
    return count_tiles<kOverRows>(s, args);
  }
  template <class Epilogue, bool kOverRows, bool kAlongN, class... Rest>
  __device__ __forceinline__ void consume(Rest&... rest) const {
    sm90::consume<Epilogue, kOverRows, kAlongN, true>(rest...);
  }

  // The tokens of every 16th row from `row` on; -1: none.
  template <int kCount>
  __device__ __forceinline__ void find(int32_t (&tokens)[kCount], int32_t row, int32_t end) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t token = row + 16 * i < end ? from.token_of[row + 16 * i] : -1;
      tokens[i] = inside(token, from.tokens) ? token : -1;
    }
  }

  template <class Epilogue, bool kOverRows, bool kAlongN>
  __device__ __forceinline__ void produce(const ProductArgs& args, const typename Epilogue::Args&,
                                          const ProductShared& s, const TileGrid& grid,
                                          Observer& observer, int warp, int lane) const {
    using T = typename Epilogue::Type;
    static_assert(kOverRows || !kOfB);
    constexpr int kColumns = Epilogue::kColumns, kLines = kOfB ? kColumns : kTileRows;
    constexpr int kCopies = kLines / 16, kRows = (kOverRows ? kDepth : kTileRows) / 16;
    // Eight threads copy a line; this one's others lie 16 lines apart.
    const int thread = warp * kWarp + lane, line = thread / 8, chunk = thread % 8;
    const uint32_t first =
        (kOfB ? kTileRows * kLine : 0) + line * kLine + ((chunk ^ (line % 8)) << 4);
    const T* x = static_cast<const T*>(from.x) + chunk * 8;
    Ring ring{args.stages};
    TilePosition at{};
    for (int32_t index = blockIdx.x; find_tile(grid, index, at); index += gridDim.x) {
      const TileWork work = work_at<kOverRows>(s, args, at);
      if (!kOverRows && at.group == args.experts) continue;
      const int32_t end = kOverRows ? s.row_begin[at.group + 1] : work.tile.row_end;
      int32_t tokens[kRows];
      if (!kOverRows) find(tokens, work.tile.row + line, end);
      if (warp == 0) observer.begin(work.tile, work.steps);
#pragma unroll 1
      for (int32_t step = 0; step < work.steps; ++step, ring.advance()) {
        if (kOverRows) find(tokens, work.first_row + step * kDepth + line, end);
        if (warp == 0) {
          observer.wait(
              {s.empty + 8 * ring.stage, ring.phase ^ 1, Awaited::empty, ring.stage, step});
        } else {
          wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
        }
        const uint32_t stage = s.stages + ring.stage * kStageBytes<kColumns>,
                       full = s.full + 8 * ring.stage;
        if (thread == 0) {
          arrive_and_expect(full, kStageBytes<kColumns> - kLines * kLine);
          const int32_t k = (kOverRows ? work.first_row : 0) + step * kDepth;
          if constexpr (kOfB) {
            load_a<kOverRows>(other, work.tile, k, stage, full);
          } else {
            load_b<kColumns, kOverRows, kAlongN>(other, args, work.tile, k, stage, full);
          }
        }
        int32_t column = step * kDepth;
        if (kOverRows) column = kOfB ? work.tile.column_tile * args.column_step : work.tile.row;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int32_t token = tokens[i % kRows], here = column + i / kRows * kDepth;
          const bool exists = token >= 0 && here + chunk * 8 < from.width;
          copy_chunk(stage + first + i * 16 * kLine,
                     exists ? x + int64_t{token} * from.width + here : from.x, exists);
        }
        arrive_when_copied(full);
      }
      if (warp == 0) {
        observer.sums_done();
        observer.end();
      }
    }
  }
};

template <class Epilogue, bool kOverRows, bool kAlongN, bool kOfB>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_gathered(const __grid_constant__ CUtensorMap other, const Gather from,
                     const ProductArgs args, const typename Epilogue::Args to, const Probe probe) {
  run_product<Epilogue, kOverRows, kAlongN>(Gathered<kOfB>{&other, from}, args, to, probe);
}

// The same, added to sums (add.cuh).
template <class Epilogue, bool kOfB>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_gathered_into_sums(const __grid_constant__ CUtensorMap other,
                               const __grid_constant__ CUtensorMap sums, const Gather from,
                               const ProductArgs args, void* dw, const int64_t m, const int64_t n,
                               const Probe probe) {
  run_product<Epilogue, true, true>(Gathered<kOfB>{&other, from}, args, {&sums, dw, m, n}, probe);
  wait_bulk_read<0>();  // shared memory lasts as long as the block
}

}  // namespace moekernels::cuda::sm90
