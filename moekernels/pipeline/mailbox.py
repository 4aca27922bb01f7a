"""Messages of a pipeline through memory that ranks share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .schedule import Action, Message, Schedule


class PipelineMemory(Protocol):
    """Messages that a lane delivers in the order in which they were sent."""

    def send(self, x: Tensor, peer: int, lane: int, tag: int) -> None: ...

    def expect(self, peer: int, lane: int) -> int: ...

    def receive(self, out: Tensor, peer: int, lane: int, number: int, tag: int) -> None: ...


class Receive:
    """A message that the memory will hold; `wait` copies it out."""

    __slots__ = ("_memory", "_message")

    def __init__(self, memory: PipelineMemory, out: Tensor, peer: int, lane: int, tag: int):
        self._memory = memory
        self._message = out, peer, lane, memory.expect(peer, lane), tag

    def wait(self) -> None:
        self._memory.receive(*self._message)


class End(NamedTuple):
    """A rank's end of a message."""

    message: Message
    sends: bool
    peer: int
    lane: int  # one each way, as neither waits for the other
    tag: int


class Ends:
    """Those of a rank, the same in every step of a schedule."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._schedule: Schedule | None = None
        self._found: dict[Action, End] = {}  # of that schedule

    def of(self, schedule: Schedule, action: Action) -> End:
        if self._schedule is not schedule:
            self._schedule, self._found = schedule, {}
        end = self._found.get(action)
        if end is None:
            message = schedule.message(self.rank, action)
            end = End(
                message,
                action.kind.sends,
                schedule.peer(self.rank, action),
                0 if message.forward else 1,
                schedule.tag(message),
            )
            self._found[action] = end
        return end
