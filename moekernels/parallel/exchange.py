"""The exchange of rows between the ranks that hold experts: posted, then waited for.

`post_out` sends a rank's rows to the ranks of their experts, `post_back` sends results home; both
give the rows away and return at once, and between that and `wait` runs whatever does not need them.
All ranks of a group post and wait in the same order. Two kinds, of the same bits:

    Shared       ranks of one machine: rows are put straight into memory that the peers map, each
                 source's counts in front of them, and taken from there to their place by expert
    Collective   any ranks: all_to_all of torch.distributed over packed messages

Legend: T tokens, H hidden, K top-k, e local experts, R own rows, R' rows that come, P peers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from moekernels import _host, ops
from moekernels.parallel import tensor
from moekernels.parallel.peers import PeerMemory

if TYPE_CHECKING:
    from moekernels.parallel.bound import Bound
    from moekernels.parallel.expert import ExchangePlan
    from moekernels.parallel.mesh import Group


class Arrived(NamedTuple):
    """rows [R', H] by local expert, then by peer; weights [R'] or None; offsets [e+1] int64.

    Where R' is a bound, rows behind the last are zero, and those that found no room are missing.
    """

    rows: Tensor
    weights: Tensor | None
    offsets: Tensor


class Home(NamedTuple):
    """rows [R, H] in the order of the own routing, and their weights [R] or None."""

    rows: Tensor
    weights: Tensor | None


class Part(NamedTuple):
    """Local experts [first, end) of every peer: what one of several exchanges brings."""

    first: int
    end: int


class PendingOut(Protocol):
    def wait(self) -> Arrived: ...


class PendingBack(Protocol):
    def wait(self, into: Home | None = None) -> Home:
        """With `into`, rows of the part are put to their places among all."""


class Exchange(Protocol):
    """A `part` of None is all of a rank's experts. `blind`: no numbers are read back from the
    device, so a plan's stay there."""

    @property
    def blind(self) -> bool: ...

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        """outgoing [P, e] of own rows -> the same on the CPU, and [P, e] of the rows to come, or
        None where those come with the rows."""

    def post_out(
        self, x: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingOut:
        """x [T, H], weights [T, K]. The plan knows the rows that came when it is waited for."""

    def post_back(
        self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingBack:
        """rows [R', H], weights [R'], as `Arrived` has them."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of the weights that travel beside rows of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Shared:
    blind = False

    def __init__(self, memory: PeerMemory, bound: Bound | None = None) -> None:
        self.memory, self.host, self.bound = memory, memory.host, bound

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        return outgoing.contiguous(), None

    def post_out(
        self, x: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingOut:
        return _SharedOut(self, x, weights, plan, part or plan.whole)

    def post_back(
        self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingBack:
        return _SharedBack(self, rows, weights, plan, part or plan.whole)


# Of a small exchange Python takes most of the time: few calls, and each tensor made once.


class _SharedOut:
    """Holds what it sends until it is waited for: own rows go straight to their place then."""

    __slots__ = ("exchange", "number", "part", "plan", "weights", "x")

    def __init__(
        self, exchange: Shared, x: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part
    ) -> None:
        x, size = x.contiguous(), x.itemsize
        address = weight = 0
        if weights is not None:
            if weights.dtype is not x.dtype or size < 4:
                weights = weights.to(wide(x.dtype))
            weights = weights.contiguous()
            address, weight = weights.data_ptr(), weights.itemsize
        self.exchange, self.plan, self.part, self.x, self.weights = exchange, plan, part, x, weights
        first, end = part
        try:
            self.number = exchange.host.post_out(
                plan.route, x.data_ptr(), address, x.shape[1] * size, weight, first, end
            )
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"room for rows of {plan.describe(part)}") from None

    def wait(self) -> Arrived:
        exchange, plan, part, x = self.exchange, self.plan, self.part, self.x
        try:
            rows = exchange.host.arrive(self.number)
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"rows of {plan.describe(part)}") from None
        if exchange.bound is not None:
            rows = exchange.bound.take(rows, (part.end - part.first) / plan.local_experts)
        out = x.new_empty(rows, x.shape[1])
        weights, address, told = None, 0, 0
        if self.weights is not None:
            weights = self.weights.new_empty(rows)
            address = weights.data_ptr()
        offsets = plan.offsets.get(part)
        if offsets is None:  # the same when gradients come the same way
            offsets = torch.empty(part.end - part.first + 1, dtype=torch.int64)
            plan.offsets[part], told = offsets, offsets.data_ptr()
        exchange.host.take_out(self.number, out.data_ptr(), address, told, rows)
        return Arrived(out, weights, offsets)


class _SharedBack:
    __slots__ = ("exchange", "number", "plan", "rows", "weights")

    def __init__(
        self, exchange: Shared, rows: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part
    ) -> None:
        rows, size = rows.contiguous(), rows.itemsize
        address = weight = 0
        if weights is not None:
            if weights.dtype is not rows.dtype or size < 4:
                weights = weights.to(wide(rows.dtype))
            weights = weights.contiguous()
            address, weight = weights.data_ptr(), weights.itemsize
        self.exchange, self.plan, self.rows, self.weights = exchange, plan, rows, weights
        count, width = rows.shape
        first, end = part
        try:
            self.number = exchange.host.post_back(
                plan.route, rows.data_ptr(), address, width * size, weight, count, first, end
            )
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"room for rows of {plan.describe(part)}") from None

    def wait(self, into: Home | None = None) -> Home:
        exchange, plan = self.exchange, self.plan
        home = into or plan.home(self.rows, self.weights)
        rows, weights = home
        address = 0 if weights is None else weights.data_ptr()
        try:
            exchange.host.take_back(self.number, rows.data_ptr(), address)
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"results of layer {plan.layer}") from None
        return home


class Collective:
    """Over packed messages; each is sent when it is posted and, on the CPU, by gloo's threads."""

    blind = False

    def __init__(self, group: Group) -> None:
        self.group = group

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        incoming = tensor.all_to_all(outgoing, self.group, stamped=True)
        own, come = torch.stack([outgoing, incoming]).cpu()  # reads back from the device once
        return own, come

    def post_out(
        self, x: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingOut:
        slots, send, receive, counts = plan.slot_of, plan.send, plan.receive, plan.counts
        if part is not None:
            counts = plan.came(part)
            slots, send = slots[plan.rows_of(part)], plan.place(part)[1]
            receive = counts.sum(-1).tolist()
        assert counts is not None  # asked before anything was sent
        message = ops.pack(x, weights, slots, plan.row_of.shape[1])
        posted = tensor.post_all_to_all(message, self.group, receive, send)
        return _CollectiveOut(posted, counts, x.shape[1])

    def post_back(
        self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingBack:
        send, receive, counts = plan.send, plan.receive, plan.counts
        if part is not None:
            counts = plan.came(part)
            send, receive = plan.place(part)[1], counts.sum(-1).tolist()
        message = ops.ungroup(rows.contiguous(), counts, weights)
        posted = tensor.post_all_to_all(message, self.group, send, receive)
        return _CollectiveBack(posted, plan, part, rows.shape[1])


class _CollectiveOut:
    def __init__(self, posted: tensor.Posted, counts: Tensor, width: int) -> None:
        self.posted, self.counts, self.width = posted, counts, width

    def wait(self) -> Arrived:
        return Arrived(*ops.regroup(self.posted.wait(), self.counts, self.width))


class _CollectiveBack:
    def __init__(
        self, posted: tensor.Posted, plan: ExchangePlan, part: Part | None, width: int
    ) -> None:
        self.posted, self.plan, self.part, self.width = posted, plan, part, width

    def wait(self, into: Home | None = None) -> Home:
        message = self.posted.wait()
        if message.shape[1] == self.width:
            home = Home(message, None)
        else:
            # As one source with one expert, regroup keeps the order and parts rows and weights.
            count = torch.tensor([[message.shape[0]]])
            home = Home(*ops.regroup(message, count, self.width)[:2])
        if into is None:
            return home
        rows = self.plan.rows_of(self.part or self.plan.whole)
        into.rows[rows] = home.rows
        if into.weights is not None:
            assert home.weights is not None  # sent beside the rows
            into.weights[rows] = home.weights
        return into
