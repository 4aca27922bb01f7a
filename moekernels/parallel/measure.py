"""What exchanges take, from stamps of when they were posted, here and needed.

Of an exchange that peers make through shared memory every rank knows, on the clock of the machine,
when it gave its own rows away (`post`), when the last peer had (`last`), when all were here
(`ready`), when somebody asked (`need`) and went on (`got`), and for how long its core moved rows.
Of a collective it knows how long it was waited for, and no more.

Rows fly from the last post until they are here. Exchanges that fly at once share a link: what
counts is the time in which any did, never the sum, and time in which a late peer was waited for is
none of theirs. Hidden is what of that time was spent otherwise than waiting: (a - b) / (a - c) of
the same steps waited for at once (a), as they are (b), and with rows that need not fly (c). That a
rank wakes up late, as where another has its core, is exposed, but no flight: (c) has it, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from moekernels import _host
from moekernels.parallel.clock import SpanClock

if TYPE_CHECKING:
    from moekernels.parallel.device_stamps import DeviceStamps
    from moekernels.parallel.mesh import Group

# What a stamp's label says beside the layer: which of an exchange's four ways it is. Exchanges of
# whole tensors know no layer. As in `csrc/host/peers.h`.
WHOLE = -1
OUT, BACK, GRAD_OUT, GRAD_BACK = range(4)
NAMES = ("dispatch", "combine", "combine's gradient", "dispatch's gradient")
COUNTS = -2  # the label of what everybody sends everybody, before rows
_OTHERS = {WHOLE: "tokens", COUNTS: "counts"}
WORTH_HIDING = 0.01  # of the step: where exchanges take less of it there is nothing to hide


class Stamps(NamedTuple):
    """Nanoseconds of `_host.now`, but for `moving`, which is a duration, `size` in bytes and
    `label`, 4 x the layer + which of `NAMES`, `WHOLE` or COUNTS."""

    post: int
    last: int
    ready: int
    need: int
    got: int
    moving: int
    size: int
    label: int

    @property
    def start(self) -> int:
        """When the rows of all were under way."""
        return max(self.post, self.last)

    @property
    def waited(self) -> int:
        return self.got - self.need

    @property
    def late(self) -> int:
        """What of that was for a peer that had not posted."""
        return max(0, min(self.got, self.last) - self.need)


class Times(NamedTuple):
    """Seconds of one rank; where nobody stamped `exposed` is all that is known.

    moving: this core put and took rows. skew: peers were waited for that had not posted yet, which
    is load, not communication. exposed: what was waited for beside that, and moving. flight: some
    exchange was under way, beside the skew. hidden: the part of it in which nobody waited.
    """

    moving: float = 0.0
    skew: float = 0.0
    exposed: float = 0.0
    flight: float = 0.0
    hidden: float = 0.0


class Flight(NamedTuple):
    """An exchange as a trace draws it: from the last post until all rows were here."""

    name: str
    start: float  # seconds
    end: float
    size: int  # bytes
    waited: float  # seconds
    late: float  # seconds of these for a peer that had not posted
    posted: float  # when this rank's own rows were

    @property
    def waits(self) -> dict[str, float]:
        return {"waited": self.waited, "late": self.late}


def flights_of(stamps: Iterable[Stamps], origin: float) -> list[Flight]:
    """In seconds since `origin`, a moment of time.perf_counter()."""
    zero, flights = origin_of(origin), []
    for s in stamps:
        name = _OTHERS.get(s.label) or f"{NAMES[s.label % 4]} {s.label // 4}"
        start, end, posted = ((t - zero) / 1e9 for t in (s.start, s.ready, s.post))
        flights.append(Flight(name, start, end, s.size, s.waited / 1e9, s.late / 1e9, posted))
    return flights


def times_of(stamps: Iterable[Stamps]) -> Times:
    stamps = list(stamps)
    moving, skew = sum(s.moving for s in stamps), sum(s.late for s in stamps)
    flights = [(s.start, s.ready) for s in stamps]
    waits = [(s.need, s.got) for s in stamps]
    lates = [(s.need, s.need + s.late) for s in stamps]
    times = (
        moving,
        skew,
        sum(s.waited for s in stamps) - skew + moving,
        _covered(flights + lates) - _covered(lates),
        _covered(flights + waits) - _covered(waits),
    )
    return Times(*(t / 1e9 for t in times))


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of their union."""
    total, end = 0, 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def hidden_of(hidden: float, flight: float, step: float) -> float | None:
    """The share of the flight that was not waited for; None where there is nothing to hide."""
    if not flight >= WORTH_HIDING * step:  # NaN: nobody knows
        return None
    return hidden / flight


waited = SpanClock()  # of this process: what its layers wait for rows and their numbers


class Border:
    """Bytes of exchanges that this process has sent to ranks of other nodes."""

    def __init__(self) -> None:
        self.sent = 0

    def take(self) -> int:
        """Since the last `take`."""
        sent, self.sent = self.sent, 0
        return sent


border = Border()


class Measure:
    """The exchanges of one rank since the last `take`: of `group`, and of those of its ranks that
    are `inside` a node where rows travel in two levels. `device` has the stamps of those that
    kernels make."""

    def __init__(
        self, group: Group, inside: Group | None = None, device: DeviceStamps | None = None
    ) -> None:
        self.group, self.memory, self.device = group, (inside or group).memory, device
        self.stamps: list[Stamps] = []  # of the last `take`
        self.sent = 0  # bytes to other nodes, before the last `take`
        waited.running = group.size > 1

    def read(self) -> None:
        """Behind a step's work: sends for what a device knows of it, and does not wait."""
        if self.device is not None:
            self.device.read()

    def take(self) -> Times:
        """Behind `read`."""
        if self.group.size == 1:
            return Times()
        self.stamps, self.sent = [], border.take()
        if self.memory is not None:
            self.stamps = [Stamps(*s) for s in self.memory.host.take_stamps()]
        if self.device is not None:
            self.stamps = self.device.take()
        times = times_of(self.stamps)
        if (
            self.group.memory is None and self.device is None
        ):  # collectives tell how long they were waited for
            nan, exposed = float("nan"), times.exposed + times.skew
            times = Times(times.moving, nan, exposed + waited.take()[0], nan, nan)
        return times


def origin_of(perf_counter: float) -> int:
    """A moment of time.perf_counter() on the clock of stamps."""
    return _host.now() + int((perf_counter - time.perf_counter()) * 1e9)
