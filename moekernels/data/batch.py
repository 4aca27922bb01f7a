"""One microbatch: several sequences laid end to end, as every stage of the pipeline sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

NO_LABEL = -100  # the label of a token without a loss: cross-entropy's usual ignore index


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens of packed sequences, each attending to itself only.

    Segment i is rows `cu_seqlens[i]:cu_seqlens[i+1]`. Two kinds of padding exist, both with `valid`
    False, label -100 and token 0: rows behind a sequence inside its segment (policies `buckets` and
    `padded`: causal attention never shows them to a real token), and up to `align-1` rows in a last
    segment of their own, which make T a multiple of the tensor-parallel size. Padding goes through
    the dense layers like any row; the gate drops it, so it loads no expert, counts in no statistic
    and changes no gradient: the policies differ in time, never in what is learnt.

    Every valid token that the loader makes has a label, so `loss_scale` weighs the loss and the
    auxiliary losses of the router alike.
    """

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, NO_LABEL where there is no loss
    positions: Tensor  # [T] int64, from 0 in every segment
    cu_seqlens: list[int]  # segment boundaries, on the host: 0 ... T
    num_tokens: int  # valid tokens
    loss_scale: float  # 1 / labels in the step: all microbatches, all data-parallel ranks
    valid: Tensor | None = None  # [T] bool, None where all are valid

    @property
    def rows(self) -> int:
        """T, padding included: the size of this microbatch's activations."""
        return self.cu_seqlens[-1]

    @property
    def max_seqlen(self) -> int:
        return max((b - a for a, b in pairwise(self.cu_seqlens)), default=0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            positions=moved(self.positions),
            valid=None if self.valid is None else moved(self.valid),
        )

    @staticmethod
    def pack(
        sequences: Sequence[tuple[Tensor, Tensor]],
        *,
        loss_scale: float,
        align: int = 1,
        pad_to: int | None = None,
    ) -> MicroBatch:
        """Lay sequences, pairs of (tokens [s], labels [s]), end to end.

        With `pad_to` every segment is that long; `align` rounds T up with a segment of padding.
        """
        lengths = [len(tokens) for tokens, _ in sequences]
        segments = [n if pad_to is None else pad_to for n in lengths]
        if any(n > s for n, s in zip(lengths, segments)):
            raise ValueError(
                f"pad_to must be at least the longest sequence, {max(lengths)}, got {pad_to}"
            )
        num_tokens = sum(lengths)
        if tail := -sum(segments) % align:
            segments = [*segments, tail]
        bounds = [0]
        for n in segments:
            bounds.append(bounds[-1] + n)
        total = bounds[-1]

        tokens = torch.zeros(total, dtype=torch.int64)
        labels = torch.full((total,), NO_LABEL, dtype=torch.int64)
        valid = torch.zeros(total, dtype=torch.bool)
        for start, (sequence, targets) in zip(bounds, sequences):
            end = start + len(sequence)
            tokens[start:end] = sequence
            labels[start:end] = targets
            valid[start:end] = True
        # Small single-threaded copies: repeat_interleave over the segments would wake the thread
        # pool for any size, which costs milliseconds where local ranks share the cores.
        positions = torch.empty(total, dtype=torch.int64)
        ramp = torch.arange(max(segments, default=0))
        for start, n in zip(bounds, segments):
            positions[start : start + n] = ramp[:n]
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            positions=positions,
            cu_seqlens=bounds,
            num_tokens=num_tokens,
            loss_scale=loss_scale,
            valid=None if num_tokens == total else valid,
        )
