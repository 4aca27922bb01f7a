"""What the CPU kernels keep of the memory of outputs that were freed."""

from __future__ import annotations

from moekernels.ops._library import raw


def release_memory() -> None:
    """Give the memory of freed outputs back to the system.

    The CPU kernels keep that of large ones (from 4 MiB), at most an eighth of the machine's or the
    control group's memory over LOCAL_WORLD_SIZE, for the next output of the size; what nobody takes
    goes back when another is freed ten seconds later. A process that goes idle frees nothing any
    more: it may call this. Tensors that live are not touched.

    >>> ops.release_memory()
    """
    raw._pool_idle(3600.0)
