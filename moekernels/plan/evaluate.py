"""One strategy on one cluster: its batch plan, its schedule under a clock, its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby

import numpy as np

from moekernels.data.batch_plan import BatchPlan, Cost, plan_batch
from moekernels.model.decoder import DecoderSpec, alike
from moekernels.pipeline.build import in_pairs, splits
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Pieces, Simulator, Timeline
from moekernels.plan import cost
from moekernels.plan.memory import StageMemory, cached_schedule, stage_memory
from moekernels.plan.pairs import pair_costs
from moekernels.plan.strategy import Batch, Cluster, Objective, Strategy


@dataclass(frozen=True)
class Problem:
    """What is to be trained, on what."""

    model: DecoderSpec
    batch: Batch
    cluster: Cluster
    dtype: str = "bf16"
    objective: Objective = Objective()
    shard_optimizer: bool = False
    replicas: int = 0
    ema: float = 0.0
    optimizer: str = "adamw"
    whole_experts: bool = False  # experts move, so their optimiser's state is not split


Costs = dict[tuple[int, Kind], np.ndarray]  # (virtual stage, kind): seconds [m]


@dataclass(frozen=True)
class BatchSizes:
    """Microbatches by data-parallel rank: tokens and squared lengths [dp, m]."""

    tokens: np.ndarray
    squares: np.ndarray

    @cached_property
    def largest(self) -> int:
        return int(self.tokens.max())

    @cached_property
    def sums(self) -> tuple[float, float]:
        """(tokens, squares) of the mean data-parallel rank: a bound from below on the slowest."""
        return float(self.tokens.sum(1).mean()), float(self.squares.sum(1).mean())

    @cached_property
    def least(self) -> tuple[float, float]:
        return float(self.tokens.min()), float(self.squares.min())

    @cached_property
    def most(self) -> tuple[float, float]:
        return float(self.tokens.max()), float(self.squares.max())


@lru_cache(maxsize=4096)
def batch_sizes(
    model: DecoderSpec, batch: Batch, dp: int, microbatches: int, align: int
) -> BatchSizes:
    return _sizes_of(batch, _plan(model, batch, dp, microbatches), align)


@lru_cache(maxsize=1024)
def _plan(model: DecoderSpec, batch: Batch, dp: int, microbatches: int) -> BatchPlan:
    return plan_batch(
        batch.lengths, microbatches, dp=dp, policy=batch.policy, cost=sequence_cost(model)
    )


def _sizes_of(batch: Batch, plan: BatchPlan, align: int) -> BatchSizes:
    tokens, squares = np.array(plan.rows, dtype=float), []
    for groups, pads in zip(plan.groups, plan.pad_to):
        squares.append(
            [
                float(sum((pad or batch.lengths[i]) ** 2 for i in group))
                for group, pad in zip(groups, pads)
            ]
        )
    return BatchSizes(-(-tokens // align) * align, np.array(squares))


@lru_cache(maxsize=1024)
def _squares_together(model: DecoderSpec, batch: Batch, dp: int, microbatches: int) -> float:
    return squares_together(batch.lengths, _plan(model, batch, dp, microbatches))


def squares_together(lengths: Sequence[int], plan: BatchPlan) -> float:
    """The largest sum of squares of neighbouring equal sequences of a microbatch, which attention
    takes at once."""
    most = 0.0
    for groups, pads in zip(plan.groups, plan.pad_to):
        for group, pad in zip(groups, pads):
            runs = groupby(pad or lengths[i] for i in group)
            most = max([most, *(float(n) * n * sum(1 for _ in run) for n, run in runs)])
    return most


def sequence_cost(model: DecoderSpec) -> Cost:
    """As the loader weighs sequences."""
    return Cost.of_transformer(
        model.parameters_count(active=True), model.num_layers, model.attention_width
    )


@lru_cache(maxsize=256)
def simulator(name: str, stages: int, microbatches: int, virtual_stages: int) -> Simulator:
    return Simulator(cached_schedule(name, stages, microbatches, virtual_stages))


@dataclass(frozen=True)
class Plan:
    """A strategy, with what it takes and reaches. Seconds and bytes."""

    problem: Problem = field(repr=False)
    strategy: Strategy
    flush: float
    parts: dict[str, float]  # of the step, by the slowest stage's reckoning; they add up to it
    layer_seconds: float  # one layer's forward over the mean microbatch
    mean_tokens: float
    largest_tokens: int
    bubble: float
    sequences: int
    tokens: int
    model_flops: float  # of the step, a card
    hardware_flops: float
    peak_flops: float

    @cached_property
    def step(self) -> float:
        return sum(self.parts.values())

    @cached_property  # a search asks it of few of the plans that it plays
    def stages(self) -> tuple[StageMemory, ...]:
        return tuple(
            memory_of(self.problem, self.strategy, rank, self.largest_tokens)
            for rank in range(self.strategy.layout.pp)
        )

    @property
    def memory(self) -> float:
        return max(stage.total for stage in self.stages)

    @property
    def host_memory(self) -> float:
        """Of the host, for all cards of a node."""
        cards = min(self.gpus, self.problem.cluster.gpus_per_node)
        return cards * max(stage.host for stage in self.stages)

    @property
    def gpus(self) -> int:
        return self.strategy.layout.world

    @property
    def border_bytes(self) -> float:
        """Of a step's exchanges, to other nodes."""
        return cost.border_bytes(self.problem.model, self.strategy, self.tokens)

    @property
    def sequences_per_second(self) -> float:
        return self.sequences / self.step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step / self.peak_flops

    @property
    def hfu(self) -> float:
        return self.hardware_flops / self.step / self.peak_flops


