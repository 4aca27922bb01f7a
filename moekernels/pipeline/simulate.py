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

from .check import peak_in_flight
from .schedule import Action, Kind, Message, Schedule
from .trace import Event

Costs = Callable[[int, int, Kind], float]
"""(virtual stage, microbatch, Kind.F or Kind.B) -> seconds."""


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
        self._compile()

    def _compile(self) -> None:
        """Put the computations of all ranks into an order in which each stands behind everything it
        waits for.

        Row i holds the positions of: the computation before it on its rank, the one that makes what
        it needs, and the one in front of which its receive is posted. Position n, one past the end,
        stands for time 0.
        """
        schedule = self.schedule
        nobody = 2 * schedule.depth * schedule.microbatches
        if not schedule.has_backward:
            nobody //= 2
        made: dict[Message, int] = {}
        last = [nobody] * schedule.stages
        position = [0] * schedule.stages
        posted: dict[tuple[int, Message], int] = {}
        self._order: list[tuple[int, Action]] = []
        self._rows: list[tuple[int, int, int]] = []
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(schedule.actions):
                while position[rank] < len(actions):
                    action = actions[position[rank]]
                    if action.kind.computes:
                        need = schedule.needs(rank, action)
                        given = asked = nobody
                        if need:
                            if need not in made:
                                break
                            given, asked = made[need], posted.get((rank, need), nobody)
                        row = (last[rank], given, asked)
                        last[rank] = len(self._rows)
                        output = schedule.makes(rank, action)
                        if output:
                            made[output] = last[rank]
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
        # index into forward + backward, the concatenated costs per microbatch
        self._cost_index = [
            action.microbatch + (0 if action.kind.forward else schedule.microbatches)
            for _, action in self._order
        ]

    def makespan(self, forward: Sequence[float], backward: Sequence[float] = ()) -> float:
        """Seconds of the step where microbatch i takes `forward[i]` and `backward[i]` on every
        virtual stage.
        """
        costs = [*forward, *backward]
        ends = self._ends([costs[i] for i in self._cost_index])
        return max(ends[i] for i in self._last)

    def run(self, costs: Costs) -> Timeline:
        """The whole timeline under any costs."""
        schedule = self.schedule
        durations = [
            costs(schedule.virtual_stage(rank, action.chunk), action.microbatch, action.kind)
            for rank, action in self._order
        ]
        ends = self._ends(durations)
        events = [
            Event(rank, *action, ends[i] - durations[i], ends[i])
            for i, (rank, action) in enumerate(self._order)
        ]
        makespan = max(ends)
        busy = [0.0] * schedule.stages
        for (rank, _), duration in zip(self._order, durations):
            busy[rank] += duration
        bubble = [1.0 - b / makespan if makespan > 0 else 0.0 for b in busy]
        return Timeline(events, makespan, busy, bubble, peak_in_flight(schedule))

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


def makespan(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float] = (),
    latency: float = 0.0,
) -> float:
    """One makespan; for many of the same schedule keep a `Simulator`."""
    return Simulator(schedule, latency).makespan(forward, backward)
