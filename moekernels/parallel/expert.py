"""Expert parallelism: rows go to their experts' ranks and come back, as differentiable functions.

One message a peer, layer and direction: a row's routing weight travels behind it, in backward its
gradient does. What is kept for backward is integers only; the rows that arrive are kept by whoever
computes with them.

Legend: T tokens, H hidden, K top-k, E experts, e local experts, R routed rows, P peers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moekernels import _host, ops
from moekernels.ops import _deferred, _derivatives
from moekernels.ops._library import raw
from moekernels.parallel import device_exchange, tensor, turns
from moekernels.parallel.exchange import Collective, Exchange, Home, Part, Shared
from moekernels.parallel.mesh import Group

_permute = raw._permute.default


@dataclass(eq=False)
class ExchangePlan:
    """Where the rows of one microbatch go in one layer."""

    group: Group
    exchange: Exchange
    row_of: Tensor  # [T, K] int32, where this rank's choices lie in what it sends
    token_of: Tensor  # [R] int32
    slot_of: Tensor  # [R] int32
    outgoing: Tensor  # [P, e] int64: own rows for each expert; on the CPU, unless it is blind
    counts: Tensor | None  # [P, e], rows from each peer for each local expert; None: not here yet
    layer: int = 0
    last: bool = True  # of the ways of a layer's gradients home: what was put off runs under it
    offsets: dict[Part, Tensor] = field(default_factory=dict)  # [n+1] of parts that have come

    def __post_init__(self) -> None:
        self.local_experts = self.outgoing.shape[1]
        self.whole = Part(0, self.local_experts)

    @cached_property
    def send(self) -> list[int]:
        """[P] own rows to each peer."""
        return self.outgoing.sum(-1).tolist()

    @cached_property
    def receive(self) -> list[int]:
        """[P] rows from each peer, where the exchange asks beforehand."""
        assert self.counts is not None
        return self.counts.sum(-1).tolist()

    @cached_property
    def route(self) -> Any:
        """The `_host.Route` by which memory that ranks share knows the own rows and those that
        came."""
        sizes = self.group.size, self.local_experts, *self.row_of.shape
        own = self.token_of, self.slot_of, self.outgoing
        return _host.Route(self.layer, *sizes, *(t.data_ptr() for t in own))

    @cached_property
    def _bounds(self) -> list[int]:
        """Where each expert's own rows begin."""
        return list(accumulate(self.outgoing.flatten().tolist(), initial=0))

    def parts(self, count: int) -> list[Part]:
        """The local experts in `count` runs that differ by one expert at most."""
        e = self.local_experts
        return [Part(e * i // count, e * (i + 1) // count) for i in range(count)]

    def came(self, part: Part) -> Tensor:
        """[P, n] rows from each peer for each local expert of the part."""
        if self.counts is not None:
            return self.counts[:, part.first : part.end].contiguous()
        return torch.tensor(self.route.came(*part)).view(self.group.size, -1)

    def place(self, part: Part) -> tuple[list[int], list[int]]:
        """Where the own rows of a part lie: the first for each peer, and how many [P]."""
        if part == self.whole:
            return list(accumulate(self.send, initial=0))[:-1], self.send
        firsts = range(part.first, self.outgoing.numel(), self.local_experts)
        starts = [self._bounds[i] for i in firsts]
        length = part.end - part.first
        return starts, [self._bounds[i + length] - self._bounds[i] for i in firsts]

    def rows_of(self, part: Part) -> Tensor:
        """Which of the own rows are for a part [r] int64."""
        runs = [torch.arange(first, first + n) for first, n in zip(*self.place(part))]
        return torch.cat(runs).to(self.slot_of.device)

    def home(self, rows: Tensor, weights: Tensor | None) -> Home:
        """Room for what comes back: [R, H] and [R]."""
        size = self.slot_of.shape[0]
        own_weights = None if weights is None else weights.new_empty(size)
        return Home(rows.new_empty(size, rows.shape[1]), own_weights)

    def describe(self, part: Part | None = None) -> str:
        """What a rank waits for."""
        first, end = part or self.whole
        begin = self.group.rank * self.local_experts
        return f"experts {begin + first}-{begin + end - 1} of layer {self.layer}"

    @staticmethod
    def make(
        ids: Tensor, local_experts: int, group: Group, kept: Kept | None = None, layer: int = 0
    ) -> ExchangePlan:
        """ids [T, K] into P*e experts, e on each peer in peer order. On a GPU it reads back from
        the device once, under a bound never."""
        return _kept(kept, lambda: (ExchangePlan._make(ids, local_experts, group, layer),))[0]

    @staticmethod
    def _make(ids: Tensor, local_experts: int, group: Group, layer: int) -> ExchangePlan:
        routing = ops.route(ids, group.size * local_experts)
        exchange = exchange_of(group)
        outgoing, counts = exchange.counts(routing.counts.view(group.size, local_experts))
        token_of, slot_of = routing.token_of, routing.slot_of
        if not exchange.blind:
            rows = _host.total(outgoing.data_ptr(), outgoing.numel())
            if rows < ids.numel():  # some are dropped
                token_of, slot_of = token_of[:rows], slot_of[:rows]
        return ExchangePlan(
            group, exchange, routing.row_of, token_of, slot_of, outgoing, counts, layer
        )


def exchange_of(group: Group) -> Exchange:
    if group.device_memory is not None:
        return device_exchange.over(group)
    return Collective(group) if group.memory is None else Shared(group.memory, group.bound)


def _scatter(
    x: Tensor, weights: Tensor, plan: ExchangePlan, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their weights and offsets of the local experts: what `dispatch` computes."""

    def exchange() -> tuple:
        pending = plan.exchange.post_out(x, weights, plan)
        turns.border("dispatch", plan.layer, forward=True)
        return pending.wait()

    return _kept(kept, exchange)


def _gather(
    drows: Tensor,
    dweights: Tensor,
    plan: ExchangePlan,
    meanwhile: Callable[[], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Its transpose: rows [R', H] and weights [R'] -> their sums [T, H] and [T, K]. `meanwhile`
    runs while they are on their way."""
    pending = plan.exchange.post_back(drows, dweights, plan)
    if meanwhile and not turns.running():
        meanwhile()
    turns.border("dispatch's gradient", plan.layer, forward=False)
    home = pending.wait()
    assert home.weights is not None  # sent beside the rows
    dx = ops.combine(home.rows, plan.row_of, plan.token_of)
    return dx, by_slot(home.weights, plan.row_of)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, plan: ExchangePlan, kept: Kept | None):
        ctx.plan = plan
        rows, row_weights, offsets = _scatter(x, weights, plan, kept)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(True)
        return rows, row_weights, offsets

    @staticmethod
    def backward(ctx, drows: Tensor, dweights: Tensor, _):
        if _differentiable("dispatch"):
            return *_DispatchBack.apply(drows, dweights, ctx.plan), None, None
        # What the experts' backward has put off since that of `combine`.
        meanwhile = _deferred.run if ctx.plan.last else None
        return *_gather(drows, dweights, ctx.plan, meanwhile), None, None


class _DispatchBack(torch.autograd.Function):
    """The backward of `dispatch`, whose own is `dispatch` again: both are linear."""

    @staticmethod
    def forward(ctx, drows: Tensor, dweights: Tensor, plan: ExchangePlan):
        ctx.plan = plan
        ctx.set_materialize_grads(True)
        return _gather(drows, dweights, plan)

    @staticmethod
    def backward(ctx, ddx: Tensor, ddweights: Tensor):
        if _differentiable("dispatch"):
            return *_Dispatch.apply(ddx, ddweights, ctx.plan, None)[:2], None
        return *_scatter(ddx, ddweights, ctx.plan)[:2], None


def _bring(rows: Tensor, plan: ExchangePlan) -> Tensor:
    """Rows of the local experts -> each token's sum: what `combine` computes."""
    pending = plan.exchange.post_back(rows, None, plan)
    turns.border("combine", plan.layer, forward=True)
    rows, _ = pending.wait()
    return ops.combine(rows, plan.row_of, plan.token_of)


def _spread(dout: Tensor, plan: ExchangePlan) -> Tensor:
    """Its transpose."""
    pending = plan.exchange.post_out(dout, None, plan)
    if turns.running():  # of the layer behind, which a pair leaves until here
        turns.border("weights", plan.layer, forward=False)
        _deferred.run()
        turns.border("combine's gradient", plan.layer, forward=False)
    rows = pending.wait().rows
    _deferred.begin()
    return rows


class _Combine(torch.autograd.Function):
    """`combine`, or with `back` its backward: each is the other's transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: ExchangePlan, back: bool) -> Tensor:
        ctx.plan, ctx.back = plan, back
        return (_spread if back else _bring)(x, plan)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if _differentiable("combine"):
            return _Combine.apply(grad, ctx.plan, not ctx.back), None, None
        return (_bring if ctx.back else _spread)(grad, ctx.plan), None, None


def _differentiable(name: str) -> bool:
    """Asked in a backward: whether it must be differentiable itself."""
    if not _derivatives.needs_plain():
        return False
    _derivatives.refuse_transforms(name)
    return True


def by_slot(row_values: Tensor, row_of: Tensor) -> Tensor:
    """row_values [R] -> [T, K], zero where the choice was dropped."""
    found = _permute(row_values.view(-1, 1), row_of.view(-1))
    return found.view(row_of.shape)


class Kept:
    """What an exchange brought, kept so that recomputing a layer does not repeat the exchange.

    The forward pass fills it in the order of the calls, the recomputation empties it likewise.
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
    _derivatives.refuse_transforms("dispatch")
    return _Dispatch.apply(x, weights, plan, kept)


def combine(rows: Tensor, plan: ExchangePlan) -> Tensor:
    """Weighted rows [R', H] of the local experts -> [T, H], each token's rows summed."""
    _derivatives.refuse_transforms("combine")
    return _Combine.apply(rows, plan, False)


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
        return tensor.all_gather(x, group, stamped=True)
    copies = x.expand(group.size, *x.shape).reshape(-1, *x.shape[1:])
    send = [x.shape[0]] * group.size
    return tensor.all_to_all(copies, group, sizes, send, stamped=True)


def sum_uneven(parts: list[Tensor], sizes: list[int], group: Group) -> list[Tensor]:
    """parts [sum T_p, *] -> [T, *] of own tokens, summed over the peers in peer order, in fp32 at
    least. One message."""
    own = sizes[group.rank]
    message = tensor.all_to_all(_to_bytes(parts), group, [own] * group.size, sizes, stamped=True)
    summed = []
    for part in _from_bytes(message, parts):
        stacked = part.view(group.size, own, part.shape[1])
        wide = torch.promote_types(part.dtype, torch.float32)
        summed.append(stacked.sum(0, dtype=wide).to(part.dtype))
    return summed


def _gather_all(x: Tensor, weights: Tensor, ids: Tensor, sizes: list[int], group: Group):
    likes = [x, weights, ids]
    return _from_bytes(gather_uneven(_to_bytes(likes), sizes, group), likes)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, ids, sizes, group, kept):
        ctx.sizes, ctx.group = sizes, group
        x, weights, ids = _kept(kept, lambda: _gather_all(x, weights, ids, sizes, group))
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(True)
        return x, weights, ids

    @staticmethod
    def backward(ctx, dx: Tensor, dweights: Tensor, _):
        if _differentiable("gather_tokens"):  # each is a sum over the peers
            dx = _SumTokens.apply(dx, ctx.sizes, ctx.group, False)
            dweights = _SumTokens.apply(dweights, ctx.sizes, ctx.group, False)
        else:
            dx, dweights = sum_uneven([dx, dweights], ctx.sizes, ctx.group)
        return dx, dweights, None, None, None, None


def _sum_one(partial: Tensor, sizes: list[int], group: Group) -> Tensor:
    return sum_uneven([partial], sizes, group)[0]


def _gather_one(dout: Tensor, sizes: list[int], group: Group) -> Tensor:
    return gather_uneven(dout.contiguous(), sizes, group)


class _SumTokens(torch.autograd.Function):
    """`sum_tokens`, or with `back` its backward: each is the other's transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: Group, back: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.back = sizes, group, back
        return (_gather_one if back else _sum_one)(x, sizes, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if _differentiable("sum_tokens"):
            return _SumTokens.apply(grad, ctx.sizes, ctx.group, not ctx.back), None, None, None
        grad = (_sum_one if ctx.back else _gather_one)(grad, ctx.sizes, ctx.group)
        return grad, None, None, None


def token_counts(x: Tensor, group: Group, *, alike: bool, kept: Kept | None = None) -> list[int]:
    """How many tokens each peer holds; `alike` says that they are known to be as many as here."""
    if alike:
        return [x.shape[0]] * group.size
    here = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    return _kept(kept, lambda: (tensor.all_gather(here, group, stamped=True).tolist(),))[0]


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
    _derivatives.refuse_transforms("gather_tokens")
    return _GatherTokens.apply(x, weights, ids, sizes, group, kept)


def sum_tokens(partial: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Partial sums [all tokens, H] of every peer -> the sums of own tokens [T, H]."""
    _derivatives.refuse_transforms("sum_tokens")
    return _SumTokens.apply(partial, sizes, group, False)
