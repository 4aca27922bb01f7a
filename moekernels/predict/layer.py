"""An MoE layer as a sum of launches: its products by events, what moves data by its bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moekernels.predict.card import Card
from moekernels.predict.events import Predicted, predict
from moekernels.predict.kernel import Kernel, Problem
from moekernels.predict.walk import expert_counts

OPS = ("up", "down", "dact", "dgrad", "wgrad1", "wgrad2")


@dataclass(frozen=True)
class Layer:
    """A gated layer: T tokens, H hidden, F expert hidden, E experts, K top-k."""

    T: int
    H: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return " ".join(f"{name}{value}" for name, value in asdict(self).items())

    @property
    def rows(self) -> int:
        return self.T * self.K

    def counts(self) -> tuple[int, ...]:
        return tuple(expert_counts(self.rows, self.E))

    def plain(self, n: int, k: int) -> Problem:
        """A row product that stores what it computes."""
        return Problem(self.counts(), self.rows, n, k)

    def problem(self, op: str, gradient: tuple[float, float] = (4.0, 4.0)) -> Problem:
        """gradient: bytes read and written for an element of a weight gradient."""
        counts, rows, h, f = self.counts(), self.rows, self.H, self.F
        if op.startswith("wgrad"):
            m, n = (h, f) if op == "wgrad2" else (2 * f, h)
            return Problem(counts, m, n, 0, True, *gradient)
        n, k, reads, writes = {
            "up": (2 * f, h, 0.0, 3.0),  # h and a
            "down": (h, f, 0.0, 2.0),
            "dact": (f, h, 4.0, 6.0),  # h; dh and the weighted a
            "dgrad": (h, 2 * f, 0.0, 2.0),
        }[op]
        return Problem(counts, rows, n, k, False, reads, writes)


@dataclass(frozen=True)
class Recipe:
    """Which kernel each product of a layer takes. narrow_down: where F < 1024; narrow_dgrad: where
    F < 512. of_x: w1's gradient, where it is another kernel than w2's.

    permutes: passes that move all rows, of a forward and of a backward. others: seconds of what
    else these launch."""

    up: Kernel
    down: Kernel
    dact: Kernel
    dgrad: Kernel
    wgrad: Kernel
    narrow_down: Kernel | None = None
    narrow_dgrad: Kernel | None = None
    of_x: Kernel | None = None
    permutes: tuple[int, int] = (1, 2)
    others: tuple[float, float] = (0.0, 0.0)
    wgrad_bytes: tuple[float, float] = (4.0, 4.0)

    def kernel(self, op: str, layer: Layer) -> Kernel:
        if op == "down" and self.narrow_down is not None and layer.F < 1024:
            return self.narrow_down
        if op == "dgrad" and self.narrow_dgrad is not None and layer.F < 512:
            return self.narrow_dgrad
        if op == "wgrad1" and self.of_x is not None:
            return self.of_x
        return getattr(self, op.rstrip("12"))


def products(layer: Layer, recipe: Recipe, card: Card) -> dict[str, Predicted]:
    """Every product of a layer."""
    return {
        op: predict(layer.problem(op, recipe.wgrad_bytes), recipe.kernel(op, layer), card)
        for op in OPS
    }


def layer_tflops(layer: Layer, recipe: Recipe, card: Card) -> dict[str, float]:
    """forward, backward: TFLOP/s of the whole layer, permutation and combine included."""
    found = products(layer, recipe, card)
    times = {op: p.seconds / recipe.kernel(op, layer).segments for op, p in found.items()}
    row_bytes = 2 * layer.H
    permute = 2 * layer.rows * row_bytes / card.dram
    combine = (layer.rows + layer.T) * row_bytes / card.dram
    flops = 6.0 * layer.rows * layer.F * layer.H
    moved = [passes * permute + combine for passes in recipe.permutes]
    forward = times["up"] + times["down"] + moved[0] + recipe.others[0]
    backward = sum(times[op] for op in OPS[2:]) + moved[1] + recipe.others[1]
    return {
        "forward": flops / forward / 1e12,
        "backward": 2 * flops / backward / 1e12,
    }
