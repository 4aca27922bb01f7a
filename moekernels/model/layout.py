"""How a world of ranks is factored twice: for the dense layers and, folded over the same ranks, for
the experts.

    world = tp * dp * pp = etp * ep * edp * pp

`parallel.mesh` makes the process groups of a layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moekernels.errors import UsageError


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _choices(values: Iterable[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " or " + texts[-1]


@dataclass(frozen=True)
class Layout:
    """How many ways each thing is split. edp, the copies of an expert, follows from the others."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "pp", "ep", "etp"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"layout: {name} is {value!r}; use an integer of at least 1")
        if self.stage_ranks % (self.ep * self.etp):
            if self.stage_ranks % self.etp == 0:
                fitting = divisors(self.stage_ranks // self.etp)
                fits = f"ep {_choices(fitting)} with etp {self.etp}"
            elif self.stage_ranks % self.ep == 0:
                fitting = divisors(self.stage_ranks // self.ep)
                fits = f"etp {_choices(fitting)} with ep {self.ep}"
            else:
                fits = f"a product of {_choices(divisors(self.stage_ranks))}"
            raise UsageError(
                f"layout: ep*etp = {self.ep}*{self.etp} does not divide the tp*dp = "
                f"{self.tp}*{self.dp} ranks of a stage; use {fits}"
            )

    @property
    def stage_ranks(self) -> int:
        """Ranks in a pipeline stage, S."""
        return self.tp * self.dp

    @property
    def world(self) -> int:
        return self.stage_ranks * self.pp

    @property
    def exchange(self) -> int:
        """Ranks that exchange rows with one another."""
        return self.ep * self.etp

    @property
    def edp(self) -> int:
        """Copies of each expert (shard) within a stage."""
        return self.stage_ranks // self.exchange

    def rank_of(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def validate(
        self,
        *,
        world: int | None = None,
        num_experts: int | None = None,
        num_layers: int | None = None,
        virtual_stages: int = 1,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        d_ff: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """UsageError that names a value to use instead, if anything given does not divide."""
        if world is not None and world != self.world:
            raise UsageError(
                f"layout: tp*dp*pp = {self.tp}*{self.dp}*{self.pp} = {self.world} ranks, "
                f"but {world} were started; "
                + (
                    f"use dp {world // (self.tp * self.pp)}"
                    if world % (self.tp * self.pp) == 0
                    else f"use {self.world} ranks"
                )
            )
        self.divide("ep", num_experts, "experts")
        if num_layers is not None and num_layers % (self.pp * virtual_stages):
            times = f" x {virtual_stages} virtual stages" if virtual_stages > 1 else ""
            fits = [p for p in divisors(num_layers) if num_layers % (p * virtual_stages) == 0]
            instead = f"pp {_choices(fits)}" if fits else "fewer virtual stages"
            raise UsageError(
                f"layout: pp {self.pp}{times} does not divide {num_layers} layers; use {instead}"
            )
        self.divide("tp", num_heads, "attention heads")
        self.divide("tp", num_kv_heads, "key-value heads")
        self.divide("etp", d_ff, "hidden units of an expert")
        if vocab_size is not None and vocab_size < self.tp:
            raise UsageError(
                f"layout: a vocabulary of {vocab_size} cannot be split over tp {self.tp}; "
                f"use tp {vocab_size} or less"
            )

    def divide(self, name: str, total: int | None, what: str) -> None:
        """UsageError where a degree, by name, does not divide `total` things, if there are any."""
        value = getattr(self, name)
        if total is not None and total % value:
            near = [d for d in divisors(total) if d <= 1024]
            raise UsageError(
                f"layout: {name} {value} does not divide {total} {what}; "
                f"use {name} {_choices(near)}"
            )

    def describe(self) -> str:
        """Both factorisations, one a line."""
        return (
            f"dense    {self.world} ranks = tp {self.tp} x dp {self.dp} x pp {self.pp}\n"
            f"experts  {self.world} ranks = "
            f"etp {self.etp} x ep {self.ep} x edp {self.edp} x pp {self.pp}"
        )