def memory_of(problem: Problem, s: Strategy, rank: int, tokens: int) -> StageMemory:
    c = problem.cluster
    skew = c.skew(s)
    device, parts, bound = c.device, c.exchange_parts, c.exchange_bound
    squares = 0.0
    if problem.model.masked:
        squares = _squares_together(problem.model, problem.batch, s.layout.dp, s.microbatches)
    stage = stage_memory(
        problem.model, s, rank, tokens, imbalance=skew, device=device, parts=parts, bound=bound,
        squares=squares,
    )  # fmt: skip
    # The gradients' sum comes after all that; a planner asks for it often.
    passing = stage.activations + stage.working + stage.messages
    if cost.GRADIENT * max(stage.parameters.values(), default=0) <= passing:
        return stage
    copy = cost.reduction_bytes(problem.model, s, stage.parameters, c.device)
    if copy > passing:
        stage = replace(stage, activations=0.0, working=copy, messages=0.0)
    return stage


def flush_costs(problem: Problem, s: Strategy, sl: BatchSizes) -> Costs:
    """{(virtual stage, Kind): seconds [m]} of what the schedule's ranks compute."""
    split = splits(s.schedule)
    kinds = {}
    for number, _ in alike(problem.model, range(1, problem.model.num_layers + 1)):
        layer = cost.layer_cost(problem.model, problem.cluster, s, number)
        whole = layer.total
        back = whole.through if split else whole.backward
        kinds[number] = [
            part(sl.tokens, sl.squares).max(0)
            for part in (whole.forward, back, whole.again, whole.weights)
        ]
    loss = cost.loss_cost(problem.model, problem.cluster, s)(sl.tokens, sl.squares).max(0)
    costs: Costs = {}
    for v in range(s.depth):
        forward = backward = weights = np.full_like(loss, problem.cluster.action_overhead)
        for number, count, redone in s.kinds_of_layers(problem.model, v):
            ahead, back, again, apart = kinds[number]
            forward = forward + count * ahead
            backward = backward + count * back + redone * again
            weights = weights + count * apart
        costs[v, Kind.F] = forward + (loss if v == s.depth - 1 else 0.0)
        costs[v, Kind.I if split else Kind.B] = backward
        if split:
            costs[v, Kind.W] = weights
    return costs


def play(
    problem: Problem, s: Strategy, sl: BatchSizes, pieces: Sequence[Pieces] = ()
) -> tuple[Timeline, Costs]:
    """The flush on the schedule that the runtime would run, and what its actions cost. `pieces`:
    of pairs, as `Simulator.run` has them."""
    costs = flush_costs(problem, s, sl)
    run = simulator(s.schedule, s.layout.pp, s.microbatches, s.virtual_stages)
    run.latency = cost.message_seconds(problem.model, problem.cluster, s, float(sl.tokens.mean()))
    lists = {key: values.tolist() for key, values in costs.items()}
    pair = pair_costs(problem, s, sl, costs) if in_pairs(s.schedule) else None
    played = run.run(lambda stage, microbatch, kind: lists[stage, kind][microbatch], pair, pieces)
    return played, costs


def lower_bound(problem: Problem, s: Strategy, sl: BatchSizes) -> float:
    """A flush of `s` takes no less, whatever is checkpointed: a stage's own work, behind and
    before the shortest microbatch of the stages in front of it.

    Where weights' gradients are put off only its forward pass is in front for certain. But behind
    its first F a stage waits for the stages that follow to take that microbatch forward and back,
    and has no more to do meanwhile than the F that 1F1B has it do ahead.
    """
    tokens, squares = sl.sums
    m, split, pairs = s.microbatches, splits(s.schedule), in_pairs(s.schedule)

    def whole(a: cost.Affine) -> float:
        return a.fixed * m + a.per_token * tokens + a.per_square * squares

    # Of each layer, in order.
    both: list[float] = []
    shortest: list[float] = []
    there_and_back: list[float] = []
    longest: list[float] = []
    model = problem.model
    for number, count in alike(model, range(1, model.num_layers + 1)):
        layer = cost.layer_cost(model, problem.cluster, s, number).total
        # pairs may hide all exchanges
        passes = layer.computed if pairs else layer.forward + layer.backward
        both += [whole(passes)] * count
        ahead = layer.forward if split else passes
        shortest += [ahead(*sl.least)] * count
        if split:
            there_and_back += [(layer.forward + layer.through)(*sl.least)] * count
            longest += [layer.forward(*sl.most)] * count
    loss = cost.loss_cost(problem.model, problem.cluster, s)
    ranges, stages = s.layer_ranges, s.layout.pp
    before = [0.0, *accumulate(both)]  # of the layers in front of each
    ahead_of = [0.0, *accumulate(shortest)]
    best = 0.0
    for rank in range(stages):
        own = whole(loss) if rank == stages - 1 else 0.0
        for layers in ranges[rank::stages]:
            own += before[layers.stop - 1] - before[layers.start - 1]
        mine = slice(ranges[rank].start - 1, ranges[rank].stop - 1)
        own += ahead_of[mine.start]
        if split and s.virtual_stages == 1 and rank < stages - 1:
            waits = loss(*sl.least) + sum(there_and_back[mine.stop :])
            own += max(0.0, waits - (stages - 1 - rank) * sum(longest[mine]))
        best = max(best, own)
    return best


