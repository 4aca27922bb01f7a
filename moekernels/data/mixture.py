"""Several sources in one run: how a list of them is written, and in which order they take turns."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from moekernels.data.shuffle import permutation
from moekernels.errors import UsageError

BLOCK = 4096  # sequences in which every source has its share, rounded to a whole number
_TURNS = 4 << 40  # a stream of random numbers, plus the block
_WEIGHT = re.compile(r"(.+):([0-9.eE+-]+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A file or folder, and how often it is drawn from; None: as much as it is long."""

    name: str
    weight: float | None = None


def parse(text: str, flag: str = "--data") -> list[Source]:
    """`a.jsonl:0.7 b/:0.3` as sources; a name that exists is one, whatever it looks like.

    UsageError where a list cannot be read, or gives some weights and leaves others out.
    """
    if not text or os.path.exists(text):
        return [Source(text)]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: {error}; quote names that hold spaces") from None
    sources = [_source(word, flag) for word in words]
    if not any(os.path.exists(source.name) or source.weight for source in sources):
        return [Source(text)]  # one name with spaces, most likely: it is said to be missing
    weighted = [source for source in sources if source.weight is not None]
    if len(sources) > 1 and weighted and len(weighted) < len(sources):
        bare = next(source.name for source in sources if source.weight is None)
        raise UsageError(
            f"{flag}: {bare} has no weight, but {weighted[0].name} has; give all of them one, as "
            "in a.jsonl:0.7 b/:0.3, or none"
        )
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{flag}: {twice} is named twice; name it once, with the sum of weights")
    if len(sources) == 1:  # there is nothing to weigh it against
        return [Source(names[0])]
    total = math.fsum(source.weight or 0.0 for source in sources)
    return [Source(s.name, None if s.weight is None else s.weight / total) for s in sources]


def _source(word: str, flag: str) -> Source:
    found = None if os.path.exists(word) else _WEIGHT.fullmatch(word)
    if not found:
        return Source(word)
    try:
        weight = float(found[2])
    except ValueError:
        return Source(word)
    if not 0 < weight < math.inf:
        raise UsageError(f"{flag}: the weight of {found[1]} is {found[2]}; use one above 0")
    return Source(found[1], weight)


class Pool(Protocol):
    """Sequences that can be drawn."""

    def __len__(self) -> int: ...

    def describe(self) -> str: ...

    def draw(self, first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Mixture:
    """Pools that take turns: of every BLOCK sequences each has its share, in random order.

    The number of a sequence and the seed alone decide it, so a resumed run needs no other state.
    """

    pools: tuple[Pool, ...]
    counts: tuple[int, ...]  # sequences of each pool in a block

    @staticmethod
    def of(pools: Sequence[Pool], sources: Sequence[Source]) -> Mixture:
        exact = np.array([source.weight for source in sources]) * BLOCK
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
        for source, count in zip(sources, counts):
            if not count:
                raise UsageError(
                    f"--data: the weight of {source.name} is {source.weight:.2g} of the sum, less "
                    f"than one sequence in {BLOCK}; use a larger one, or leave it out"
                )
        return Mixture(tuple(pools), tuple(map(int, counts)))

    def __len__(self) -> int:
        return sum(map(len, self.pools))

    def draw(self, first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of sequences first ... first+count-1; a pool at its end begins anew."""
        blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        turns = np.concatenate([_turns(self.counts, seed, block) for block in blocks])
        skipped = first - blocks[0] * BLOCK
        before, turns = turns[:skipped], turns[skipped : skipped + count]
        starts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
        for index, (pool, share) in enumerate(zip(self.pools, self.counts)):
            places = turns == index
            if places.any():
                drawn = blocks[0] * share + int((before == index).sum())
                # Each with a seed of its own: or the lengths of all would go in step.
                own = seed + (index << 32)
                starts[places], lengths[places] = pool.draw(drawn, int(places.sum()), own)
        return starts, lengths


@lru_cache(maxsize=8)
def _turns(counts: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    """Whose turn it is: the pool of each sequence of a block."""
    return np.repeat(np.arange(len(counts)), counts)[permutation(BLOCK, seed, _TURNS + block)]
