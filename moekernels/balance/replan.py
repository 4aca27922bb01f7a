"""When experts move, and whether it pays: a run's rule, and what a new placement would save.

Legend: L layers with experts, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekernels.balance import placement
from moekernels.errors import UsageError

AUTO_STEPS = 10  # between two looks of `auto`
LEAST = 0.02  # of the mean load, that the busiest rank of a layer must lose, or its experts stay
TIMES = 2  # what a move saves until the next look must be so many times what it costs


@dataclass(frozen=True)
class Rule:
    """`--replan`: how often to look (steps; 0: never), whether a move must pay, or is a draw."""

    every: int = 0
    must_pay: bool = False
    random: bool = False

    @staticmethod
    def parse(text: str) -> Rule:
        """UsageError where it is no rule."""
        if text == "never":
            return Rule()
        if text == "auto":
            return Rule(AUTO_STEPS, must_pay=True)
        word, colon, number = text.rpartition(":")
        if (word, colon) in (("", ""), ("random", ":")):
            if number.isascii() and number.isdigit() and 0 < int(number[:10]) < 10**9:
                return Rule(int(number), random=bool(colon))
        raise UsageError(
            f"--replan must be never, auto, a number of steps, or random:N, got {text!r}"
        )


def drawn(slot_of: Tensor, ranks: int, seed: int, step: int) -> Tensor:
    """A placement [L, E] that hangs on seed and step alone, but for the slots of who stays."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    each = slot_of.shape[1] // ranks
    drawn = [torch.randperm(slot_of.shape[1], generator=generator) // each for _ in slot_of]
    return torch.stack(
        [placement.put(rank_of, slots, ranks) for rank_of, slots in zip(drawn, slot_of)]
    )


def better(
    loads: Tensor,
    slot_of: Tensor,
    node_of: Sequence[Sequence[int]],
    coactivation: Tensor | None = None,
    least: float = LEAST,
) -> Tensor:
    """The placement [L, E] for loads [L, E], from slot_of [L, E] by few moves; a layer whose
    busiest rank would lose less than `least` of the mean load stays as it is.

    node_of [L, P]; coactivation [L, E, E] or None, as `placement.solve` takes them. Where nodes
    count a layer moves if load and nodes together gain as much.
    """
    after = slot_of.clone()
    for layer, (row, nodes) in enumerate(zip(loads, node_of)):
        ranks = len(nodes)
        pairs = None if coactivation is None else coactivation[layer]
        rank_of = placement.solve(row, nodes, pairs, slot_of=slot_of[layer])
        was = placement.cost(row, slot_of[layer] // (len(row) // ranks), nodes, pairs)
        if was - placement.cost(row, rank_of, nodes, pairs) >= least:
            after[layer] = placement.put(rank_of, slot_of[layer], ranks)
    return after


def busiest_rows(loads: Tensor, slot_of: Tensor, ranks: int, stages: Sequence[Sequence[int]]):
    """Rows [] that the busiest pipeline stage waits for: of each of its layers those of the busiest
    rank. `stages`: the layers of each, counted from 0."""
    most = placement.rank_loads(loads, slot_of, ranks).amax(1)
    return max((most[list(layers)].sum().item() for layers in stages if layers), default=0.0)
