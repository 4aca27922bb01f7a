"""Gradients of weights that nothing waits for, put off by a backward until somebody has time.

Work that is put off adds to a `main_grad`, makes nothing that the rest of the backward needs, and
runs in the order in which it was put off, so that sums keep their order and bits. Two places take
it:

    with deferred(queue): backward(...)   whoever drives the backward, and runs the queue when it
                                          will: a schedule that computes weights apart
    begin() ... run()                     within one backward, from where something is soon to be
                                          waited for to the wait; its end runs what is left

A third, `Joined`, keeps those of several backwards that are computed as one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch

Work = Callable[[], None]


class Queue:
    def __init__(self) -> None:
        self._work: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self._work)

    def put(self, work: Work) -> None:
        self._work.append(work)

    @torch.no_grad()
    def run(self, most: int | None = None) -> int:
        """Run the oldest `most` (None: all), in order; how many ran."""
        done = 0
        while self._work and (most is None or done < most):
            self._work.popleft()()
            done += 1
        return done


class Joinable(Protocol):
    """Work of which several make one call, with the bits of as many in their order."""

    @property
    def buffer(self) -> int:
        """What it adds to."""

    @property
    def key(self) -> Hashable:
        """Of one buffer, what is of one key and next to each other can be joined."""

    def join(self, others: Sequence[Any]) -> None:
        """Do this work, and then that of the others."""

    def __call__(self) -> None: ...


class Joined(Queue):
    """Keeps what can be joined, over several backwards, and runs it together, each buffer's work in
    the order in which it was put off. All else runs at once."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Joinable] = []

    def __len__(self) -> int:
        return len(self._kept)

    def taking(self) -> AbstractContextManager[Queue]:
        return deferred(self)

    def clear(self) -> None:
        self._kept = []

    def put(self, work: Work) -> None:
        if hasattr(work, "join"):
            self._kept.append(cast(Joinable, work))
        elif torch.is_grad_enabled():
            with torch.no_grad():
                work()
        else:  # as in most backwards, where asking costs less than entering
            work()

    @torch.no_grad()
    def run(self, most: int | None = None) -> int:
        """Run all; how many ran."""
        kept, self._kept = self._kept, []
        kept.sort(key=lambda work: work.buffer)
        for _, alike in groupby(kept, key=lambda work: (work.buffer, work.key)):
            first, *others = alike
            if others:
                first.join(others)
            else:
                first()
        return len(kept)


_driven: list[Queue] = []  # of `deferred`, the innermost last
# Of backwards that run, by autograd's numbers of them. Held by the callback at a backward's end:
# what one that failed had put off is gone with it, and other threads' backwards are not touched.
_begun: WeakValueDictionary[int, Queue] = WeakValueDictionary()


def owed() -> AbstractContextManager[Queue]:
    """`deferred` to a queue of its own."""
    return deferred(Queue())


@contextmanager
def deferred(queue: Queue) -> Iterator[Queue]:
    """Have backwards within put off to `queue` what nothing waits for."""
    _driven.append(queue)
    try:
        yield queue
    finally:
        _driven.remove(queue)


def later(work: Work) -> None:
    """Put off, if anybody takes it, or run now."""
    if torch.compiler.is_compiling() or not (_driven or _begun):
        work()
        return
    if _driven:
        _driven[-1].put(work)
        return
    queue = _begun.get(torch._C._current_graph_task_id())
    if queue is None:
        work()
    else:
        queue.put(work)


def begin() -> None:
    """Within a backward: put off until `run`, or until the backward ends."""
    task = torch._C._current_graph_task_id()
    if task < 0 or _driven or task in _begun:
        return
    _begun[task] = queue = Queue()

    def end() -> None:
        if queue:  # not run yet
            queue.run()

    torch.autograd.Variable._execution_engine.queue_callback(end)


def run() -> int:
    """Run what this backward has put off since `begin`, which ends; how many ran."""
    queue = _begun.pop(torch._C._current_graph_task_id(), None)
    return 0 if queue is None else queue.run()
