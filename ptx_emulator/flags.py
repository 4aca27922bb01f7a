"""Words that threads signal by: the values each has held, what each releases, who saw which.

A strong load may see an old value, but none older than this thread has seen or than what it is
ordered behind; a poll that sees them late sees every one in turn. So whoever goes on too early
does so under every schedule, and what it acquires is what the value that it saw releases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .syntax import Instruction

if TYPE_CHECKING:
    from .memory_order import Clocks

FENCE = "fence"
BLOCK, DEVICE, SYSTEM = 1, 2, 3  # scopes, and rows of Clocks.units
_SCOPES = {"cta": BLOCK, "cluster": BLOCK, "gpu": DEVICE, "gl": DEVICE, "sys": SYSTEM}
_KEPT = 256  # values of a word that a late reader may still see

Releases = tuple[tuple[int, int, np.ndarray], ...]  # (scope, thread, clock)


def scope_of(ins: Instruction, kind: str = "") -> int:
    """BLOCK, DEVICE or SYSTEM."""
    for mod in ins.mods:
        if mod in _SCOPES:
            return _SCOPES[mod]
    if "volatile" in ins.mods or "mmio" in ins.mods or kind == FENCE:
        return SYSTEM
    return DEVICE


class _Value:
    __slots__ = ("value", "epoch", "writer", "releases")

    def __init__(self, value: int, epoch: int, writer: int, releases: Releases):
        self.value, self.epoch, self.writer, self.releases = value, epoch, writer, releases


class _Flag:
    """The values that a word has held, the first of them number `first`."""

    def __init__(self, nbytes: int, value: int):
        self.nbytes, self.first = nbytes, 0
        self.values = [_Value(value, 0, -1, ())]
        self.seen: dict[int, int] = {}  # thread -> number of the value it saw last
        self.joined: Releases | None = None  # of lanes whose atomics make one value together

    @property
    def newest(self) -> int:
        return self.first + len(self.values) - 1


class Flags:
    def __init__(self, clocks: Clocks):
        self.clocks = clocks
        self.words: dict[int, _Flag] = {}
        self.fences: dict[int, dict[int, np.ndarray]] = {}  # thread -> scope -> clock
        self.pending: dict[int, list[tuple[int, Releases]]] = {}  # loads that a fence may follow
        self.ordered_at: dict[int, int] = {}  # the epoch of a thread's last fence.sc

    def begin(self, offset: int, nbytes: int, value: int) -> int | None:
        """A strong access: the size that the word has elsewhere, where it is another one."""
        for at in range(offset - 7, offset + nbytes):
            word = self.words.get(at)
            if word is not None and at + word.nbytes > offset:
                if at != offset or word.nbytes != nbytes:
                    return word.nbytes
        if offset not in self.words:
            self.words[offset] = _Flag(nbytes, value)
        return None

    def forget(self, offsets: np.ndarray, nbytes: int) -> None:
        """Plain stores: what a word held before is no matter any more."""
        if not self.words:
            return
        low, high = int(offsets.min()) - 7, int(offsets.max()) + nbytes
        for at in [at for at in self.words if low <= at < high]:
            size = self.words[at].nbytes
            if ((offsets < at + size) & (offsets + nbytes > at)).any():
                del self.words[at]

    def reach(self, a, b, scope_a, scope_b):
        """Whether the scopes of accesses by threads a and b include the other thread."""
        units = self.clocks.units
        both = np.minimum(scope_a, scope_b)
        needed = np.where(
            units[BLOCK, a] == units[BLOCK, b],
            BLOCK,
            np.where(units[DEVICE, a] == units[DEVICE, b], DEVICE, SYSTEM),
        )
        return both >= needed

    def load(self, thread: int, offset: int, ins: Instruction, late: bool) -> tuple[int, bool]:
        """(value, whether it is another than this thread saw before)."""
        word = self.words[offset]
        before = word.seen.get(thread, -1)
        number = max(before, word.first)
        for later in range(word.newest, number, -1):
            held = word.values[later - word.first]
            known = self.clocks.known[self.clocks.row_of[thread], held.writer]
            floor = max(int(known), self.ordered_at.get(thread, 0))
            if held.writer == thread or held.epoch <= floor:
                number = later
                break
        if number < word.newest:
            number = number + (before >= number) if late else word.newest
        word.seen[thread] = number
        held = word.values[number - word.first]
        self._acquire(thread, scope_of(ins), held.releases, "acquire" in ins.mods)
        return held.value, number != before

    def _acquire(self, thread: int, scope: int, releases: Releases, now: bool) -> None:
        if not releases:
            return
        if not now:
            waiting = self.pending.setdefault(thread, [])
            if not waiting or waiting[-1][1] is not releases:
                waiting.append((scope, releases))
            return
        for theirs, by, clock in releases:
            if self.reach(thread, by, scope, theirs):
                self.clocks.learn(thread, clock)

    def store(self, thread: int, offset: int, ins: Instruction, value: int, last: bool) -> None:
        """A strong store, or an atomic: that one goes on with the releases before it. `last` of an
        instruction's lanes that share the word: the value is there, with what all of them release.
        """
        word, scope, atomic = self.words[offset], scope_of(ins), ins.op in ("atom", "red")
        before: Releases = ()
        if atomic:
            before = word.values[-1].releases if word.joined is None else word.joined
        if atomic:
            self._acquire(thread, scope, before, bool({"acquire", "acq_rel"} & set(ins.mods)))
        if {"release", "acq_rel"} & set(ins.mods):
            before = self._with(before, scope, thread, self.clocks.of(thread))
        for fenced, clock in self.fences.get(thread, {}).items():
            before = self._with(before, min(fenced, scope), thread, clock)
        word.joined = None if last else before
        if not last:
            return
        word.values.append(_Value(value, self.clocks.now, thread, before))
        word.seen[thread] = word.newest
        if len(word.values) > _KEPT:
            word.values.pop(0)
            word.first += 1

    def _with(self, releases: Releases, scope: int, thread: int, clock: np.ndarray) -> Releases:
        """One more release; those that the same threads may acquire are one."""
        unit = self.clocks.units[scope]
        for i, (theirs, by, known) in enumerate(releases):
            if theirs == scope and unit[by] == unit[thread]:
                joined = scope, thread, np.maximum(known, clock)
                return (*releases[:i], joined, *releases[i + 1 :])
        return (*releases, (scope, thread, clock))

    def fence(self, thread: int, scope: int, sequential: bool) -> None:
        for theirs, releases in self.pending.get(thread, []):
            self._acquire(thread, min(scope, theirs), releases, True)
        if scope == SYSTEM:
            self.pending.pop(thread, None)
        self.fences.setdefault(thread, {})[scope] = self.clocks.of(thread)
        if sequential:
            self.ordered_at[thread] = self.clocks.now
