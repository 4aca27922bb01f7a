"""What the model needs of a microbatch; `moekernels.data.MicroBatch` is one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """T tokens of packed sequences. T divides by tp; padding has `valid` False and label -100."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, -100 where there is no loss
    positions: Tensor  # [T] int64, from 0 in every segment
    cu_seqlens: list[int]  # segment boundaries, on the host
    num_tokens: int  # valid tokens
    loss_scale: float  # 1 / tokens of the whole step
    valid: Tensor | None  # [T] bool, None where all are valid
