"""Expert parallelism: rows go to the ranks that hold their experts and come back, as differentiable
functions.

One message a peer, layer and direction: a row's routing weight travels behind it, in backward its
gradient does. What is kept for backward is integers only; the rows that arrive are kept by whoever
computes with them.

Legend: T tokens, H hidden, K top-k, E experts, e local experts, R routed rows, P peers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moekernels import ops
from moekernels.parallel import tensor
from moekernels.parallel.mesh import Group
from moekernels.parallel.stopwatch import Stopwatch

exchange_time = Stopwatch()  # of this process: what its layers wait for rows and their numbers


def all_to_all(
    x: Tensor, group: Group, receive: list[int] | None = None, send: list[int] | None = None
) -> Tensor:
    with exchange_time.span(x.device):
        return tensor.all_to_all(x, group, receive, send)


def all_gather(x: Tensor, group: Group) -> Tensor:
    with exchange_time.span(x.device):
        return tensor.all_gather(x, group)


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Where the rows of one micro-batch go in one layer."""

    group: Group
    row_of: Tensor  # [T, K] int32, where this rank's choices lie in what it sends
    token_of: Tensor  # [R] int32
    slot_of: Tensor  # [R] int32
    send: list[int]  # [P] rows to each peer
    receive: list[int]  # [P] rows from each peer
    counts: Tensor  # [P, e] int64 on the CPU: rows received from each peer for each local expert

    @staticmethod
    def make(
        ids: Tensor, local_experts: int, group: Group, kept: Kept | None = None
    ) -> ExchangePlan:
        """ids [T, K] into P*e experts, e on each peer in peer order. Reads back from the device
        once."""
        return _kept(kept, lambda: (ExchangePlan._make(ids, local_experts, group),))[0]

    @staticmethod
    def _make(ids: Tensor, local_experts: int, group: Group) -> ExchangePlan:
        routing = ops.route(ids, group.size * local_experts)
        outgoing = routing.counts.view(group.size, local_experts)
        both = torch.stack([outgoing, all_to_all(outgoing, group)]).cpu()
        send, receive = both.sum(-1).tolist()
        rows = sum(send)  # fewer than T*K where ids are dropped
        return ExchangePlan(
            group,
            routing.row_of,
            routing.token_of[:rows],
            routing.slot_of[:rows],
            send,
            receive,
            both[1],
        )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, plan: ExchangePlan, kept: Kept | None):
        ctx.plan, ctx.width = plan, x.shape[1]

        def exchange() -> tuple[Tensor, Tensor, Tensor]:
            message = ops.pack(x, weights, plan.slot_of, weights.shape[1])
            message = all_to_all(message, plan.group, plan.receive, plan.send)
            return ops.regroup(message, plan.counts, x.shape[1])

        rows, row_weights, offsets = _kept(kept, exchange)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(True)
        return rows, row_weights, offsets

    @staticmethod
    def backward(ctx, drows: Tensor, dweights: Tensor, _):
        plan = ctx.plan
        message = ops.ungroup(drows.contiguous(), plan.counts, dweights.contiguous())
        message = all_to_all(message, plan.group, plan.send, plan.receive)
        # As one source with one expert, regroup keeps the order and takes rows and weights apart.
        drows, dweights, _ = ops.regroup(message, torch.tensor([[sum(plan.send)]]), ctx.width)
        dx = ops.combine(drows, plan.row_of, plan.token_of)
        return dx, _by_slot(dweights, plan.row_of), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        message = ops.ungroup(rows, plan.counts)
        message = all_to_all(message, plan.group, plan.send, plan.receive)
        return ops.combine(message, plan.row_of, plan.token_of)

    @staticmethod
    def backward(ctx, dout: Tensor):
        plan = ctx.plan
        message = ops.permute(dout.contiguous(), plan.token_of, plan.row_of)
        message = all_to_all(message, plan.group, plan.receive, plan.send)
        drows, _, _ = ops.regroup(message, plan.counts, dout.shape[1])
        return drows, None


def _by_slot(row_values: Tensor, row_of: Tensor) -> Tensor:
    """row_values [R] -> [T, K], zero where the choice was dropped."""
    if row_values.shape[0] == 0:
        return row_values.new_zeros(row_of.shape)
    return torch.where(row_of >= 0, row_values[row_of.clamp_min(0).long()], 0)


