"""Tensor parallelism: conjugate functions over local shards, one group at a time.

Where the activations between blocks are split by tokens (sequence parallel), a block begins with
`gather_tokens` and ends with `scatter_tokens`; where they are replicated it begins with `copy_to`
and ends with `reduce_from`.

| function      | forward                        | backward                       |
|---------------|--------------------------------|--------------------------------|
| copy_to       | identity                       | sum over the group             |
| reduce_from   | sum over the group             | identity                       |
| gather_tokens | all ranks' tokens              | sum, keep own tokens           |
| scatter_tokens| sum, keep own tokens           | all ranks' tokens              |
| split_tokens  | keep own tokens                | all ranks' tokens              |
| join_tokens   | all ranks' tokens              | keep own tokens                |
| swap_columns  | own columns to own tokens      | own tokens to own columns      |

Legend: T tokens, H hidden, P ranks of the group. Token dimensions are dimension 0 and divide by P.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels.ops import _derivatives
from moekernels.parallel.measure import border, waited
from moekernels.parallel.mesh import Group
from moekernels.parallel.peers import SUMS

# The lane of shared memory that messages of a pipeline back take; sums take it in other groups.
LANE = 1
UNDER_WAY = 8  # sums at once: a lane holds 16 messages unread

# torch 2.13 renamed these two and warns at the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _sum_over(parts: Tensor) -> Tensor:
    """parts [P, ...] -> their sum in rank order, accumulated in fp32 at least."""
    dtype = parts.dtype
    if dtype in (torch.float16, torch.bfloat16):
        parts = parts.float()
    out = parts[0] + parts[1]
    for part in parts[2:]:  # one by one: in which order `sum` adds depends on the shape
        out += part
    return out.to(dtype)


def all_gather(x: Tensor, group: Group, *, stamped: bool = False) -> Tensor:
    """x [T, ...] -> [P*T, ...], raw (not differentiable), as are the functions below without an
    autograd twin. `stamped` as in `all_to_all`."""
    if group.size == 1:
        return x
    if group.memory is not None:
        return group.memory.all_gather(x, stamped=stamped)
    if x.device.type == "cpu":
        # gloo passes an all-gather around a ring; sending to every peer at once halves the latency
        # at 4 ranks.
        copies = x.repeat(group.size, *[1] * (x.dim() - 1))
        return post_all_to_all(copies, group, None, None).wait(stamped=stamped)
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    border.sent += stamped * x.nbytes * len(group.far)
    with waited.span(x.device) if stamped else nullcontext():
        _all_gather_single(out, x.contiguous(), group=group.process_group)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """x [P*T, ...] -> [T, ...], the sum over the ranks of this rank's part."""
    if group.size == 1:
        return x
    if group.memory is not None and x.dtype in SUMS:
        return group.memory.reduce_scatter(x)
    part = x.shape[0] // group.size
    if x.device.type == "cpu":
        # Faster than gloo's own, and the sum is made in rank order and in fp32.
        parts = all_to_all(x, group)
        return _sum_over(parts.view(group.size, part, *x.shape[1:]))
    out = x.new_empty(part, *x.shape[1:])
    _reduce_scatter_single(out, x.contiguous(), group=group.process_group)
    return out


