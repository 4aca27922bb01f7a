"""Pipeline schedules as pure data: for every rank, the list of actions that it performs, in order.

A schedule knows no tensor and no process. `build` makes it, `runtime` executes it, `simulate` times
it, `check` proves it legal.

A rank holds `virtual_stages` chunks of the model; chunk c on rank r is virtual stage c * stages +
r. An action names its chunk and microbatch:

    F, B             forward and backward of a chunk
    I, W             a backward in two: the gradient of the input, which leaves, and those of the
                     weights, which nothing waits for
    SEND_F, RECV_F   the activations that leave chunk c, or that it needs
    SEND_B, RECV_B   the gradient of its input, which leaves it, or of its output, which it needs

Communication is asynchronous. A receive is posted one computation ahead of the one that needs it,
and a send right behind the one that made it, so that both travel while the rank computes.
The two directions are independent channels; `batches` groups what stands side by side for a
backend that posts several communications at once, and `check` says what their order guarantees.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Kind(enum.StrEnum):
    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def computes(self) -> bool:
        return self in (Kind.F, Kind.B, Kind.I, Kind.W)

    @property
    def frees(self) -> bool:
        """Whether it lets go of what the forward pass has kept."""
        return self is Kind.B or self is Kind.I

    @property
    def sends(self) -> bool:
        return self is Kind.SEND_F or self is Kind.SEND_B

    @property
    def forward(self) -> bool:
        return self is Kind.F or self is Kind.SEND_F or self is Kind.RECV_F


# Of a forward pass, where nothing better is known.
RELATIVE_COST = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}


class Action(NamedTuple):
    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, microbatch {self.microbatch}"


class Pair(NamedTuple):
    """Two passes that run together, piece by piece."""

    forward: Action
    backward: Action


class Message(NamedTuple):
    """One transfer: what crosses the border behind virtual stage `border`, and which way."""

    forward: bool
    border: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """`actions[rank]`, in order.

    `paired[rank]` names each F that runs together with the B right behind it, piece by piece, as
    `interleave` orders them.

    `in_flight_limit[rank]` bounds the (chunk, microbatch) pairs between their F and B, or I (their
    activations are kept), `owed_limit[rank]` those between their I and W (what the weights'
    gradients are made of is kept), `both_limit[rank]` these and those together, `receive_limit` the
    receive buffers of a rank, both directions together.
    """

    name: str
    stages: int
    microbatches: int
    virtual_stages: int
    actions: tuple[tuple[Action, ...], ...]
    in_flight_limit: tuple[int, ...]
    owed_limit: tuple[int, ...]
    both_limit: tuple[int, ...]
    receive_limit: int
    paired: tuple[frozenset[Action], ...] = ()

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
        """What a computation waits for; None: the first virtual stage's F, the last's B, a W."""
        if action.kind is Kind.W:
            return None
        stage = self.virtual_stage(rank, action.chunk)
        border = stage - 1 if action.kind.forward else stage
        inside = 0 <= border < self.depth - 1
        return Message(action.kind.forward, border, action.microbatch) if inside else None

    def makes(self, rank: int, action: Action) -> Message | None:
        """What a computation sends on; None: the last virtual stage's F, the first's B, a W."""
        if action.kind is Kind.W:
            return None
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

    def pairs(self, rank: int) -> Iterator[Pair]:
        """Those of `paired`, whole."""
        if self.paired:
            for action, behind in pairwise(self.actions[rank]):
                if action in self.paired[rank]:
                    yield Pair(action, behind)


def batches(
    actions: Iterable[Action], paired: Collection[Action] = ()
) -> Iterator[Action | Pair | list[Action]]:
    """The computations, those `paired` and what stands behind them as one, and, between them, the
    batches of communications.

    A batch belongs to one direction and holds one send, one receive, or one of each. Communications
    that stand side by side make as few batches as that allows, in the order of their receives: a
    second receive in one batch would make the first wait for it.
    """
    open_batches: dict[bool, list[list[Action]]] = {True: [], False: []}

    def flush() -> Iterator[list[Action]]:
        for waiting in open_batches.values():
            yield from waiting
            waiting.clear()

    first = None
    for action in actions:
        if action.kind.computes:
            yield from flush()
            if action in paired:
                first = action
                continue
            yield action if first is None else Pair(first, action)
            first = None
            continue
        waiting = open_batches[action.kind.forward]
        if waiting and all(other.kind.sends != action.kind.sends for other in waiting[-1]):
            waiting[-1].append(action)
        else:
            waiting.append([action])
    yield from flush()
