"""Executes the PTX that nvcc makes on a CPU, with numpy: one array element for every CUDA thread.

    module = ptx.load("kernel.cu", arch="80")          # or PTX text
    module.launch("kernel_name", grid, block, [x, y, n], shared_bytes=0)   # writes y in place

Threads at the same instruction run as one group over all blocks of a batch; groups split at
divergent branches and merge again (`schedule`). Arrays are copied into an arena where a kernel sees
exactly their bytes (`memory`). `schedule=seed` lets warps run far ahead of one another, differently
for every seed, and delays some asynchronous work; `lazy=True` makes cp.async, bulk copies and wgmma
take effect as late as they may.

Errors, each with kernel, block, thread, instruction and address (`errors`): OutOfBounds and
Misaligned in every space, MaskError, DivergentBarrier, Deadlock (who waits for what), NoProgress,
SharedRace (vector clocks over barriers, named barriers, mbarriers, bar.warp.sync; a shuffle orders
nothing), GlobalRace (within and between blocks, so a non-atomic read-modify-write as well),
UninitializedRead, AsyncHazard (data or accumulators in flight), ProxyFenceMissing, MBarrierError,
DescriptorError, Trap.

Modelled: integer and float arithmetic incl. f16, bf16 and their pairs; all state spaces; atomics;
shfl, vote, match, redux, elect, bar and barrier with names and reductions; mma.sync m16n8k8/k16
(bf16, f16, tf32 into f32), ldmatrix, stmatrix; cp.async; mbarrier; bulk copies and TMA tiles of any
rank with 0/32/64/128-byte swizzle; wgmma m64nNk16/k8 (bf16, f16, tf32 into f32; both majors; A in
registers).

Not modelled; what is met of it raises Unsupported unless said otherwise:
* Timing, occupancy, caches, register budgets (setmaxnreg is ignored), clock values; bank conflicts
  and sectors are counted with `profile=True`.
* Weak memory ordering: every store is visible at once. Fences order blocks coarsely for GlobalRace,
  and fence.proxy.async is required, behind cp.async as well; fence.mbarrier_init,
  wgmma.fence and tensormap fences are ignored.
* Between blocks only atomics and fences order accesses, whatever address they use; blocks beyond a
  batch (65536 threads) run after it, so a grid-wide barrier deadlocks when the grid is larger.
* Lock-free protocols over plain shared-memory loads and stores: SharedRace accuses them.
* A partial-mask bar.warp.sync orders its whole warp; threads that store the same value to one place
  in one instruction are not accused.
* Rounding: fma of f32 goes through double (wrong once in 2^29), that of f64 through long double;
  approximate functions (ex2, lg2, rcp, rsqrt, tanh, sin, cos) are more exact than hardware;
  denormals are kept despite .ftz; matrix products add in another order and in float32.
* Clusters of more than one block, multicast, distributed shared memory, im2col, bulk reductions,
  tensormap.replace, fp8 and integer matrix products, sparse ones, vector atomics, textures,
  tcgen05, calls of functions that nvcc did not inline, printf, carry chains, packed comparisons,
  128-bit items.
"""

from . import access, arithmetic, bits, copy_ops, matrix, types  # noqa: F401
from .errors import *  # noqa: F403
from .launch import (  # noqa: F401
    Module,
    Packed,
    Stats,
    compile_ptx,
    load,
    number_bytes,
    nvcc,
)
from .memory import Uninitialized  # noqa: F401
from .tensor_map import TensorMap  # noqa: F401
