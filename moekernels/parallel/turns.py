"""Two passes of one rank that take turns: while rows of one travel, the other computes.

Autograd runs a backward in one call, so it has a thread of its own and stops where it would wait
for rows, at a `border`; a forward stops likewise. Only one of the two runs at any time: nothing
that they share needs a lock, and each computes what it computes alone, to the bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor


class Border(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def forward(self) -> bool: ...


class Piece(Protocol):
    """What a pass computes from one border to the next."""

    @property
    def forward(self) -> bool: ...

    @property
    def begins(self) -> Border | None: ...


Pass = Callable[[], Tensor | None]
Observe = Callable[[bool], AbstractContextManager[object]]
"""Within what it gives runs one piece: of the forward, or not."""


class Abandoned(RuntimeError):
    """The other pass has failed; it says why."""


class _Turns:
    def __init__(self, order: Sequence[Piece], observe: Observe) -> None:
        self.order, self.observe, self.at = order, observe, 0
        self.go = {True: threading.Semaphore(0), False: threading.Semaphore(0)}
        self.error: BaseException | None = None
        self.over = threading.Event()  # the backward's thread has left
        self.results: dict[bool, Tensor | None] = {}
        self._span: AbstractContextManager[object] | None = None
        self.go[self.forward].release()

    @property
    def forward(self) -> bool:
        """Whose turn it is."""
        return self.order[self.at].forward

    def run(self, forward: bool, work: Pass) -> None:
        """A whole pass, in its turns."""
        try:
            self._wait(forward)
            self._enter()
            self.results[forward] = work()
            self._leave()
            left = sum(piece.forward is forward for piece in self.order[self.at + 1 :])
            if left:
                raise RuntimeError(f"a pass ended {left} pieces before its order does")
            self.at += 1
        except BaseException as error:
            self.error = self.error or error
            self._leave()
            self.go[not forward].release()
            raise
        if self.at < len(self.order) and self.forward is not forward:
            self.go[not forward].release()

    def border(self, name: str, layer: int) -> None:
        me = self.forward
        mine = (piece for piece in self.order[self.at + 1 :] if piece.forward is me)
        expected = getattr(next(mine, None), "begins", None)
        if expected is None or (expected.name, expected.layer) != (name, layer):
            due = "its end" if expected is None else expected
            raise RuntimeError(f"a pass is at {name} of layer {layer}, its order at {due}")
        self._leave()
        self.at += 1
        if self.forward is not me:
            self.go[not me].release()
            self._wait(me)
        self._enter()

    def _wait(self, forward: bool) -> None:
        self.go[forward].acquire()
        if self.error is not None:
            raise Abandoned("the other pass of the pair has failed")

    def _enter(self) -> None:
        self._span = self.observe(self.forward)
        self._span.__enter__()

    def _leave(self) -> None:
        if self._span is not None:
            span, self._span = self._span, None
            span.__exit__(None, None, None)


_running: _Turns | None = None


def running() -> bool:
    """Whether passes take turns."""
    return _running is not None


def border(name: str, layer: int, *, forward: bool) -> None:
    """A pass is about to wait for an exchange of its own, or to compute what nothing waits for. A
    forward within a backward, which computes a layer again, has no turn of its own."""
    if _running is not None and _running.forward is forward:
        _running.border(name, layer)


def take_turns(
    order: Sequence[Piece], forward: Pass, backward: Pass, observe: Observe
) -> tuple[Tensor | None, Tensor | None]:
    """Run both passes in the order of their pieces; what each returns. Fails as the first of them
    that does."""
    global _running
    turns = _Turns(order, observe)
    stream = None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        stream = torch.cuda.current_stream()

    def beside() -> None:
        try:
            if stream is not None:  # of a thread, as is the device
                torch.cuda.set_stream(stream)
            with suppress(BaseException):  # `turns` holds it for whoever asked
                turns.run(False, backward)
        finally:
            turns.over.set()

    _running = turns
    try:
        _backwards().put(beside)
        turns.run(True, forward)
        turns.over.wait()
    except Abandoned:
        turns.over.wait()
    except Exception:
        turns.over.wait()  # it is at a border, where it learns of this
        raise
    finally:
        _running = None
    if turns.error is not None:
        raise turns.error
    return turns.results[True], turns.results[False]


_queue: SimpleQueue[Callable[[], None]] | None = None


def _backwards() -> SimpleQueue[Callable[[], None]]:
    """The thread of this process that runs backwards beside forwards, by its queue."""
    global _queue
    if _queue is None:
        queue: SimpleQueue[Callable[[], None]] = SimpleQueue()

        def serve() -> None:
            while True:
                queue.get()()

        threading.Thread(target=serve, name="backward", daemon=True).start()
        _queue = queue
    return _queue


def _forget_thread() -> None:
    """A fork has the queue of its parent, but none of its threads."""
    global _queue
    _queue = None


os.register_at_fork(after_in_child=_forget_thread)
