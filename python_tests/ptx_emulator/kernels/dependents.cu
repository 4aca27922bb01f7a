// Launches in a chain, each begun before the one ahead has ended: right, and with a bug by number.
#include <cstdint>

enum Bug : int {
  none,
  no_wait,
  late_wait,
  early_store,
  one_thread_waits,
  barrier_before_wait,
  never_triggers,
  awaits_the_next,
};

__device__ void wait_for_launch_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// out[i] = in[n - 1 - i] + 1; `flag`: of awaits_the_next.
extern "C" __global__ void link(const int* in, int* out, uint32_t* flag, int bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  if (bug != never_triggers) let_next_begin();
  if (bug == early_store) out[i] = 0;
  int value = bug == late_wait ? in[n - 1 - i] : 0;
  if (bug == barrier_before_wait) __syncthreads();
  const bool one = bug == one_thread_waits || bug == barrier_before_wait;
  if (one ? threadIdx.x == 0 : bug != no_wait) wait_for_launch_ahead();
  if (bug != late_wait) value = in[n - 1 - i];
  out[i] = value + 1;
  if (bug == awaits_the_next) {
    uint32_t seen = 0;
    while (seen == 0) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    }
  }
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag + 1) : "memory");
}

// The same through a bulk copy of the block's rows, which asynchronous hardware reads.
extern "C" __global__ void bulk_link(const int* in, int* out, int bug) {
  __shared__ alignas(128) int tile[64];
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier)),
                 to = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  let_next_begin();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (bug != no_wait) wait_for_launch_ahead();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(at) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::
            "r"(to),
        "l"(in + blockIdx.x * 64), "r"(at)
        : "memory");
  }
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}" ::"r"(at)
      : "memory");
  out[blockIdx.x * 64 + threadIdx.x] = tile[threadIdx.x] + 1;
}
