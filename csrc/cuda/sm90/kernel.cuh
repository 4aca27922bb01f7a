// What a block of a product does, by the source of its stages; the kernel whose source is TMA
// alone.
#pragma once

#include "product.cuh"

namespace moekernels::cuda::sm90 {

// Where a product's stages come from, and what is done with them. This: everything by TMA, a tile
// at a time.
struct Loaded {
  static constexpr int kArrivals = 1;  // at a full barrier, beside the bytes
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of a thread
  const CUtensorMap *a, *b;

  __device__ void prefetch() const {
    prefetch_map(a);
    prefetch_map(b);
  }
  __device__ void begin() const {}  // before anything else touches global memory
  template <bool kOverRows>
  __device__ TileGrid count(const ProductShared& s, const ProductArgs& args) const {
    return count_tiles<kOverRows>(s, args);
  }
  template <class Epilogue, bool kOverRows, bool kAlongN, class... Rest>
  __device__ __forceinline__ void produce(Rest&... rest) const {
    sm90::produce<Epilogue, kOverRows, kAlongN>(a, b, rest...);
  }
  template <class Epilogue, bool kOverRows, bool kAlongN, class... Rest>
  __device__ __forceinline__ void consume(Rest&... rest) const {
    sm90::consume<Epilogue, kOverRows, kAlongN, false>(rest...);
  }
};

// What a block does. kOverRows: C [M, N] of a group sums over its rows, both operands lie along M
// and N; otherwise C has the rows, and the weights lie along K or (kAlongN) along N.
template <class Epilogue, bool kOverRows, bool kAlongN, class Source>
__device__ __forceinline__ void run_product(const Source& source, const ProductArgs& args,
                                            const typename Epilogue::Args& to, const Probe& probe) {
  extern __shared__ __align__(1024) char shared[];
  const ProductShared s = product_shared<Epilogue::kColumns>(shared, args);
  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4,
            lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    if (s.stages % 1024 != 0) __trap();  // where the 128-byte swizzle begins
    source.prefetch();
    for (int i = 0; i < args.stages; ++i) {
      init_barrier(s.full + 8 * i, Source::kArrivals);
      init_barrier(s.empty + 8 * i, kConsumerWarps);
    }
    publish_barriers();
  }
  source.begin();
  const TileGrid grid = source.template count<kOverRows>(s, args);
  Observer observer(probe, warpgroup * 4 + warp, lane);
  if (warpgroup == kConsumers) {
    give_registers<Source::kProducerRegisters>();
    source.template produce<Epilogue, kOverRows, kAlongN>(args, to, s, grid, observer, warp, lane);
  } else {
    take_registers<Source::kConsumerRegisters>();
    source.template consume<Epilogue, kOverRows, kAlongN>(args, to, s, grid, observer, warpgroup,
                                                          warp, lane);
  }
}

template <class Epilogue, bool kOverRows, bool kAlongN>
__global__ void __launch_bounds__(kProductThreads, 1)
    product(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
            const ProductArgs args, const typename Epilogue::Args to, const Probe probe) {
  run_product<Epilogue, kOverRows, kAlongN>(Loaded{&a_map, &b_map}, args, to, probe);
}

}  // namespace moekernels::cuda::sm90
