"""A schedule under a clock: when every action runs, how long the step takes, who waits.

    simulator = Simulator(build("1f1b", 4, 32))
    simulator.makespan(forward, backward)               # seconds a microbatch, alike on all stages
    simulator.run(lambda stage, microbatch, kind: ...)  # any cost; the whole timeline

A `Simulator` compiles its schedule once; a makespan of 4 stages and 32 microbatches then takes
about 30 us, so that a search over microbatch orders can afford hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .build import build
from .check import peak_in_flight
from .interleave import interleave, passes
from .schedule import RELATIVE_COST, Action, Kind, Message, Pair, Schedule
from .trace import Event

Costs = Callable[[int, int, Kind], float]
"""(virtual stage, microbatch, Kind.F, B, I or W) -> seconds."""
PairCosts = Callable[[int, int, int], float]
"""(virtual stage, microbatch of the forward, of the backward) -> seconds of a pair."""
Pieces = tuple[Sequence[float], Sequence[float]]
"""Of a forward and of a backward: the seconds, or shares, of its pieces."""
ONE: Pieces = ([1.0] * 3, [1.0] * 4)  # of one layer that exchanges rows, all alike


@dataclass(frozen=True)
class Timeline:
    """`busy` seconds and `bubble`, the idle part of the makespan (0 to 1), are per rank."""

    events: list[Event]
    makespan: float
    busy: list[float]
    bubble: list[float]
    peak_in_flight: list[int]


class Simulator:
    """A compiled schedule; a message arrives `latency` seconds after both ends are ready."""

    def __init__(self, schedule: Schedule, latency: float = 0.0):
        self.schedule = schedule
        self.latency = latency if schedule.stages > 1 else 0.0
        self._peak = peak_in_flight(schedule)
        self._compile()

    def _compile(self) -> None:
        """Put the computations of all ranks into an order in which each stands behind everything it
        waits for.

        Row i holds the positions of: the computation before it on its rank, the one that makes what
        it needs, and the one in front of which its receive is posted. Position n, one past the end,
        stands for time 0.
        """
        schedule = self.schedule
        nobody = sum(a.kind.computes for actions in schedule.actions for a in actions)
        made: dict[Message, int] = {}
        last = [nobody] * schedule.stages
        position = [0] * schedule.stages
        posted: dict[tuple[int, Message], int] = {}
        self._paired = paired = schedule.paired or (frozenset(),) * schedule.stages
        self._pairs: list[tuple[int, int]] = []  # rows of a forward and its backward
        self._order: list[tuple[int, Action]] = []
        self._rows: list[tuple[int, int, int]] = []
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(schedule.actions):
                while position[rank] < len(actions):
                    action = actions[position[rank]]
                    if action.kind.computes:
                        before = self._order[last[rank]][1] if last[rank] < nobody else None
                        need = schedule.needs(rank, action)
                        given = asked = nobody
                        if need:
                            if need not in made:
                                break
                            given, asked = made[need], posted.get((rank, need), nobody)
                        row = (last[rank], given, asked)
                        last[rank] = len(self._rows)
                        outputs = [schedule.makes(rank, action)]
                        if action in paired[rank]:
                            outputs = []  # when the pair is over
                        elif before in paired[rank]:
                            self._pairs.append((row[0], last[rank]))
                            outputs.append(schedule.makes(rank, before))
                        made |= dict.fromkeys(filter(None, outputs), last[rank])
                        self._rows.append(row)
                        self._order.append((rank, action))
                    elif not action.kind.sends:
                        posted[rank, schedule.message(rank, action)] = last[rank]
                    position[rank] += 1
                    moved = True
        if len(self._rows) != nobody:
            raise ValueError(
                f"schedule {schedule.name} ends after {len(self._rows)} of {nobody} computations: "
                "check(schedule) says why"
            )
        self._last = last
        self._where = [
            (schedule.virtual_stage(rank, a.chunk), a.microbatch, a.kind) for rank, a in self._order
        ]
        # index into the concatenated costs per microbatch of F, B, and of I and W, half a B each
        m = schedule.microbatches
        place = {Kind.F: 0, Kind.B: m, Kind.I: 2 * m, Kind.W: 2 * m}
        self._cost_index = [action.microbatch + place[action.kind] for _, action in self._order]

    def makespan(self, forward: Sequence[float], backward: Sequence[float] = ()) -> float:
        """Seconds of the step where microbatch i takes `forward[i]` and `backward[i]` on every
        virtual stage; I and W half of the latter each.
        """
        costs = [*forward, *backward, *[x / 2 for x in backward]]
        durations = [costs[i] for i in self._cost_index]
        for i, j in self._pairs:  # both begin when what both need is here, and end together
            durations[i], durations[j] = 0.0, durations[i] + durations[j]
        ends = self._ends(durations)
        return max(ends[i] for i in self._last)

    def run(
        self, costs: Costs, pair: PairCosts | None = None, pieces: Sequence[Pieces] = ()
    ) -> Timeline:
        """The whole timeline under any costs. `pair`: of two passes that run piece by piece,
        otherwise what both take alone. `pieces`: by rank, how long those of a forward and of a
        backward take beside one another, in order, as `passes` has them; otherwise each is one."""
        schedule = self.schedule
        durations = [costs(*where) for where in self._where]
        halves = {}
        for i, j in self._pairs:
            (stage, forward, _), (_, backward, _) = self._where[i], self._where[j]
            both = durations[i] + durations[j]
            took = both if pair is None else pair(stage, forward, backward)
            halves[j] = i, took * durations[i] / both if both else 0.0
            durations[i], durations[j] = 0.0, took
        ends = self._ends(durations)
        events = []
        for i, (rank, action) in enumerate(self._order):
            if i in halves:
                other, took = halves[i]
                pair_of = Pair(self._order[other][1], action)
                start, both = ends[i] - durations[i], durations[i]
                events += _turns(rank, pair_of, start, took, both, pieces[rank] if pieces else ONE)
            elif action not in self._paired[rank]:
                events.append(Event(rank, *action, ends[i] - durations[i], ends[i]))
        makespan = max(ends)
        busy = [0.0] * schedule.stages
        for (rank, _), duration in zip(self._order, durations):
            busy[rank] += duration
        bubble = [1.0 - b / makespan if makespan > 0 else 0.0 for b in busy]
        return Timeline(events, makespan, busy, bubble, list(self._peak))

    def _ends(self, durations: list[float]) -> list[float]:
        ends = [0.0] * (len(durations) + 1)
        latency = self.latency
        i = 0
        for (before, maker, post), duration in zip(self._rows, durations):
            start = ends[before]
            arrival = ends[maker]
            if ends[post] > arrival:
                arrival = ends[post]
            if arrival > 0.0:
                arrival += latency
            ends[i] = (arrival if arrival > start else start) + duration
            i += 1
        return ends


def _turns(
    rank: int, pair: Pair, start: float, forward: float, both: float, pieces: Pieces
) -> list[Event]:
    """A pair's pieces from `start` on: `both` seconds, of which `forward` are the forward's."""
    ahead, back = pieces
    sides = iter(ahead), iter(back)
    shares = forward / sum(ahead), (both - forward) / sum(back)
    events = []
    for piece in interleave(*passes(range(len(ahead) // 2))):
        action, side = (pair.forward, 0) if piece.forward else (pair.backward, 1)
        takes = next(sides[side]) * shares[side]
        events.append(Event(rank, *action, start, start + takes))
        start += takes
    return events


def idle_microbatches(name: str, stages: int, virtual_stages: int) -> float:
    """By how many microbatches a flush of many is longer than its own, all of them alike."""
    count = 4 * stages
    alone = Simulator(build(name, stages, count, virtual_stages))
    one = virtual_stages * (RELATIVE_COST[Kind.F] + RELATIVE_COST[Kind.B])
    forward, backward = (RELATIVE_COST[kind] * 1.0 for kind in (Kind.F, Kind.B))
    return alone.makespan([forward] * count, [backward] * count) / one - count


def makespan(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float] = (),
    latency: float = 0.0,
) -> float:
    """One makespan; for many of the same schedule keep a `Simulator`."""
    return Simulator(schedule, latency).makespan(forward, backward)
