"""Which sequences share a microbatch, and in which order the microbatches go down the pipeline.

The lengths of a step are known on every rank, so every rank computes the same plan and knows every
shape of the step without a message. A pipeline wants microbatches of equal cost, not of equal
sequence lengths: `packed` lays sequences end to end without padding and balances the sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moekernels.data.shuffle import random_bits
from moekernels.errors import UsageError

try:
    from moekernels._host import karmarkar_karp as _compiled
except ImportError:  # a checkout that is not built, or not built again
    _compiled = None

T = TypeVar("T")
POLICIES = ("packed", "buckets", "padded")
Groups = list[list[int]]


@dataclass(frozen=True)
class Cost:
    """What a sequence of s tokens costs: linear*s (matrix products) + quadratic*s^2 (attention)."""

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        if self.linear < 0 or self.quadratic < 0 or self.linear + self.quadratic <= 0:
            raise UsageError(
                f"batch: cost coefficients {self.linear} and {self.quadratic}; "
                "use none below 0 and one above 0"
            )

    @staticmethod
    def of_transformer(active_parameters: int, num_layers: int, attention_width: int) -> Cost:
        """Forward FLOPs; attention_width = heads * head_dim, and causal attention does half."""
        return Cost(2.0 * active_parameters, 2.0 * num_layers * attention_width)

    def __call__(self, length: int) -> float:
        return self.linear * length + self.quadratic * length * length


@dataclass(frozen=True)
class BatchPlan:
    """`groups[d][m]`: the sequences of microbatch m on data-parallel rank d.

    Microbatches m of all ranks cost about the same and run at the same time, so ranks that
    exchange tokens between experts do not wait for each other.
    """

    groups: list[list[list[int]]]
    rows: list[list[int]]  # [d][m]: T, padding and alignment included
    costs: list[list[float]]  # [d][m]: padding counts, for it is computed
    pad_to: list[list[int | None]]  # [d][m]: the length of every segment, None where packed

    @property
    def imbalance(self) -> float:
        """Largest cost over mean cost; 1 is perfect."""
        costs = [cost for rank in self.costs for cost in rank]
        return max(costs) * len(costs) / sum(costs)


def plan_batch(
    lengths: Sequence[int],
    microbatches: int,
    *,
    dp: int = 1,
    align: int = 1,
    policy: str = "packed",
    cost: Cost | None = None,
    max_tokens: int | None = None,
    makespan: Callable[[list[float]], float] | None = None,
) -> BatchPlan:
    """Lengths of a step's sequences -> dp x microbatches groups, every sequence in exactly one.

    policy: `packed` (Karmarkar-Karp on cost, no padding), `buckets` (sorted by length, padded to
    the longest of the microbatch) or `padded` (in the given order, padded likewise).
    align: rows of a microbatch become a multiple of it (the tensor-parallel size).
    max_tokens: the largest number of rows of a microbatch that memory allows.
    makespan: time of a pipeline flush given the microbatches' costs in order; chooses their order
    (`pipeline.simulate.Simulator(schedule).makespan` over forward and backward costs).
    """
    cost = cost or Cost()
    lengths = [int(n) for n in lengths]
    check(lengths, microbatches, dp, align, policy)
    parts = dp * microbatches
    if policy == "packed":
        groups = _packed(lengths, parts, align, cost, max_tokens)
    else:
        order = list(range(len(lengths)))
        if policy == "buckets":
            order.sort(key=lambda i: (-lengths[i], i))
        bounds = [len(lengths) * g // parts for g in range(parts + 1)]
        groups = [order[a:b] for a, b in zip(bounds, bounds[1:])]

    pads = [None if policy == "packed" else max(lengths[i] for i in group) for group in groups]
    segments = [
        [lengths[i] if pad is None else pad for i in group] for group, pad in zip(groups, pads)
    ]
    rows = [_align(sum(sizes), align) for sizes in segments]
    if max_tokens is not None and max(rows) > max_tokens:
        raise UsageError(_too_large(lengths, microbatches, align, policy, max_tokens, max(rows)))
    costs = [sum(map(cost, sizes)) for sizes in segments]

    rounds = _rounds(costs, microbatches, dp, by_cost=policy == "packed")
    if policy != "padded":
        rounds = order_rounds(
            rounds, [max(costs[g] for g in round_) for round_ in rounds], makespan
        )

    def deal(values: list[T]) -> list[list[T]]:
        return [[values[round_[d]] for round_ in rounds] for d in range(dp)]

    return BatchPlan(groups=deal(groups), rows=deal(rows), costs=deal(costs), pad_to=deal(pads))


def check(lengths: list[int], microbatches: int, dp: int, align: int, policy: str) -> None:
    """UsageError where there is no plan, whatever the costs."""
    for name, value in (("microbatches", microbatches), ("dp", dp), ("align", align)):
        if value < 1:
            raise UsageError(f"batch: {name} is {value}; use at least 1")
    if policy not in POLICIES:
        raise UsageError(f"batch: policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
    if len(lengths) < dp * microbatches:
        split = f"{dp} data-parallel ranks x {microbatches}" if dp > 1 else f"{microbatches}"
        fewer = f", or at most {len(lengths) // dp} microbatches" if len(lengths) >= dp else ""
        raise UsageError(
            f"batch: {len(lengths)} sequences cannot fill {split} microbatches; "
            f"use at least {dp * microbatches} sequences{fewer}"
        )
    if min(lengths) < 1:
        raise UsageError(f"batch: a sequence of {min(lengths)} tokens; use at least 1")


def _too_large(
    lengths: list[int], microbatches: int, align: int, policy: str, max_tokens: int, most: int
) -> str:
    if (longest := _align(max(lengths), align)) > max_tokens:
        fault = f"a sequence of {longest} tokens"
        remedy = f"sequences of at most {max_tokens // align * align}"
    else:
        fault = f"a microbatch of {most} tokens ({policy})"
        remedy = f"more microbatches than {microbatches}, fewer sequences than {len(lengths)}"
    return (
        f"batch: {fault} exceeds the limit of {max_tokens} per microbatch; use {remedy}, "
        f"or a limit of at least {most}"
    )


def _align(n: int, align: int) -> int:
    return -(-n // align) * align


# --- partitions of equal cost


def _packed(
    lengths: list[int], parts: int, align: int, cost: Cost, max_tokens: int | None
) -> Groups:
    """The better of Karmarkar-Karp and greedy; under a token limit the first that keeps to it."""
    costs = [cost(n) for n in lengths]

    def load(groups: Groups) -> float:
        return max(sum(costs[i] for i in group) for group in groups)

    def tokens(groups: Groups) -> int:
        return max(sum(lengths[i] for i in group) for group in groups)

    best = min(karmarkar_karp(costs, parts), greedy(costs, parts), key=load)
    if max_tokens is None or _align(tokens(best), align) <= max_tokens:
        return best
    limited = greedy_within(costs, parts, lengths, max_tokens // align * align)
    if limited is None:  # cost put too many short sequences together: balance tokens instead
        return min(karmarkar_karp(lengths, parts), greedy(lengths, parts), key=tokens)
    return limited


def greedy(costs: Sequence[float], parts: int) -> Groups:
    """Longest processing time first: each item to the cheapest part so far."""
    groups: Groups = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, part = heap[0]
        groups[part].append(item)
        heapq.heapreplace(heap, (total + costs[item], part))
    return [sorted(group) for group in groups]


def greedy_within(
    costs: Sequence[float], parts: int, sizes: Sequence[int], room: int
) -> Groups | None:
    """The same, each item to the cheapest part that has room for its size; None where none has."""
    groups: Groups = [[] for _ in range(parts)]
    used = [0] * parts
    heap = [(0.0, part) for part in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and used[heap[0][1]] + sizes[item] > room:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        total, part = heapq.heappop(heap)
        groups[part].append(item)
        used[part] += sizes[item]
        heapq.heappush(heap, (total + costs[item], part))
        for entry in full:
            heapq.heappush(heap, entry)
    return [sorted(group) for group in groups]


def karmarkar_karp(costs: Sequence[float], parts: int) -> Groups:
    """Largest differencing: merge the two most uneven partial partitions, heavy sides to light.

    With at least as many items as parts no part is empty.
    """
    return (_compiled or _karmarkar_karp)(costs, parts)


def _karmarkar_karp(costs: Sequence[float], parts: int) -> Groups:
    """What `csrc/host/partition.cpp` computes, 10 times slower, and equal to it in every tie."""
    # A partial partition: its non-empty parts' sums in falling order with the items behind each.
    heap: list[tuple[float, int, list[tuple[float, tuple[int, ...]]]]] = [
        (-float(value), item, [(float(value), (item,))]) for item, value in enumerate(costs)
    ]
    heapq.heapify(heap)
    tie = len(costs)
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        free = parts - len(b)  # the parts of a that meet an empty part of b
        met = max(len(a) - free, 0)
        merged = a[:free]
        merged += [(x + y, i + j) for (x, i), (y, j) in zip(a[free:], reversed(b))]
        merged += reversed(b[: len(b) - met])
        merged.sort(key=lambda part: -part[0])
        lightest = merged[-1][0] if len(merged) == parts else 0.0
        heapq.heappush(heap, (lightest - merged[0][0], tie, merged))
        tie += 1
    groups = [sorted(items) for _, items in heap[0][2]]
    return groups + [[] for _ in range(parts - len(groups))]


# --- order


def _rounds(costs: list[float], microbatches: int, dp: int, by_cost: bool) -> list[list[int]]:
    """[microbatches][dp] groups: the dp groups that run at the same time on different ranks."""
    order = list(range(len(costs)))
    if by_cost:
        order.sort(key=lambda g: (-costs[g], g))
    rounds = [order[m * dp : (m + 1) * dp] for m in range(microbatches)]
    if by_cost:  # every other round reversed, so that no rank gets the heaviest of each
        rounds = [round_[::-1] if m % 2 else round_ for m, round_ in enumerate(rounds)]
    return rounds


def order_rounds(
    rounds: list[T],
    costs: Sequence[float],
    makespan: Callable[[list[float]], float] | None,
    tries: int = 400,
) -> list[T]:
    """The largest in the middle of the flush; then hill climbing by swaps on the simulation.

    It ends within 0.1 % of a flush of equal costs: there no order is worth looking for.
    """
    rising = sorted(range(len(rounds)), key=lambda m: (costs[m], m))
    order = rising[0::2] + rising[1::2][::-1]
    if makespan is None or costs[rising[0]] == costs[rising[-1]]:
        return [rounds[m] for m in order]

    def time(candidate: list[int]) -> float:
        return makespan([costs[m] for m in candidate])

    enough = 1.001 * makespan([sum(costs) / len(costs)] * len(costs))
    best = time(order)
    draws = random_bits(0, len(rounds), 2 * tries) % len(rounds)
    for i, j in zip(draws[0::2].tolist(), draws[1::2].tolist()):
        if best <= enough:
            break
        if costs[order[i]] == costs[order[j]]:
            continue
        order[i], order[j] = order[j], order[i]
        if (now := time(order)) < best:
            best = now
        else:
            order[i], order[j] = order[j], order[i]
    return [rounds[m] for m in order]
