"""The exchange of rows between GPUs of one node: kernels put them straight to their place in memory
that the peers share (`ops/exchange.py`), behind the same `post` and `wait` as the other exchanges.

Counts are read back from the device once a plan, which sizes what comes exactly; nothing else is.
Under a bound nothing is: it is the size of what comes, and the launches of a layer can be recorded
in a graph. Slabs grow where a plan or the bound needs more, on all ranks at once, as all know the
same. The kernels are proven in the emulator, over virtual ranks; none of this has run on a GPU.

Legend: T tokens, H hidden, K top-k, e local experts, R own rows, R' rows that come, P peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moekernels.errors import UsageError
from moekernels.model.dispatch import SLOTS
from moekernels.ops import _exchange_experts as products
from moekernels.ops import exchange as kernels
from moekernels.parallel.device_stamps import DeviceStamps
from moekernels.parallel.exchange import Arrived, Home, Part, PendingBack, PendingOut, wide
from moekernels.parallel.measure import BACK, COUNTS, GRAD_BACK, GRAD_OUT, OUT
from moekernels.parallel.peers import PeerLost

if TYPE_CHECKING:
    from moekernels.ops._ffn import Ffn
    from moekernels.parallel.bound import Bound
    from moekernels.parallel.expert import ExchangePlan
    from moekernels.parallel.mesh import Group

Compute = Callable[[kernels.Counts, kernels.Slabs, int], None]
PATIENCE = 600_000_000_000  # nanoseconds, as the other exchanges wait
SENDERS = 16  # blocks that send rows (csrc/cuda/exchange.cu)


class Memory(Protocol):
    def allocate(self, nbytes: int) -> tuple[Tensor, list[int]]:
        """This rank's slab of zeros, and the addresses of all; by all ranks together."""


class _Known(NamedTuple):
    counts: kernels.Counts
    incoming: int  # the most rows that come to any rank, or its bound
    outgoing: int  # and that any sends
    rows: int  # R' here
    offsets: Tensor  # [e+1] of rows that there is room for


class _Slots:
    """The slots of one slab, out and back apart, in turn."""

    def __init__(self, slabs: kernels.Slabs) -> None:
        self.slabs, self.posted, self.open = slabs, [0, 0], [0, 0]

    def fits(self, known: _Known, experts: int, row_bytes: int) -> bool:
        shape = self.slabs.shape
        rows = known.incoming <= shape.rows and known.outgoing <= shape.back
        return rows and shape.experts == experts and row_bytes <= shape.row_bytes

    def post(self, back: bool) -> int:
        if self.open[back] == self.slabs.shape.slots:
            raise RuntimeError(
                f"{self.open[back] + 1} exchanges are posted before one is waited for; "
                f"{self.slabs.shape.slots} may be"
            )
        slot = self.posted[back] % self.slabs.shape.slots
        self.posted[back] += 1
        self.open[back] += 1
        return slot


