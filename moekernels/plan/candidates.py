"""Every strategy that a search may weigh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moekernels.model.dispatch import WAYS
from moekernels.model.layout import Layout, divisors
from moekernels.pipeline.build import in_pairs, offered
from moekernels.plan import cost, replicas
from moekernels.plan.evaluate import Problem
from moekernels.plan.strategy import Strategy, nodes_of_exchange


@dataclass(frozen=True)
class Space:
    """What the search may vary; None: anything. `schedule` names, degrees as numbers."""

    tp: int | None = None
    dp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    schedule: str | None = None
    microbatches: int | None = None
    dispatcher: str | None = None
    optimizer_state: str | None = None
    gpus: int | None = None
    # Of the optimiser's state in the host's memory; none named: 0, and any where nothing fits so.
    shares: tuple[float, ...] = ()

    def allows(self, name: str, value: int | str) -> bool:
        wanted = getattr(self, name)
        return wanted is None or wanted == value


def layouts(problem: Problem, world: int, space: Space) -> Iterator[Layout]:
    model, c = problem.model, problem.cluster
    sequences = len(problem.batch.lengths)
    for tp in divisors(world):
        if tp > c.gpus_per_node or model.num_heads % tp or model.kv_heads % tp:
            continue
        if not space.allows("tp", tp):
            continue
        for pp in divisors(world // tp):
            dp = world // tp // pp
            if pp > model.num_layers or dp > sequences:
                continue
            if not (space.allows("pp", pp) and space.allows("dp", dp)):
                continue
            for etp in divisors(tp):
                if model.expert_d_ff % etp or not space.allows("etp", etp):
                    continue
                if etp > 1 and problem.optimizer == "muon":  # which takes whole matrices
                    continue
                for ep in divisors(tp * dp // etp):
                    if model.num_experts % ep == 0 and space.allows("ep", ep):
                        yield Layout(tp, dp, pp, ep, etp)


@lru_cache(maxsize=256)
def splits(layers: int, depth: int, heavy_loss: bool) -> tuple[tuple[int, ...], ...]:
    """Layers of each virtual stage: even, the odd ones in the middle, away from the first stage's
    activations and the last one's head; and, for a heavy head, one less in the last."""
    base, rest = divmod(layers, depth)
    middle = sorted(range(depth), key=lambda v: (abs(v - (depth - 1) / 2), v))
    even = [base + (v in middle[:rest]) for v in range(depth)]
    found = [tuple(even)]
    if heavy_loss and depth > 1 and even[-1] > 1:
        light = [*even]
        light[-1] -= 1
        target = min(range(depth - 1), key=lambda v: (light[v], abs(v - (depth - 1) / 2)))
        light[target] += 1
        found.append(tuple(light))
    return tuple(found)


def _spare(problem: Problem, layout: Layout, way: str) -> int:
    """Slots for copies of experts, where there is a use for those that are wanted."""
    count, loads = problem.replicas, problem.cluster.loads
    return 0 if count and replicas.why_not(problem.model, layout, way, count, loads) else count


def candidates(problem: Problem, world: int, space: Space) -> Iterator[Strategy]:
    """Every strategy on `world` cards; nothing is checkpointed yet."""
    model = problem.model
    sequences = len(problem.batch.lengths)
    vocabulary = 3 * model.vocab_size * model.d_model
    heavy = vocabulary > cost.layer_flops(model, 1.0, 0.0)
    for layout in layouts(problem, world, space):
        nodes = nodes_of_exchange(layout, problem.cluster.gpus_per_node)
        ways = [name for name, way in WAYS.items() if way.suits(model, layout, nodes)]
        if layout.exchange == 1:
            ways = ways[:1]  # nothing moves, whatever it is called
        spare = {way: _spare(problem, layout, way) for way in ways}
        most = sequences // layout.dp
        counts = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
        if space.microbatches is not None:
            counts = [space.microbatches] if space.microbatches <= most else []
        for virtual in [1, 2, 4] if layout.pp > 1 else [1]:
            names = [n for n in offered(virtual > 1) if space.allows("schedule", n)]
            if layout.pp == 1:  # nobody waits, whatever the order, but for rows
                names = names[:1] + [n for n in names[1:] if in_pairs(n)]
            if layout.exchange == 1 or problem.cluster.exchange_parts > 1:
                names = [n for n in names if not in_pairs(n)]  # nothing to hide, or hidden in parts
            if layout.pp * virtual > model.num_layers:
                continue
            for layers in splits(model.num_layers, layout.pp * virtual, heavy):
                for microbatches in counts:
                    if microbatches < layout.pp and microbatches < most:
                        continue  # a pipeline that never fills: more microbatches are better
                    for name, way in itertools.product(names, ways):
                        if not space.allows("dispatcher", way):
                            continue
                        if in_pairs(name) and (way != "all_to_all" or microbatches == 1):
                            continue  # what goes at once cannot be hidden, nor is it without pairs
                        yield Strategy(
                            layout, layers, (0,) * len(layers), microbatches, name, virtual, way,
                            problem.dtype, shard_optimizer=problem.shard_optimizer, nodes=nodes,
                            replicas=spare[way], ema=problem.ema,
                            optimizer=problem.optimizer, whole_experts=problem.whole_experts,
                        )  # fmt: skip