def evaluate(problem: Problem, s: Strategy, *, exact_order: bool = False) -> Plan:
    """The whole plan. `exact_order`: microbatches in the order that the loader would choose."""
    model, c, layout = problem.model, problem.cluster, s.layout
    if exact_order:
        sl = ordered_sizes(problem, s)
    else:
        sl = batch_sizes(model, problem.batch, layout.dp, s.microbatches, layout.tp)
    played, costs = play(problem, s, sl)
    layer = cost.layer_cost(model, c, s)

    # The busiest rank's time by part; what remains of the makespan is idle.
    rank = int(np.argmax(played.busy))
    parts: dict[str, float] = {}
    split = splits(s.schedule)
    for v in range(rank, s.depth, layout.pp):
        actions = (2 + split) * s.microbatches
        parts["overhead"] = parts.get("overhead", 0.0) + actions * c.action_overhead
        for number, count, again in s.kinds_of_layers(model, v):
            one = cost.layer_cost(model, c, s, number)
            for name in one.forward:
                back = one.backward[name]
                if split:
                    back = one.through[name] + one.weights.get(name, cost.Affine())
                time = count * (one.forward[name] + back)(sl.tokens, sl.squares)
                parts[name] = parts.get(name, 0.0) + float(time.mean(0).sum())
                redone = again * one.again[name](sl.tokens, sl.squares)
                mean = float(redone.mean(0).sum())
                parts["recomputation"] = parts.get("recomputation", 0.0) + mean
        if v == s.depth - 1:
            loss = cost.loss_cost(model, c, s)(sl.tokens, sl.squares)
            parts["head and loss"] = float(loss.mean(0).sum())
    if in_pairs(s.schedule):  # what pairs hide, nobody waits for
        alone = sum(float(x.sum()) for (v, _), x in costs.items() if v % layout.pp == rank)
        hidden = alone - played.busy[rank]
        parts[cost.EXCHANGE] = max(0.0, parts[cost.EXCHANGE] - hidden)
    parts["waiting"] = max(0.0, played.makespan - sum(parts.values()))
    parts |= cost.update_seconds(model, c, s)

    tokens, squares = float(sl.tokens.sum()), float(sl.squares.sum())
    batch = problem.batch
    useful = 3.0 * cost.forward_flops(model, batch.tokens, batch.squares)
    redone = sum(
        again * cost.layer_flops(model, tokens, squares, number)
        for v in range(s.depth)
        for number, _, again in s.kinds_of_layers(model, v)
    )
    done = 3.0 * cost.forward_flops(model, tokens, squares) + redone
    mean = float(sl.tokens.mean())
    return Plan(
        problem=problem,
        strategy=s,
        flush=played.makespan,
        parts=parts,
        layer_seconds=float(layer.total.forward(sl.tokens, sl.squares).mean()),
        mean_tokens=mean,
        largest_tokens=sl.largest,
        bubble=float(np.mean(played.bubble)),
        sequences=len(batch.lengths),
        tokens=batch.tokens,
        model_flops=useful / layout.world,
        hardware_flops=done / layout.world,
        peak_flops=c.flops,
    )


def ordered_sizes(problem: Problem, s: Strategy) -> BatchSizes:
    """Microbatches in the order that the loader would choose."""
    layout, batch = s.layout, problem.batch
    run = simulator(s.schedule, layout.pp, s.microbatches, s.virtual_stages)
    ordered = plan_batch(
        batch.lengths,
        s.microbatches,
        dp=layout.dp,
        align=layout.tp,
        policy=batch.policy,
        cost=sequence_cost(problem.model),
        makespan=lambda costs: run.makespan(costs, [2.0 * x for x in costs]),
    )
    return _sizes_of(batch, ordered, layout.tp)


def timeline(problem: Problem, s: Strategy) -> Timeline:
    """The flush's actions, as the loader would order its microbatches."""
    return play(problem, s, ordered_sizes(problem, s))[0]
