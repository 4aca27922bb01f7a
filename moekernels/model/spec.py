"""What the parts of a decoder share: fields that say what they take, and where a part is counted.

Legend: T tokens of a microbatch, t own tokens (T/tp), R routed rows that arrive at a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekernels.model.layout import Layout

# Beyond any use: a number with a digit too many is refused before anything counts up to it.
MOST, WIDEST, LONGEST, STEPS = 1 << 16, 1 << 20, 1 << 24, 10**9
AUTO = -1  # what the word `auto` stands for where a number is wanted
WIDTH = {"fp64": 8, "fp32": 4, "bf16": 2}  # bytes of an element


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
    flag: str | None = None,
    auto: bool = False,
    several: bool = False,
) -> Any:
    """A field with its help and the values it takes: `low <= value <= high`, `value > above`, or
    one of `choices`; with `auto` also that word. `flag` names it on the command line, where
    `several` words may follow it."""
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "above": above,
            "choices": None if choices is None else tuple(choices),
            "flag": flag,
            "auto": auto,
            "several": several,
        },
    )


@dataclass(frozen=True)
class Width:
    """The field that every part reads."""

    d_model: int = key(1024, "width of a token", low=2, high=WIDEST)


@dataclass(frozen=True)
class Place:
    """A microbatch of `tokens` (T, of a tensor-parallel group) on one rank, as far as sizes depend
    on it.

    runs: groups of neighbouring equal segments, which attention on the CPU takes one by one.
    imbalance: rows of the busiest rank over the mean. parts: that an exchange is cut into. nodes:
    that its ranks lie on, as many on each; of uneven ones a mean. squares: of the lengths of
    neighbouring equal segments, summed: the most of such a group.
    """

    layout: Layout = Layout()
    tokens: float = 0.0
    dtype: str = "bf16"
    dispatcher: str = "all_to_all"
    sequence_parallel: bool = True
    imbalance: float = 1.0
    device: str = "cuda"
    runs: int = 1
    parts: int = 1
    nodes: float = 1
    squares: float = 0.0

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return WIDTH[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of what is kept in fp32 at least."""
        return max(4, self.width)

    @property
    def own(self) -> float:
        """t: tokens that this rank routes."""
        return self.tokens / self.layout.tp

    @property
    def residual(self) -> float:
        """Tokens of the residual stream on this rank."""
        return self.own if self.sequence_parallel else self.tokens

    @property
    def gathered(self) -> float:
        """Tokens of all ranks that exchange rows."""
        return self.own * self.layout.exchange


@dataclass(frozen=True)
class Work:
    """Of a forward pass on one rank, a token of its tensor-parallel group's microbatch."""

    dense: float = 0.0  # FLOPs of products with weights that all tokens meet
    wide: float = 0.0  # the same, computed in fp32 at least
    grouped: float = 0.0  # FLOPs of the experts' products, a routed row
    experts: float = 0.0  # that these products are grouped by
    pairs: float = 0.0  # FLOPs a squared sequence length
    traffic: float = 0.0  # bytes that pass through memory beside the products
    scores: float = 0.0  # the same, a squared sequence length


@dataclass(frozen=True)
class Owed:
    """Bytes that a backward leaves behind where the weights' gradients are put off: inputs of their
    products, which the forward pass keeps too, and gradients of the results."""

    inputs: float = 0.0
    gradients: float = 0.0

    def __add__(self, other: Owed) -> Owed:
        return Owed(self.inputs + other.inputs, self.gradients + other.gradients)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """An entry of a register: something that layers are made of, with what others ask of it. The
    functions take the whole specification.

    asked: whether the specification wants it, by fields of the part's own. check: raises a
    UsageError. shapes: the full shape of each parameter, by name. parameters, kept, work: of a
    rank, see `moekernels.model`. copies: (ranks that share the gradient, how far apart they lie).
    owed: what its backward leaves to the weights' gradients; nothing where it puts none off.
    passing: bytes that its backward, or its forward, holds for a moment beside what it keeps, where
    that may be more than anything else of a layer does.
    example: fields of a small model that has it, which `verify` runs.
    """

    parameters: Callable[[Any, Place, bool], int]
    kept: Callable[[Any, Place], float]
    work: Callable[[Any, Place], Work]
    shapes: Callable[[Any], dict[str, Shape]]
    asked: Callable[[Any], bool] = lambda spec: True
    check: Callable[[Any], None] = lambda spec: None
    copies: Callable[[Layout], tuple[int, int]] = lambda layout: (layout.dp, layout.tp)
    owed: Callable[[Any, Place], Owed] = lambda spec, at: Owed()
    passing: Callable[[Any, Place], float] = lambda spec, at: 0.0
    example: Mapping[str, Any] = field(default_factory=dict)


def norm_kept(spec: Width, at: Place) -> float:
    """The input and the scale of each token that an RMSNorm keeps."""
    return at.residual * (spec.d_model * at.width + at.wide)
