"""Executes the PTX that nvcc makes on a CPU, with numpy: one array element for every CUDA thread.

    module = ptx.load("kernel.cu", arch="80")          # or PTX text
    module.launch("kernel_name", grid, block, [x, y, n], shared_bytes=0)   # writes y in place

Threads at the same instruction run as one group over all blocks of a batch; groups split at
divergent branches and merge again (`schedule`). Arrays are copied into an arena where a kernel sees
exactly their bytes (`memory`). `schedule=seed` lets warps run far ahead of one another, differently
for every seed, and delays some asynchronous work; `lazy=True` makes cp.async, bulk copies and wgmma
take effect as late as they may.

`README.md` says what it models and what not, and which errors it finds (`errors`).
"""

from . import access, arithmetic, bits, copy_ops, matrix, types  # noqa: F401
from .devices import Launch, launch_together  # noqa: F401
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
from .machine import Event  # noqa: F401
from .memory import Uninitialized  # noqa: F401
from .tensor_map import TensorMap  # noqa: F401
