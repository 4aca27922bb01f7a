"""Rotary positions: how fast each pair of a head's elements turns with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.spec import LONGEST, MOST, Width, key

SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotarySpec(Width):
    rope_theta: float = key(10000.0, "base of the rotary embedding", low=1, high=1e15)
    rotary_dim: int = key(
        0, "elements of a head that turn with the position; 0: all", low=0, high=MOST
    )
    rope_pairs: bool = key(
        False, "neighbouring elements turn together, not those half of the turning part apart"
    )
    rope_scaling: str = key(
        "none", "how the turning is slowed beyond the context trained on", choices=SCALINGS
    )
    rope_factor: float = key(1.0, "by how much it is slowed", low=1, high=1e6)
    rope_context: int = key(0, "that context, in tokens, for llama3 and yarn", low=0, high=LONGEST)
    rope_fast: float = key(
        32.0, "turns within that context beyond which nothing is slowed", above=0, high=1e6
    )
    rope_slow: float = key(
        1.0, "turns within that context below which all is slowed", above=0, high=1e6
    )
    rope_whole: bool = key(True, "yarn: the bounds between them are rounded to whole pairs")
    rope_magnitude: float = key(1.0, "factor on turned queries and on keys", above=0, high=1e3)

    def turning(self, head_dim: int) -> int:
        return self.rotary_dim or head_dim

    def check_rotary(self, head_dim: int) -> None:
        turning = self.turning(head_dim)
        if turning % 2 or turning > head_dim:
            raise UsageError(
                f"model: rotary_dim is {turning}; use an even number of a head's {head_dim}"
            )
        if self.rope_scaling not in SCALINGS:
            raise UsageError(
                f"model: rope_scaling {self.rope_scaling!r}; use one of {', '.join(SCALINGS)}"
            )
        if self.rope_scaling in ("llama3", "yarn"):
            if not self.rope_context:
                raise UsageError(f"model: rope_scaling {self.rope_scaling} needs rope_context")
            if self.rope_fast <= self.rope_slow:
                raise UsageError(
                    f"model: rope_fast {self.rope_fast} must be above rope_slow {self.rope_slow}"
                )
        elif self.rope_scaling == "none" and self.rope_factor != 1:
            raise UsageError(f"model: rope_factor {self.rope_factor} needs a rope_scaling")


def frequencies(spec: RotarySpec, head_dim: int) -> list[float]:
    """Radians a position by which each pair turns."""
    dim = spec.turning(head_dim)
    plain = [spec.rope_theta ** -(2 * i / dim) for i in range(dim // 2)]
    if spec.rope_scaling == "none":
        return plain
    if spec.rope_scaling == "linear":
        return [f / spec.rope_factor for f in plain]
    slowed = _slowed_llama3 if spec.rope_scaling == "llama3" else _slowed_yarn
    return [
        f * (1 - part) + f / spec.rope_factor * part
        for f, part in zip(plain, slowed(spec, dim, plain))
    ]


def _slowed_llama3(spec: RotarySpec, dim: int, plain: list[float]) -> list[float]:
    """The part of each pair's turning that is slowed: by its turns within the context."""
    turns = [spec.rope_context * f / (2 * math.pi) for f in plain]
    span = spec.rope_fast - spec.rope_slow
    return [1 - min(1.0, max(0.0, (t - spec.rope_slow) / span)) for t in turns]


def _slowed_yarn(spec: RotarySpec, dim: int, plain: list[float]) -> list[float]:
    """The same: by the pair's number, between those that turn `rope_fast` and `rope_slow` times."""

    def pair_of(turns: float) -> float:
        length = spec.rope_context / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(spec.rope_theta))

    low, high = pair_of(spec.rope_fast), pair_of(spec.rope_slow)
    if spec.rope_whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    return [min(1.0, max(0.0, (i - low) / span)) for i in range(dim // 2)]
