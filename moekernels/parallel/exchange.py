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
from moekernels.parallel.measure import BACK, GRAD_BACK, GRAD_OUT, OUT
from moekernels.parallel.peers import PeerMemory

if TYPE_CHECKING:
    from moekernels.parallel.expert import ExchangePlan
    from moekernels.parallel.mesh import Group


class Arrived(NamedTuple):
    """rows [R', H] by local expert, then by peer; weights [R'] or None; offsets [e+1] int64."""

    rows: Tensor
    weights: Tensor | None
    offsets: Tensor


class Home(NamedTuple):
    """rows [R, H] in the order of the own routing, and their weights [R] or None."""

    rows: Tensor
    weights: Tensor | None


class PendingOut(Protocol):
    def wait(self) -> Arrived: ...


class PendingBack(Protocol):
    def wait(self) -> Home: ...


class Exchange(Protocol):
    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        """outgoing [P, e] of own rows -> the same on the CPU, and [P, e] of the rows to come, or
        None where those come with the rows."""

    def post_out(self, x: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingOut:
        """x [T, H], weights [T, K]. Fills in `plan.counts` where it is None, when waited for."""

    def post_back(self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingBack:
        """rows [R', H], weights [R'], as `Arrived` has them."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of the weights that travel beside rows of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Shared:
    def __init__(self, memory: PeerMemory) -> None:
        self.memory, self.host = memory, memory.host

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        return outgoing.contiguous(), None

    def post_out(self, x: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingOut:
        x = x.contiguous()
        if weights is not None:
            weights = weights.to(wide(x.dtype)).contiguous()
        return _SharedOut(self, x, weights, plan)

    def post_back(self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingBack:
        if plan.counts is None:
            raise RuntimeError("combine: the rows that come back were never dispatched")
        rows = rows.contiguous()
        if weights is not None:
            weights = weights.to(wide(rows.dtype)).contiguous()
        return _SharedBack(self, rows, weights, plan)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _SharedOut:
    """Holds what it sends until it is waited for: own rows go straight to their place then."""

    def __init__(
        self, exchange: Shared, x: Tensor, weights: Tensor | None, plan: ExchangePlan
    ) -> None:
        self.exchange, self.x, self.weights, self.plan = exchange, x, weights, plan
        tokens, top_k = plan.row_of.shape
        exchange.host.label = 4 * plan.layer + (OUT if weights is not None else GRAD_OUT)
        try:
            self.number = exchange.host.post_out(
                x.data_ptr(),
                _address(weights),
                plan.slot_of.data_ptr(),
                tokens * top_k,
                top_k,
                x.shape[1] * x.element_size(),
                0 if weights is None else weights.element_size(),
                plan.outgoing.data_ptr(),
                plan.local_experts,
            )
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"room for {plan.describe()}") from None

    def wait(self) -> Arrived:
        plan, host, x = self.plan, self.exchange.host, self.x
        counts = torch.empty(plan.group.size, plan.local_experts, dtype=torch.int64)
        try:
            rows = host.arrive(self.number, counts.data_ptr())
        except _host.Lost as lost:
            raise self.exchange.memory.lost(lost, f"rows of {plan.describe()}") from None
        out = x.new_empty(rows, x.shape[1])
        weights = None if self.weights is None else self.weights.new_empty(rows)
        offsets = torch.empty(plan.local_experts + 1, dtype=torch.int64)
        host.take_out(self.number, out.data_ptr(), _address(weights), offsets.data_ptr())
        if plan.counts is None:
            plan.counts = counts
        return Arrived(out, weights, offsets)


class _SharedBack:
    def __init__(
        self, exchange: Shared, rows: Tensor, weights: Tensor | None, plan: ExchangePlan
    ) -> None:
        self.exchange, self.rows, self.weights, self.plan = exchange, rows, weights, plan
        exchange.host.label = 4 * plan.layer + (BACK if weights is None else GRAD_BACK)
        try:
            self.number = exchange.host.post_back(
                rows.data_ptr(),
                _address(weights),
                rows.shape[1] * rows.element_size(),
                0 if weights is None else weights.element_size(),
                plan.counts.data_ptr(),
                plan.local_experts,
            )
        except _host.Lost as lost:
            raise exchange.memory.lost(lost, f"room for {plan.describe()}") from None

    def wait(self) -> Home:
        plan = self.plan
        rows = sum(plan.send)
        out = self.rows.new_empty(rows, self.rows.shape[1])
        weights = None if self.weights is None else self.weights.new_empty(rows)
        try:
            self.exchange.host.take_back(self.number, out.data_ptr(), _address(weights), plan.send)
        except _host.Lost as lost:
            raise self.exchange.memory.lost(lost, f"results of layer {plan.layer}") from None
        return Home(out, weights)


class Collective:
    """Over packed messages; each is sent when it is posted and, on the CPU, by gloo's threads."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        incoming = tensor.all_to_all(outgoing, self.group, stamped=True)
        own, come = torch.stack([outgoing, incoming]).cpu()  # reads back from the device once
        return own, come

    def post_out(self, x: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingOut:
        message = ops.pack(x, weights, plan.slot_of, plan.row_of.shape[1])
        return _CollectiveOut(self._post(message, plan.receive, plan.send), plan, x.shape[1])

    def post_back(self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan) -> PendingBack:
        message = ops.ungroup(rows.contiguous(), plan.counts, weights)
        return _CollectiveBack(self._post(message, plan.send, plan.receive), plan, rows.shape[1])

    def _post(self, message: Tensor, receive: list[int], send: list[int]) -> tensor.Posted:
        return tensor.post_all_to_all(message, self.group, receive, send)


class _CollectiveOut:
    def __init__(self, posted: tensor.Posted, plan: ExchangePlan, width: int) -> None:
        self.posted, self.plan, self.width = posted, plan, width

    def wait(self) -> Arrived:
        return Arrived(*ops.regroup(self.posted.wait(), self.plan.counts, self.width))


class _CollectiveBack:
    def __init__(self, posted: tensor.Posted, plan: ExchangePlan, width: int) -> None:
        self.posted, self.plan, self.width = posted, plan, width

    def wait(self) -> Home:
        message = self.posted.wait()
        if message.shape[1] == self.width:
            return Home(message, None)
        # As one source with one expert, regroup keeps the order and takes rows and weights apart.
        rows, weights, _ = ops.regroup(message, torch.tensor([[message.shape[0]]]), self.width)
        return Home(rows, weights)
