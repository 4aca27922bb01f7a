"""Pipeline schedules as pure data: for every rank, the list of actions that it performs, in order.

A schedule knows no tensor and no process. `runtime` executes it, `simulate` times it, `check`
proves it legal.

A rank holds `virtual_stages` chunks of the model; chunk c on rank r is virtual stage c * stages +
r. An action names its chunk and microbatch:

    F, B             forward and backward of a chunk
    SEND_F, RECV_F   the activations that leave chunk c, or that it needs
    SEND_B, RECV_B   the gradient of its input, which leaves it, or of its output, which it needs

Communication is asynchronous. A receive is posted one computation ahead of the one that needs it,
and a send right behind the one that made it, so that both travel while the rank computes.
The two directions are independent channels; `batches` groups what stands side by side for a
backend that posts several communications at once, and `check` says what their order guarantees.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from moekernels.errors import UsageError


class Kind(enum.StrEnum):
    F = "F"
    B = "B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def computes(self) -> bool:
        return self is Kind.F or self is Kind.B

    @property
    def sends(self) -> bool:
        return self is Kind.SEND_F or self is Kind.SEND_B

    @property
    def forward(self) -> bool:
        return self is Kind.F or self is Kind.SEND_F or self is Kind.RECV_F


class Action(NamedTuple):
    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, microbatch {self.microbatch}"


class Message(NamedTuple):
    """One transfer: what crosses the border behind virtual stage `border`, and which way."""

    forward: bool
    border: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """`actions[rank]`, in order.

    `in_flight_limit[rank]` bounds the (chunk, microbatch) pairs between their F and B (their
    activations are kept), `receive_limit` the receive buffers of a rank, both directions together.
    """

    name: str
    stages: int
    microbatches: int
    virtual_stages: int
    actions: tuple[tuple[Action, ...], ...]
    in_flight_limit: tuple[int, ...]
    receive_limit: int

    @property
    def has_backward(self) -> bool:
        return self.name != "forward"

    @property
    def depth(self) -> int:
        """Virtual stages from the input to the loss."""
        return self.stages * self.virtual_stages

    def virtual_stage(self, rank: int, chunk: int) -> int:
        return chunk * self.stages + rank

    def needs(self, rank: int, action: Action) -> Message | None:
        """What a computation waits for; None for the first virtual stage's F, the last's B."""
        stage = self.virtual_stage(rank, action.chunk)
        border = stage - 1 if action.kind.forward else stage
        inside = 0 <= border < self.depth - 1
        return Message(action.kind.forward, border, action.microbatch) if inside else None

    def makes(self, rank: int, action: Action) -> Message | None:
        """What a computation sends on; None for the last virtual stage's F, the first's B."""
        stage = self.virtual_stage(rank, action.chunk)
        border = stage if action.kind.forward else stage - 1
        inside = 0 <= border < self.depth - 1
        return Message(action.kind.forward, border, action.microbatch) if inside else None

    def message(self, rank: int, action: Action) -> Message:
        """What a communication carries."""
        kind = Kind.F if action.kind.forward else Kind.B
        computation = Action(kind, action.chunk, action.microbatch)
        end = self.makes if action.kind.sends else self.needs
        found = end(rank, computation)
        if found is None:
            raise ValueError(f"stage {rank}: {action} crosses no border between stages")
        return found

    def peer(self, rank: int, action: Action) -> int:
        """The rank at the other end of a communication."""
        message = self.message(rank, action)
        near = self.virtual_stage(rank, action.chunk)
        far = message.border + 1 if near == message.border else message.border
        return far % self.stages

    def tag(self, message: Message) -> int:
        """A number that no other message of the step has."""
        return 2 * (message.border * self.microbatches + message.microbatch) + (not message.forward)

    def computations(self, rank: int) -> Iterator[Action]:
        return (action for action in self.actions[rank] if action.kind.computes)


@dataclass(frozen=True)
class ScheduleKind:
    """What a schedule's name stands for. warmup(rank, stages, groups, virtual_stages): forward
    passes that a rank does before it alternates. several: whether a rank holds several virtual
    stages, or one. offered: worth running; the planner searches it and `verify --all` proves it."""

    warmup: Callable[[int, int, list[int], int], int]
    several: bool = False
    offered: bool = True


SCHEDULES = {
    "gpipe": ScheduleKind(lambda rank, stages, groups, virtual: sum(groups), offered=False),
    "1f1b": ScheduleKind(lambda rank, stages, groups, virtual: stages - 1 - rank),
    "interleaved": ScheduleKind(
        lambda rank, stages, groups, virtual: 2 * (stages - 1 - rank) + (virtual - 1) * max(groups),
        several=True,
    ),
}


def offered(several: bool) -> list[str]:
    """Names of the schedules worth running, with several virtual stages per rank or with one."""
    return [n for n, kind in SCHEDULES.items() if kind.offered and kind.several == several]


@lru_cache(maxsize=512)  # a planner asks for the same again and again
def in_flight_limits(
    name: str, stages: int, microbatches: int, virtual_stages: int
) -> tuple[int, ...]:
    """Per rank, the (chunk, microbatch) pairs whose activations are kept at most."""
    total, groups = microbatches * virtual_stages, _groups(stages, microbatches)
    if name == "forward":
        return (total,) * stages
    warmup = SCHEDULES[name].warmup
    return tuple(
        min(warmup(rank, stages, groups, virtual_stages) + 1, total) for rank in range(stages)
    )


def check_virtual_stages(name: str, virtual_stages: int) -> None:
    """UsageError where a schedule cannot have so many virtual stages per rank."""
    if name not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}: one of {', '.join(SCHEDULES)}")
    several = SCHEDULES[name].several
    others = [n for n, kind in SCHEDULES.items() if kind.several != several and kind.offered]
    if several and virtual_stages < 2:
        raise UsageError(
            f"schedule {name} needs at least 2 virtual stages per rank, got {virtual_stages}: "
            f"use schedule {' or '.join(others)}, or 2 virtual stages"
        )
    if not several and virtual_stages > 1:
        raise UsageError(
            f"schedule {name} has one virtual stage a rank, got {virtual_stages}: "
            f"use schedule {' or '.join(others)}, or 1 virtual stage"
        )


def build(name: str, stages: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """A schedule by name: one of `SCHEDULES`, or `forward` for evaluation.

    Any number of microbatches will do, also fewer than stages and, for `interleaved`, no multiple
    of them.
    """
    for what, value in (
        ("pipeline stages", stages),
        ("microbatches", microbatches),
        ("virtual stages", virtual_stages),
    ):
        if value < 1:
            raise UsageError(f"{what} must be at least 1, got {value}")
    if name != "forward":
        check_virtual_stages(name, virtual_stages)

    total = microbatches * virtual_stages
    groups = _groups(stages, microbatches)
    forward = _forward_order(groups, virtual_stages)
    orders = []
    for rank in range(stages):
        if name == "forward":
            orders.append([Action(Kind.F, c, m) for c, m in forward])
            continue
        ahead = min(SCHEDULES[name].warmup(rank, stages, groups, virtual_stages), total)
        backward = [(virtual_stages - 1 - c, m) for c, m in forward]
        orders.append(_one_forward_one_backward(forward, backward, ahead))
    # One buffer in use and one ahead. With virtual stages, what comes round to the first rank for
    # its next chunk may come before that starts: at most a group, however many microbatches.
    receive_limit = 2 if virtual_stages == 1 else 2 + max(groups)
    limits = in_flight_limits(name, stages, microbatches, virtual_stages)
    bare = Schedule(name, stages, microbatches, virtual_stages, (), limits, receive_limit)
    made = _production_order(bare, orders)
    actions = tuple(
        _with_communication(bare, rank, order, made) for rank, order in enumerate(orders)
    )
    return dataclasses.replace(bare, actions=actions)


def batches(actions: Iterable[Action]) -> Iterator[Action | list[Action]]:
    """The computations and, between them, the batches of communications.

    A batch belongs to one direction and holds one send, one receive, or one of each. Communications
    that stand side by side make as few batches as that allows, in the order of their receives: a
    second receive in one batch would make the first wait for it.
    """
    open_batches: dict[bool, list[list[Action]]] = {True: [], False: []}

    def flush() -> Iterator[list[Action]]:
        for waiting in open_batches.values():
            yield from waiting
            waiting.clear()

    for action in actions:
        if action.kind.computes:
            yield from flush()
            yield action
            continue
        waiting = open_batches[action.kind.forward]
        if waiting and all(other.kind.sends != action.kind.sends for other in waiting[-1]):
            waiting[-1].append(action)
        else:
            waiting.append([action])
    yield from flush()


def _groups(stages: int, microbatches: int) -> list[int]:
    """Microbatches that go through a chunk together: as even as possible, and at least `stages`.

    A last group shorter than the pipeline, which a plain division would leave, stalls it, and from
    three virtual stages on it deadlocks. Even groups reach the bubble of (stages - 1) /
    virtual_stages microbatches with any number.
    """
    groups = max(1, microbatches // stages)
    return [microbatches // groups + (i < microbatches % groups) for i in range(groups)]


def _forward_order(groups: list[int], virtual_stages: int) -> list[tuple[int, int]]:
    """(chunk, microbatch) of the forward passes, in the order that all ranks share."""
    order, first = [], 0
    for size in groups:
        for chunk in range(virtual_stages):
            order += [(chunk, microbatch) for microbatch in range(first, first + size)]
        first += size
    return order


def _one_forward_one_backward(
    forward: list[tuple[int, int]], backward: list[tuple[int, int]], ahead: int
) -> list[Action]:
    """`ahead` forward passes, then forward and backward in turn, then the backward ones left."""
    order = [Action(Kind.F, c, m) for c, m in forward[:ahead]]
    for i, (chunk, microbatch) in enumerate(backward):
        if ahead + i < len(forward):
            order.append(Action(Kind.F, *forward[ahead + i]))
        order.append(Action(Kind.B, chunk, microbatch))
    return order


def _production_order(
    schedule: Schedule, orders: list[list[Action]]
) -> dict[Message, tuple[int, int]]:
    """For each message when it is made, if F takes 1, B takes 2 and messages travel in no time.

    The second number orders those of one moment: what a rank receives before what it sends.
    """
    made: dict[Message, tuple[int, int]] = {}
    clock = [0] * schedule.stages
    position = [0] * schedule.stages
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                action = order[position[rank]]
                need = schedule.needs(rank, action)
                if need and need not in made:
                    break
                start = max(clock[rank], made[need][0] if need else 0)
                clock[rank] = start + (1 if action.kind.forward else 2)
                message = schedule.makes(rank, action)
                if message:
                    made[message] = clock[rank], message.border * (1 if message.forward else -1)
                position[rank] += 1
                moved = True
    return made


def _with_communication(
    schedule: Schedule, rank: int, order: list[Action], made: dict[Message, tuple[int, int]]
) -> tuple[Action, ...]:
    """Sends go right behind the computation, receives one computation ahead of need.

    A receive must not block its channel, though, which runs its batches one after the other. So
    every channel follows the order in which the messages are made: a receive moves behind the sends
    of earlier messages, on which its own may depend, and in front of those of later ones. At the
    same place they are one batch, which is as good.
    """
    if schedule.stages == 1:  # what a chunk needs is there already
        return tuple(order)
    # [i]: what stands in front of computation i
    sends: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    receives: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    places: dict[bool, list[int]] = {True: [], False: []}
    times: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for i, action in enumerate(order):
        output = schedule.makes(rank, action)
        if output:
            forward = action.kind.forward
            kind = Kind.SEND_F if forward else Kind.SEND_B
            sends[i + 1].append(action._replace(kind=kind))
            places[forward].append(i + 1)
            times[forward].append(made[output])
    for i, action in enumerate(order):
        need = schedule.needs(rank, action)
        if need:
            forward = action.kind.forward
            kind = Kind.RECV_F if forward else Kind.RECV_B
            later = bisect.bisect_right(times[forward], made[need])
            place = max(0, i - 1)
            if later < len(places[forward]):
                place = min(place, places[forward][later])
            if later > 0:
                place = max(place, places[forward][later - 1])
            receives[place].append(action._replace(kind=kind))
    actions: list[Action] = []
    for i in range(len(order) + 1):
        actions += sends[i] + receives[i] + order[i : i + 1]
    return tuple(actions)
