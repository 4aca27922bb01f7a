// Launches in a chain: each begins while the one ahead of it in its stream still runs, makes itself
// ready, and waits on the device before it touches global memory (programmatic dependent launch).
//
// Every kernel of a chain waits, whatever it reads: who waits for it then waits for all ahead of
// it. All threads of a block do, so that their TMA too sees what was stored.
#pragma once

#include "add.cuh"
#include "gather.cuh"
#include "kernel.cuh"

namespace moekernels::cuda::sm90 {

// The launch behind may begin where there is room for its blocks, once all of this one's have
// begun; then the launches ahead have ended, and what they wrote is there.
__device__ inline void follow() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

template <class Source>
struct Following : Source {
  __device__ void begin() const { follow(); }
};

// As `product`.
template <class Epilogue, bool kOverRows, bool kAlongN>
__global__ void __launch_bounds__(kProductThreads, 1)
    chained_product(const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap b_map, const ProductArgs args,
                    const typename Epilogue::Args to, const Probe probe) {
  run_product<Epilogue, kOverRows, kAlongN>(Following<Loaded>{{&a_map, &b_map}}, args, to, probe);
}

// As `product_into_sums`.
template <class Epilogue>
__global__ void __launch_bounds__(kProductThreads, 1)
    chained_into_sums(const __grid_constant__ CUtensorMap a_map,
                      const __grid_constant__ CUtensorMap b_map,
                      const __grid_constant__ CUtensorMap sums, const ProductArgs args, void* dw,
                      const int64_t m, const int64_t n, const Probe probe) {
  run_product<Epilogue, true, true>(Following<Loaded>{{&a_map, &b_map}}, args, {&sums, dw, m, n},
                                    probe);
  wait_bulk_read<0>();  // shared memory lasts as long as the block
}

// As `product_gathered` and `product_gathered_into_sums`.
template <class Epilogue, bool kOverRows, bool kAlongN, bool kOfB>
__global__ void __launch_bounds__(kProductThreads, 1)
    chained_gathered(const __grid_constant__ CUtensorMap other, const Gather from,
                     const ProductArgs args, const typename Epilogue::Args to, const Probe probe) {
  run_product<Epilogue, kOverRows, kAlongN>(Following<Gathered<kOfB>>{{&other, from}}, args, to,
                                            probe);
}
template <class Epilogue, bool kOfB>
__global__ void __launch_bounds__(kProductThreads, 1)
    chained_gathered_into_sums(const __grid_constant__ CUtensorMap other,
                               const __grid_constant__ CUtensorMap sums, const Gather from,
                               const ProductArgs args, void* dw, const int64_t m, const int64_t n,
                               const Probe probe) {
  run_product<Epilogue, true, true>(Following<Gathered<kOfB>>{{&other, from}}, args,
                                    {&sums, dw, m, n}, probe);
  wait_bulk_read<0>();  // shared memory lasts as long as the block
}

struct InChain {
  static constexpr bool kChained = true;
  template <class Epilogue, bool kOverRows, bool kAlongN>
  static constexpr auto loaded = chained_product<Epilogue, kOverRows, kAlongN>;
  template <class Epilogue, bool kOverRows, bool kAlongN, bool kOfB>
  static constexpr auto gathered = chained_gathered<Epilogue, kOverRows, kAlongN, kOfB>;
  template <class Epilogue, bool kOfB>
  static constexpr auto gathered_into_sums = chained_gathered_into_sums<Epilogue, kOfB>;
};

}  // namespace moekernels::cuda::sm90