class DeviceExchange:
    """Of one group; all of its ranks post and wait in the same order, on one stream each."""

    def __init__(self, memory: Memory, rank: int, size: int, bound: Bound | None = None) -> None:
        if size > 16:
            raise UsageError(f"--exchange shared: {size} GPUs exchange rows, at most 16 can")
        self.memory, self.rank, self.size, self.bound = memory, rank, size, bound
        self._control: dict[int, kernels.Slabs] = {}  # by e: slabs without rows, for the counts
        self._slots: _Slots | None = None
        self._beside: torch.cuda.Stream | None = None
        self._known = WeakIdKeyDictionary()  # a plan's counts -> what the kernels need of them
        self.stamps: DeviceStamps | None = None  # of exchanges from now on, where there are some

    def _make(self, shape: kernels.Shape) -> kernels.Slabs:
        slab, addresses = self.memory.allocate(kernels.bytes_of(shape))
        stuck = torch.zeros(4, dtype=torch.int64, pin_memory=slab.is_cuda)
        return kernels.Slabs(slab, addresses, self.rank, shape, PATIENCE, stuck)

    @property
    def blind(self) -> bool:
        return self.bound is not None

    def _stamped(
        self, slabs: kernels.Slabs, label: int, row_bytes: int, share: float = 1.0
    ) -> kernels.Slabs:
        """The slabs for one exchange's kernels, which stamp it."""
        if self.stamps is None:
            return slabs
        return slabs._replace(record=self.stamps.begin(label, row_bytes, share))

    def counts(self, outgoing: Tensor) -> tuple[Tensor, Tensor | None]:
        experts, bound = outgoing.shape[1], self.bound
        if experts not in self._control:
            self._control[experts] = self._make(kernels.Shape(self.size, experts, 1, 0, 0, 0))
        control = self._stamped(self._control[experts], COUNTS, 0)
        if bound is not None:
            room = bound.room()
            counts = kernels.gather_counts(outgoing.reshape(-1), control, room, bound.counter)
            self._known[counts.came] = _Known(counts, room, bound.rows, room, counts.held)
            return outgoing, counts.came
        counts = kernels.gather_counts(outgoing.reshape(-1), control)
        flat = [outgoing.reshape(-1), counts.came.reshape(-1), counts.needed]
        try:
            read = torch.cat(flat).cpu()
        except RuntimeError as error:  # a wait that has lasted traps, and this is where it is told
            raise self._lost() or error from error
        own, come, needed = read.split([outgoing.numel(), outgoing.numel(), 2])
        come = come.view_as(outgoing)
        most = (int(needed[0]), int(needed[1]))
        self._known[come] = _Known(counts, *most, int(come.sum()), counts.offsets)
        return own.view_as(outgoing), come

    def _lost(self) -> PeerLost | None:
        slabs = [*self._control.values(), *([self._slots.slabs] if self._slots else [])]
        said = next((text for s in slabs if (text := kernels.describe_wait(s))), "")
        return PeerLost(f"Timed out waiting: {said}") if said else None

    def _open(self, plan: ExchangePlan, rows: Tensor, back: bool) -> tuple[_Slots, int, _Known]:
        known, row_bytes = self._known[plan.counts], rows.shape[1] * rows.element_size()
        if self._slots is None or not self._slots.fits(known, plan.local_experts, row_bytes):
            before = self._slots.slabs.shape if self._slots else (0,) * 6
            more = [known.incoming, known.outgoing]
            if self.bound is None:
                more = [n + n // 4 for n in more]  # grows rarely
            sizes = [max(a, b) for a, b in zip((*more, row_bytes), before[3:])]
            shape = kernels.Shape(self.size, plan.local_experts, SLOTS, *sizes)
            self._slots = _Slots(self._make(shape))
        return self._slots, self._slots.post(back), known

    def post_out(
        self, x: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingOut:
        _refuse_parts(plan, part)
        return self._put(x, weights, plan, None)

    def post_beside(self, x: Tensor, weights: Tensor | None, plan: ExchangePlan) -> DeviceOut:
        """`post_out` on a stream of its own, for a product that reads rows while they come (`up`,
        `dact`): own rows are on their way then, too."""
        if x.is_cuda and self._beside is None:
            self._beside = torch.cuda.Stream(x.device, priority=-1)
        return self._put(x, weights, plan, self._beside)

    def _put(
        self,
        x: Tensor,
        weights: Tensor | None,
        plan: ExchangePlan,
        stream: torch.cuda.Stream | None,
    ) -> DeviceOut:
        slots, slot, known = self._open(plan, x, False)
        x, weights = _ready(x, weights)
        top_k = max(plan.row_of.shape[1], 1)
        share, weighted = 1.0, weights is not None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(x.device))
            share = SENDERS / torch.cuda.get_device_properties(x.device).multi_processor_count
        slabs = self._stamped(
            slots.slabs,
            4 * plan.layer + (OUT if weighted else GRAD_OUT),
            x.shape[1] * x.element_size(),
            share,
        )
        with torch.cuda.stream(stream):  # of None: where it is
            kernels.put(x, weights, plan.slot_of, top_k, known.counts, slabs, slot)
        sent = (x, weights)
        return DeviceOut(slots, slabs, slot, known, plan, x[:0], weighted, sent=sent, stream=stream)

    def post_back(
        self, rows: Tensor, weights: Tensor | None, plan: ExchangePlan, part: Part | None = None
    ) -> PendingBack:
        _refuse_parts(plan, part)
        slots, slot, known = self._open(plan, rows, True)
        rows, weights = _ready(rows, weights)
        slabs = self._homeward(slots, plan, rows, weights is not None)
        kernels.push(rows, weights, known.counts, slabs, slot)
        return _DeviceBack(slots, slabs, slot, known, plan, rows[:0], weights is not None)

    def _homeward(
        self, slots: _Slots, plan: ExchangePlan, like: Tensor, weighted: bool
    ) -> kernels.Slabs:
        label = 4 * plan.layer + (GRAD_BACK if weighted else BACK)
        return self._stamped(slots.slabs, label, like.shape[1] * like.element_size())

    def results(
        self, compute: Compute, plan: ExchangePlan, like: Tensor, weighted: bool
    ) -> PendingBack:
        """Has `compute` bring rows home in the dtype and width of `like` [*, H], as a product of
        `ops._exchange_experts` does."""
        slots, slot, known = self._open(plan, like, True)
        slabs = self._homeward(slots, plan, like, weighted)
        compute(known.counts, slabs, slot)
        count = products.units(like.shape[1])
        return _DeviceBack(slots, slabs, slot, known, plan, like[:0], weighted, count)


_made: WeakKeyDictionary[Memory, DeviceExchange] = WeakKeyDictionary()


def over(group: Group) -> DeviceExchange:
    """The one exchange through a group's memory, bounded as the group is."""
    memory = group.device_memory
    assert memory is not None
    if memory not in _made:
        _made[memory] = DeviceExchange(memory, group.rank, group.size)
    _made[memory].bound = group.bound
    return _made[memory]


def stamps_of(group: Group) -> DeviceStamps | None:
    """Those of all exchanges through a group's memory from now on; None where it has none. All of
    its ranks call it together."""
    if group.device_memory is None:
        return None
    exchange = over(group)
    if exchange.stamps is None:
        exchange.stamps = DeviceStamps(exchange.memory, group.rank, group.size, PATIENCE)
    return exchange.stamps


def _refuse_parts(plan: ExchangePlan, part: Part | None) -> None:
    if part is not None and part != plan.whole:
        raise ValueError(f"{part} of {plan.whole}: GPUs exchange the rows of all experts at once")


def _ready(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weights is not None:
        weights = weights.to(wide(rows.dtype)).contiguous()
    return rows.contiguous(), weights


class _Pending(NamedTuple):
    slots: _Slots
    slabs: kernels.Slabs  # of this exchange
    slot: int
    known: _Known
    plan: ExchangePlan
    like: Tensor  # [0, H]
    weighted: bool
    units: int = 1  # that a row counts
    sent: tuple[Tensor | None, ...] = ()  # what a kernel on another stream may still read
    stream: torch.cuda.Stream | None = None  # that one


class DeviceOut(_Pending):
    """Rows on their way out: `wait` for them, or have a product read them as they come."""

    def wait(self) -> Arrived:
        self.slots.open[False] -= 1
        rows, weights = kernels.take(
            self.like,
            self.known.counts,
            self.slabs,
            self.slot,
            self.known.rows,
            weighted=self.weighted,
        )
        return Arrived(rows, weights, self.known.offsets)

    def up(self, ffn: Ffn, keep_h: bool) -> tuple[Ffn, Tensor, Tensor]:
        """The first product over what comes, in place of `wait`: `ffn` with the rows that came,
        their weights and offsets; h [R', G] (empty unless `keep_h`) and a [R', F]."""
        self.slots.open[False] -= 1
        known, ffn = self.known, ffn._replace(x=self.like, offsets=self.known.offsets)
        rows, weights, h, a = products.up(
            ffn, known.counts, self.slabs, self.slot, known.rows, keep_h
        )
        self._join()
        return ffn._replace(x=rows, weights=weights), h, a

    def dact(
        self, ffn: Ffn, h: Tensor, want_weighted_a: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of the backward: dy [R', H] that came, dh, the weighted a, dweights [R']."""
        self.slots.open[False] -= 1
        counts, slabs = self.known.counts, self.slabs
        found = products.dact(ffn, h, counts, slabs, self.slot, want_weighted_a, True)
        self._join()
        return found

    def _join(self) -> None:
        """What the current stream does from now on is behind the sending."""
        if self.stream is not None:
            torch.cuda.current_stream(self.like.device).wait_stream(self.stream)


class _DeviceBack(_Pending):
    def wait(self, into: Home | None = None) -> Home:
        self.slots.open[True] -= 1
        home = Home(
            *kernels.take_home(
                self.like,
                self.known.counts,
                self.slabs,
                self.slot,
                self.plan.slot_of.shape[0],
                weighted=self.weighted,
                units=self.units,
            )
        )
        if into is None:
            return home
        into.rows.copy_(home.rows)
        if into.weights is not None and home.weights is not None:
            into.weights.copy_(home.weights)
        return into
