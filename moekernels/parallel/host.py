"""How ranks share the cores and the memory of their host."""

from __future__ import annotations

import contextlib
import os


def share_cores() -> None:
    """Schedule this process as a batch job; call before its gloo groups are made, whose threads
    inherit it.

    gloo's event thread polls in a loop for a lock that a sending or receiving thread holds. Woken
    on that thread's core it preempts the holder and spins out its time slice: with more ranks than
    cores a message of 64 bytes took 3 to 7 ms where it takes 0.06. Linux does not let a batch job's
    wake-up preempt.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or not permitted
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def bound_primitives() -> None:
    """Have torch keep few of the kernels that oneDNN makes; call before the first product.

    For bf16 products on the CPU one is made for each number of rows, and torch and oneDNN keep
    1,024 of them each: 400 token counts grew a process by 2.9 GB, and by 13 MB with both at 16. A
    step uses about twelve a micro-batch, the same in all layers, and 64 outlast it.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
