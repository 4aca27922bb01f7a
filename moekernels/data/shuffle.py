"""Random numbers as a pure function of (seed, stream, index).

A generator's stream may change with the next numpy; a resumed run must not. So the few random
choices of the data pipeline come from SplitMix64's finaliser over the index.
"""

from __future__ import annotations

import numpy as np

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, stream: int, count: int, start: int = 0) -> np.ndarray:
    """uint64 [count]: the bits at indices start ... start+count-1 of one stream of one seed."""
    key = np.array([seed & _MASK], dtype=np.uint64)
    key = _mix(_mix(key + np.uint64(_GOLDEN)) ^ np.uint64(stream & _MASK))
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return _mix(key + index * np.uint64(_GOLDEN))


def permutation(count: int, seed: int, stream: int) -> np.ndarray:
    """int64 [count]: a permutation of 0 ... count-1."""
    return np.argsort(random_bits(seed, stream, count), kind="stable")


def integers(low: int, high: int, count: int, seed: int, stream: int, start: int = 0) -> np.ndarray:
    """int64 [count], uniform in low ... high, both included."""
    return low + (random_bits(seed, stream, count, start) % np.uint64(high - low + 1)).astype(
        np.int64
    )