class Kept:
    """What an exchange brought, kept so that recomputing a layer does not repeat the exchange.

    The forward pass fills it in the order of the calls, the recomputation empties it in the same
    order.
    """

    def __init__(self) -> None:
        self._values: deque[tuple] = deque()
        self.replaying = False

    def get(self, make: Callable[[], tuple]) -> tuple:
        if self.replaying:
            return self._values.popleft()
        values = make()
        # Aliases: autograd gives the tensors that a function returns a history of their own.
        self._values.append(tuple(v.detach() if isinstance(v, Tensor) else v for v in values))
        return values

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        self.replaying = True
        yield


def _kept(kept: Kept | None, make: Callable[[], tuple]) -> tuple:
    return make() if kept is None else kept.get(make)


def dispatch(
    x: Tensor, weights: Tensor, plan: ExchangePlan, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], weights [T, K] -> rows [R', H] of the local experts in expert order, their weights
    [R'], offsets [e+1]."""
    return _Dispatch.apply(x, weights, plan, kept)


def combine(rows: Tensor, plan: ExchangePlan) -> Tensor:
    """Weighted rows [R', H] of the local experts -> [T, H], each token's rows summed."""
    return _Combine.apply(rows, plan)


# The all-gather form, for more choices than peers: every rank sees all tokens of the group and
# computes its own experts.


def _to_bytes(parts: list[Tensor]) -> Tensor:
    """Tensors [T, *] of any dtypes -> one [T, bytes]."""
    return torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=1)


def _from_bytes(message: Tensor, likes: list[Tensor]) -> tuple[Tensor, ...]:
    """The inverse: widths and dtypes are those of `likes`."""
    widths = [like.shape[1] * like.element_size() for like in likes]
    return tuple(
        part.contiguous().view(like.dtype)
        for part, like in zip(message.split(widths, dim=1), likes)
    )


def gather_uneven(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """x [T_p, ...] on each peer -> all of them [sum T_p, ...], in peer order."""
    if len(set(sizes)) == 1:
        return all_gather(x, group)
    copies = x.expand(group.size, *x.shape).reshape(-1, *x.shape[1:])
    return all_to_all(copies, group, sizes, [x.shape[0]] * group.size)


def sum_uneven(parts: list[Tensor], sizes: list[int], group: Group) -> list[Tensor]:
    """parts [sum T_p, *] -> [T, *] of own tokens, summed over the peers in peer order, in fp32 at
    least. One message."""
    own = sizes[group.rank]
    message = all_to_all(_to_bytes(parts), group, [own] * group.size, sizes)
    summed = []
    for part in _from_bytes(message, parts):
        stacked = part.view(group.size, own, part.shape[1])
        wide = torch.promote_types(part.dtype, torch.float32)
        summed.append(stacked.sum(0, dtype=wide).to(part.dtype))
    return summed


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, ids, sizes, group, kept):
        ctx.sizes, ctx.group = sizes, group

        def exchange() -> tuple[Tensor, ...]:
            message = _to_bytes([x, weights, ids])
            return _from_bytes(gather_uneven(message, sizes, group), [x, weights, ids])

        x, weights, ids = _kept(kept, exchange)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(True)
        return x, weights, ids

    @staticmethod
    def backward(ctx, dx: Tensor, dweights: Tensor, _):
        dx, dweights = sum_uneven([dx, dweights], ctx.sizes, ctx.group)
        return dx, dweights, None, None, None, None


class _SumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return sum_uneven([partial], sizes, group)[0]

    @staticmethod
    def backward(ctx, dout: Tensor):
        return gather_uneven(dout.contiguous(), ctx.sizes, ctx.group), None, None


def token_counts(x: Tensor, group: Group, *, alike: bool, kept: Kept | None = None) -> list[int]:
    """How many tokens each peer holds; `alike` says that they are known to be as many as here."""
    if alike:
        return [x.shape[0]] * group.size
    here = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    return _kept(kept, lambda: (all_gather(here, group).tolist(),))[0]


def gather_tokens(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    sizes: list[int],
    group: Group,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], weights and ids [T, K] of every peer, one after the other. Backward sums the
    gradients of own tokens."""
    return _GatherTokens.apply(x, weights, ids, sizes, group, kept)


def sum_tokens(partial: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Partial sums [all tokens, H] of every peer -> the sums of own tokens [T, H]."""
    return _SumTokens.apply(partial, sizes, group)
