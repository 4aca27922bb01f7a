"""CuPy arrays in and out, without a copy, on torch's stream. Needs the extra `moekernels[cupy]`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moekernels.errors import UsageError


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UsageError(
            f"interop: CuPy is not importable ({error}); pip install 'moekernels[cupy]'"
        ) from None
    return cupy


def from_cupy(array: Any) -> Tensor:
    """The tensor of a CuPy array: the same memory, on the same device (DLPack).

    DLPack makes torch's current stream wait for what the array's own stream still has to do.
    """
    return torch.from_dlpack(array)


def to_cupy(tensor: Tensor) -> Any:
    """The CuPy array of a CUDA tensor: the same memory (DLPack); bf16 has no CuPy dtype.

    Raises:
        UsageError: CuPy is not installed, or the tensor is not one that CuPy can hold.
    """
    if not tensor.is_cuda:
        raise UsageError(f"to_cupy: the tensor must be on a CUDA device, it is on {tensor.device}")
    if tensor.dtype == torch.bfloat16:
        raise UsageError("to_cupy: CuPy has no bfloat16; give tensor.float() or tensor.half()")
    return _cupy().from_dlpack(tensor.detach())


def cupy_stream(device: torch.device | int | None = None) -> AbstractContextManager:
    """Torch's current stream as a CuPy stream, so that both libraries' kernels run in order.

    with cupy_stream():
        y = cupy.square(to_cupy(x))
    """
    cupy = _cupy()
    stream = torch.cuda.current_stream(device)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device.index)
