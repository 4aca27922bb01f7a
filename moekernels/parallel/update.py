"""One update by AdamW of a flat buffer of parameters: on the device as a whole, what of its state
lies in the host's memory in chunks as that comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moekernels.parallel import offload
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.average import EMA, approach
from moekernels.parallel.offload import KINDS, Held, Span, Streamed
from moekernels.parallel.rounding import Noise, round_


@dataclass
class Bucket:
    """Parameters of one kind, end to end. `grads` and `weights` are flat and of one length; masters
    and moments are those of `own`."""

    reduce_over: str  # groups of the mesh
    copies: str
    decay: bool
    apart: bool  # all of them are experts', none is
    chunk: int  # of this rank, whose backward gives the gradients
    names: list[str]
    spans: list[tuple[int, int]]
    own: slice  # what this rank updates
    sharded: bool
    grads: Tensor
    weights: Tensor  # what the model computes with
    master: Held  # a view of the weights where they are of its dtype
    exp_avg: Held
    exp_avg_sq: Held
    noise: Noise | None = None  # for moments that are rounded
    ema: Held | None = None  # moving average of the masters, in their dtype
    muon: bool = False  # matrices, of which `exp_avg` alone is kept, the momentum

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of each parameter, by the names of these fields."""
        kinds = KINDS[:-1] if self.muon else KINDS
        return kinds if self.ema is None else (*kinds, EMA)

    @property
    def lifted(self) -> bool:
        """Whether the masters are tensors of their own."""
        return self.weights.dtype != self.master.dtype

    @property
    def cut(self) -> int:
        """Where in `own` what begins that has its moments in the host's memory."""
        return self.own.start + len(self.exp_avg.near)

    @property
    def writers(self) -> str:
        """The group of the mesh whose first rank speaks for all that hold the same as this rank."""
        if not self.sharded:
            return self.copies
        # Tensor-parallel ranks whose gradients are alike keep the same slices.
        return "self" if self.reduce_over == self.copies else "tp"


def update(
    bucket: Bucket,
    config: AdamWConfig,
    step: int,
    lr: float,
    divisor: Tensor | None,
    streamed: Streamed,
) -> None:
    """Masters, moments and, from those, this rank's weights, by its gradients over `divisor`: no
    pass of their own over them."""
    own, cut, held = bucket.own, bucket.cut, [getattr(bucket, kind) for kind in bucket.kinds]
    for begin, end, bits in _bits(bucket, step, _spans(bucket, own.start, cut, cut - own.start)):
        part = slice(begin - own.start, end - own.start)
        _adamw(bucket, begin, [x.near[part] for x in held], bits, config, step, lr, divisor)
    if bucket.lifted:
        bucket.weights[own.start : cut].copy_(bucket.master.near)

    spans = _spans(bucket, cut, own.stop, offload.CHUNK)
    far = [x.far for x in held if len(x.far)]
    brought = streamed.brought([(a - cut, b - cut) for a, b in spans], far)
    # What is brought is asked first: once more behind the last, which goes back then.
    for state, (begin, end, bits) in zip(brought, _bits(bucket, step, spans)):
        weights = bucket.weights[begin:end]
        if not bucket.lifted:
            state = [weights, *state]
        _adamw(bucket, begin, state, bits, config, step, lr, divisor)
        if bucket.lifted:
            weights.copy_(state[0])


def _spans(bucket: Bucket, begin: int, end: int, size: int) -> list[Span]:
    """Of what is updated at a time, whole lines: so many elements, or as their noise is made."""
    if bucket.noise is not None:
        return bucket.noise.spans(slice(begin, end))
    return [(a, min(a + size, end)) for a in range(begin, end, max(1, size))]


def _bits(bucket: Bucket, step: int, spans: list[Span]) -> Iterator[tuple[int, int, Tensor | None]]:
    """The same, with random bits where moments are rounded; they hold until the next ones."""
    if bucket.noise is None or not spans:
        yield from ((begin, end, None) for begin, end in spans)
    else:
        yield from bucket.noise.chunks(step, slice(spans[0][0], spans[-1][1]))


def _adamw(
    bucket: Bucket,
    begin: int,
    state: list[Tensor],
    bits: Tensor | None,
    config: AdamWConfig,
    step: int,
    lr: float,
    divisor: Tensor | None,
) -> None:
    """state: master, moments and, where there is one, average [n] of what begins there."""
    master, *moments = state[:3]
    wide = moments if bits is None else [moment.float() for moment in moments]
    adamw(
        [master],
        [bucket.grads[begin : begin + len(master)]],
        [wide[0]],
        [wide[1]],
        [],
        [torch.tensor(float(step - 1), device=master.device)],
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=lr,
        weight_decay=config.weight_decay if bucket.decay else 0.0,
        eps=config.eps,
        maximize=False,
        grad_scale=divisor,
    )
    if bits is not None:
        round_(wide[0], bits & 0xFFFF, moments[0])
        round_(wide[1], bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF), moments[1])
    for average in state[3:]:
        approach(average, master, config.ema)
