"""What pairs of passes take in a flush."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekernels.pipeline.schedule import Kind
from moekernels.plan import cost, overlap
from moekernels.plan.strategy import Strategy

if TYPE_CHECKING:
    from moekernels.plan.evaluate import BatchSizes, Costs, Problem


@dataclass(frozen=True)
class PairCosts:
    """Of a pair's passes on every virtual stage: what each takes of [m] beside its exchanges, and
    what a pair waits for those."""

    forward: list[list[float]]
    backward: list[list[float]]
    exposed: list[float]

    def __call__(self, stage: int, forward: int, backward: int) -> float:
        passes = self.forward[stage][forward] + self.backward[stage][backward]
        return passes + self.exposed[stage]


def pair_costs(problem: Problem, s: Strategy, sl: BatchSizes, costs: Costs) -> PairCosts:
    """What is exposed is that of a mean microbatch."""
    model, c = problem.model, problem.cluster
    made = PairCosts([], [], [])
    for v in range(s.depth):
        forward, backward = costs[v, Kind.F], costs[v, Kind.B]
        for number, count, _ in s.kinds_of_layers(model, v):
            if number <= model.dense_layers:
                continue
            layer = cost.layer_cost(model, c, s, number)
            there, back = layer.forward[cost.EXCHANGE], layer.backward[cost.EXCHANGE]
            forward = forward - count * there(sl.tokens, sl.squares).max(0)
            backward = backward - count * back(sl.tokens, sl.squares).max(0)
        made.forward.append(forward.tolist())
        made.backward.append(backward.tolist())
        made.exposed.append(overlap.exposed_in_pair(exchanging(problem, s, sl, v)))
    return made


def exchanging(
    problem: Problem, s: Strategy, sl: BatchSizes, v: int
) -> tuple[overlap.LayerTimes, ...]:
    """The layers of virtual stage v that exchange rows, for a mean microbatch."""
    model = problem.model
    mean = float(sl.tokens.mean()), float(sl.squares.mean())
    layers: list[overlap.LayerTimes] = []
    for number, count, redone in s.kinds_of_layers(model, v):
        if number <= model.dense_layers:
            continue
        layer = cost.layer_cost(model, problem.cluster, s, number)
        if redone:
            layers += [overlap.of_layer(layer, True, mean)] * redone
        if redone < count:
            layers += [overlap.of_layer(layer, False, mean)] * (count - redone)
    return tuple(layers)