def begin_reduce_scatter(x: Tensor, group: Group, tag: int) -> Callable[[], Tensor]:
    """`reduce_scatter` of a flat x over several ranks that goes on beside what follows; what is
    given waits for it. x stays as it is until then. Ranks begin in one order, each with the same
    `tag` of its own; at most `UNDER_WAY` at once, of a group whose ranks exchange no messages of a
    pipeline."""
    if group.memory is not None:
        parts, memory = x.view(group.size, -1), group.memory
        peers = [peer for peer in range(group.size) if peer != group.rank]
        for peer in peers:
            memory.send(parts[peer], peer, LANE, tag)
        numbers = [memory.expect(peer, LANE) for peer in peers]

        def wait() -> Tensor:
            came = torch.empty_like(parts)
            came[group.rank] = parts[group.rank]
            for peer, number in zip(peers, numbers):
                memory.receive(came[peer], peer, LANE, number, tag)
            return _sum_over(came)

    elif x.device.type == "cpu":
        posted = post_all_to_all(x, group, None, None)

        def wait() -> Tensor:
            return _sum_over(posted.wait(stamped=False).view(group.size, -1))

    else:
        out = x.new_empty(len(x) // group.size)
        work = _reduce_scatter_single(out, x, group=group.process_group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

    return wait


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, the same bits on all of them."""
    if group.size == 1:
        return x
    if x.device.type == "cpu" and x.numel() <= 65536:
        if group.memory is not None and x.dtype in SUMS:
            return group.memory.all_reduce(x)
        flat = all_gather(x.reshape(1, -1), group)
        return _sum_over(flat).view(x.shape)
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group.process_group)
    return out


def all_to_all(
    x: Tensor,
    group: Group,
    receive: list[int] | None = None,
    send: list[int] | None = None,
    *,
    stamped: bool = False,
) -> Tensor:
    """Exchange rows: `send[p]` rows to peer p, `receive[p]` rows from it, in peer order; equal
    parts by default. `stamped`: it is one of those that `Measure` counts."""
    if group.size == 1:
        return x
    if group.memory is not None:
        return group.memory.all_to_all(x, receive, send, stamped=stamped)
    posted = post_all_to_all(x, group, receive, send)
    return posted.wait(stamped=stamped)


class Posted:
    """A collective under way; holds what it reads and writes, and counts the bytes of it that go to
    other nodes."""

    def __init__(self, out: Tensor, x: Tensor, work: dist.Work, far: int) -> None:
        self.out, self.x, self.work, self.far = out, x, work, far

    def wait(self, *, stamped: bool = True) -> Tensor:
        if stamped:
            border.sent += self.far
            with waited.span(self.out.device):
                self.work.wait()
        else:
            self.work.wait()
        return self.out


def post_all_to_all(
    x: Tensor, group: Group, receive: list[int] | None, send: list[int] | None
) -> Posted:
    """`all_to_all` that is waited for later, over the group's collective."""
    rows = x.shape[0] if receive is None else sum(receive)
    out, x = x.new_empty(rows, *x.shape[1:]), x.contiguous()
    work = dist.all_to_all_single(out, x, receive, send, group=group.process_group, async_op=True)
    far = len(group.far) * (x.nbytes // group.size)
    if send is not None and group.far and x.shape[0]:
        far = sum(send[peer] for peer in group.far) * (x.nbytes // x.shape[0])
    return Posted(out, x, work, far)


def own_part(x: Tensor, group: Group) -> Tensor:
    """x [P*T, ...] -> this rank's [T, ...]."""
    part = x.shape[0] // group.size
    return x[group.rank * part : (group.rank + 1) * part]


def _to_own_tokens(x: Tensor, group: Group) -> Tensor:
    """x [T, C/P] with own columns -> [T/P, C] with own tokens."""
    part = x.shape[0] // group.size
    parts = all_to_all(x, group).view(group.size, part, x.shape[1])
    return parts.transpose(0, 1).reshape(part, group.size * x.shape[1])


def _to_own_columns(x: Tensor, group: Group) -> Tensor:
    """The inverse of `_to_own_tokens`."""
    rows, columns = x.shape
    parts = x.view(rows, group.size, columns // group.size).transpose(0, 1)
    return all_to_all(parts.reshape(rows * group.size, columns // group.size), group)


def _identity(x: Tensor, group: Group) -> Tensor:
    return x


def in_rank_order(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of a flat x; the bits of an element do not hang on where in x it
    lies, as they do where a ring begins each part of x with another rank. On the CPU."""
    if x.device.type != "cpu" or group.size < 3:  # two terms have one order
        return all_reduce(x, group)
    padded = torch.nn.functional.pad(x, (0, -len(x) % group.size))
    return all_gather(reduce_scatter(padded, group), group)[: len(x)]


def _conjugate(name: str, forward, backward, doc: str):
    """An autograd function of (x, group) from two raw ones, skipped where the group is one rank.

    Both are linear and each other's transpose: the backward of the backward is the forward.
    """

    class Conjugate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, group: Group, back: bool) -> Tensor:
            ctx.group, ctx.back = group, back
            out = (backward if back else forward)(x, group)
            return x.view_as(x) if out is x else out

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
            if _derivatives.needs_plain():
                _derivatives.refuse_transforms(name)
                return Conjugate.apply(grad, ctx.group, not ctx.back), None, None
            return (forward if ctx.back else backward)(grad, ctx.group), None, None

    Conjugate.__name__ = Conjugate.__qualname__ = name

    def function(x: Tensor, group: Group) -> Tensor:
        if group.size == 1:
            return x
        _derivatives.refuse_transforms(name)
        return Conjugate.apply(x, group, False)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


copy_to = _conjugate(
    "copy_to", _identity, all_reduce, "Enter a parallel block with replicated activations."
)
reduce_from = _conjugate(
    "reduce_from", all_reduce, _identity, "Leave a parallel block with replicated activations."
)
gather_tokens = _conjugate(
    "gather_tokens", all_gather, reduce_scatter, "Enter a parallel block: x [T/P, ...] -> [T, ...]."
)
scatter_tokens = _conjugate(
    "scatter_tokens",
    reduce_scatter,
    all_gather,
    "Leave a parallel block: x [T, ...] -> [T/P, ...].",
)
split_tokens = _conjugate(
    "split_tokens", own_part, all_gather, "Keep own tokens of replicated x [T, ...] -> [T/P, ...]."
)
join_tokens = _conjugate(
    "join_tokens",
    all_gather,
    own_part,
    "Replicate what is split by tokens: [T/P, ...] -> [T, ...].",
)
swap_columns = _conjugate(
    "swap_columns",
    _to_own_tokens,
    _to_own_columns,
    "Own columns of all tokens to all columns of own tokens: x [T, C/P] -> [T/P, C].",
)
