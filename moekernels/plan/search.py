"""The best strategy, and why not the others.

For every number of cards that divides the cluster, branch and bound over (tp, ep, etp, dp, pp,
schedule, virtual stages, microbatches, layers per stage, dispatcher, optimiser state): a bound
from below on each candidate's step orders them, and they are played on their schedules until no
bound is below the best. A stage checkpoints as few layers as fit: more never make it faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moekernels.errors import UsageError
from moekernels.model.layout import divisors
from moekernels.plan import cost
from moekernels.plan.candidates import Space, candidates
from moekernels.plan.evaluate import Plan, Problem, batch_sizes, evaluate, lower_bound, memory_of
from moekernels.plan.memory import host_bytes
from moekernels.plan.strategy import Strategy

# Of the moments. Narrow ones are tried where the wide ones do not fit without recomputation, and
# taken where that is faster; that they are a few per cent less traffic is no reason alone.
MOMENT_DTYPES = ("fp32", "bf16")
SHARES = tuple(n / 10 for n in range(11))  # of the optimiser's state, in the host's memory
# In the schedules of all candidates. A search takes its time from them: 81 million took 20 s.
MOST_PASSES = 1 << 27


@dataclass
class Rejection:
    """Why a class of candidates is not the recommended one."""

    what: str
    reason: str


@dataclass
class Seen:
    """What a search has looked at; of a class of candidates a figure, and whether that is the bytes
    by which it is over the memory or the seconds of its step."""

    considered: int = 0
    played: int = 0
    classes: dict[str, tuple[float, str]] = field(default_factory=dict)


@dataclass
class Result:
    best: Plan
    pareto: list[Plan]
    rejected: list[Rejection]
    considered: int
    played: int


def fit(problem: Problem, s: Strategy, *, everything: bool = False) -> Strategy | float:
    """`s` with as few checkpointed layers as its stages need, or the bytes by which it is over."""
    c = problem.cluster
    room = c.memory - c.reserve
    largest = batch_sizes(
        problem.model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp
    ).largest
    chosen = list(s.layers) if everything else [0] * s.depth
    over = 0.0
    for rank in range(s.layout.pp):
        mine = range(rank, s.depth, s.layout.pp)
        total = sum(s.layers[v] for v in mine)

        def needs(count: int, mine=mine, rank=rank, total=total) -> float:
            spread = list(chosen)
            for v in mine:  # the first chunks keep theirs longest
                spread[v] = min(count, s.layers[v])
                count -= spread[v]
            again = tuple(spread)
            trial = s if again == s.checkpointed else replace(s, checkpointed=again)
            chosen[:] = spread
            return memory_of(problem, trial, rank, largest).total

        if everything:
            over = max(over, needs(total) - room)
            continue
        if needs(0) <= room:
            continue
        low, high = 0, total
        if (most := needs(total)) > room:
            over = max(over, most - room)
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if needs(middle) <= room else (middle, high)
        needs(high)
    return over if over > 0 else replace(s, checkpointed=tuple(chosen))


def search(problem: Problem, space: Space | None = None) -> Result:
    """The fastest plan, the Pareto list of (step, memory, cards), and why not the others."""
    space = space or Space()
    seen = Seen()
    found: list[Plan] = []
    least: tuple[float, str] | None = None
    worlds = divisors(problem.cluster.gpus) if space.gpus is None else [space.gpus]
    c = problem.cluster
    if space.dispatcher == "hierarchical" and max(worlds) <= c.gpus_per_node:
        raise UsageError(
            f"plan: --dispatcher hierarchical is one of several nodes, and {max(worlds)} cards are "
            f"of one with {c.gpus_per_node}; give all_to_all, or more --gpus"
        )
    tried = {world: list(candidates(problem, world, space)) for world in worlds}
    passes = sum(len(s.layers) * s.microbatches for each in tried.values() for s in each)
    if passes > MOST_PASSES:
        raise UsageError(_endless(problem, passes))
    for world in sorted(worlds, reverse=True):
        best = _best_of(problem, world, tried[world], space, seen)
        if isinstance(best, Plan):
            found.append(best)
            lean = _leanest_of(problem, best)
            if lean is not None:
                found.append(lean)
        elif best is not None and (least is None or best[0] < least[0]):
            least = best
    lends = problem.cluster.host_memory and problem.optimizer != "muon"
    if least is not None and not found and not space.shares and lends:
        return search(problem, replace(space, shares=SHARES))
    if not found:
        raise UsageError(_infeasible(problem, least, space, seen.considered))
    objective = problem.objective
    if objective.best in ("memory", "latency"):
        if (special := _best_by(problem, tried, space)) is not None:
            found.append(special)
    enough = [p for p in found if p.sequences_per_second >= objective.at_least]
    if not enough:
        fastest = max(p.sequences_per_second for p in found)
        raise UsageError(
            f"plan: nothing on {problem.cluster.gpus} cards reaches {objective.at_least:g} "
            f"sequences/s: the fastest plan has {fastest:.1f}; ask for no more than that, "
            "or use more cards"
        )
    chosen = min(enough, key=RANKING[objective.best])
    return Result(
        chosen,
        pareto(found, latency=objective.best == "latency"),
        _reasons(chosen, seen),
        seen.considered,
        seen.played,
    )


def _best_of(
    problem: Problem, world: int, tried: list[Strategy], space: Space, seen: Seen
) -> Plan | tuple[float, str] | None:
    """The fastest plan of those tried on `world` cards; or (bytes over, what) of what comes nearest
    to fitting; None where no layout exists."""
    bounded: list[tuple[float, int, Strategy]] = []
    for s in tried:
        sl = batch_sizes(problem.model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp)
        bounded.append((lower_bound(problem, s, sl), len(bounded), s))
    seen.considered += len(bounded)
    bounded.sort(key=lambda entry: entry[:2])
    best: Plan | None = None
    behind: dict[tuple, float] = {}
    nearest: tuple[float, str] | None = None
    for bound, _, s in bounded:
        key = f"{world}: {_class(s)}"
        if best is not None and bound >= best.step:
            seen.classes.setdefault(key, (bound, "slower"))
            continue
        for state in MOMENT_DTYPES:
            if not space.allows("optimizer_state", state):
                continue
            again, share = True, 0.0
            kept = replace(s, optimizer_state=state)
            for share in _shares(problem, kept, space):
                trial = replace(kept, offload_optimizer=share)
                if _loses(problem, bound, trial, best, behind):
                    seen.classes.setdefault(key, (bound, "slower"))
                    break
                fitted = fit(problem, trial)
                if isinstance(fitted, float):
                    if nearest is None or fitted < nearest[0]:
                        nearest = (fitted, _class(s) + _away(share))
                    over, kind = seen.classes.get(key, (float("inf"), "memory"))
                    if kind != "slower":
                        seen.classes[key] = (min(over, fitted), "memory")
                    continue
                plan = evaluate(problem, fitted)
                seen.played += 1
                known = seen.classes.get(key)
                if known is None or known[1] == "memory" or plan.step < known[0]:
                    seen.classes[key] = (plan.step, "slower")
                if best is None or plan.step < best.step:
                    best = plan
                again = any(fitted.checkpointed)
                if not again:
                    break  # more room would be of no use
            if not again and not share:
                break  # narrower moments would free nothing that is needed
    return best or nearest


def _shares(problem: Problem, s: Strategy, space: Space) -> list[float]:
    """Of the optimiser's state in the host's memory, to be tried: none for which a node has no
    memory, and the most alone where even that does not fit the cards."""
    asked, found = space.shares or SHARES[:1], [0.0]
    if asked != (0.0,):
        whole, cards = (
            replace(s, offload_optimizer=1.0),
            min(s.layout.world, problem.cluster.gpus_per_node),
        )
        most = max(host_bytes(problem.model, whole, rank) for rank in range(s.layout.pp))
        found = [share for share in asked if share * most * cards <= problem.cluster.host_memory]
    if len(found) > 1 and isinstance(fit(problem, replace(s, offload_optimizer=found[-1])), float):
        return found[-1:]
    return found


def _away(share: float) -> str:
    return f" with {100 * share:g} % of its state on the host," if share else ""


def _loses(
    problem: Problem, flush: float, s: Strategy, best: Plan | None, known: dict[tuple, float]
) -> bool:
    """Whether `s` is slower for certain: no flush of it is shorter than that. `known`: what comes
    behind the flush, which most candidates of a search share."""
    if best is None:
        return False
    key = s.layout, s.layers, s.optimizer_state, s.offload_optimizer, s.replicas
    if key not in known:
        known[key] = sum(cost.update_seconds(problem.model, problem.cluster, s).values())
    return flush + known[key] >= best.step


def _leanest_of(problem: Problem, best: Plan) -> Plan | None:
    """The same layout with everything checkpointed and the narrow moments."""
    s = replace(best.strategy, optimizer_state="bf16")
    fitted = fit(problem, s, everything=True)
    return evaluate(problem, fitted) if isinstance(fitted, Strategy) else None


def _best_by(problem: Problem, tried: dict[int, list[Strategy]], space: Space) -> Plan | None:
    """The plan with the least memory or the shortest layer that is fast enough; candidates in the
    order of a bound from below, until none can be better."""
    objective, memory = problem.objective, problem.objective.best == "memory"
    state = "bf16" if memory and space.allows("optimizer_state", "bf16") else MOMENT_DTYPES[0]
    bounded: list[tuple[float, int, Strategy]] = []
    for world in sorted(tried, reverse=True):
        for s in tried[world]:
            s = replace(s, optimizer_state=space.optimizer_state or state)
            sl = batch_sizes(problem.model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp)
            if memory:
                s = replace(s, checkpointed=s.layers)
                least = replace(s, offload_optimizer=max(space.shares, default=0.0))
                bound = memory_of(problem, least, 0, sl.largest).total
            else:
                layer = cost.layer_cost(problem.model, problem.cluster, s)
                bound = float(layer.total.forward(sl.tokens, sl.squares).mean())
            bounded.append((bound, len(bounded), s))
    best: Plan | None = None
    for bound, _, s in sorted(bounded, key=lambda entry: entry[:2]):
        if best is not None and bound >= (best.memory if memory else best.layer_seconds):
            break
        for state in MOMENT_DTYPES if not memory else (s.optimizer_state,):
            if not space.allows("optimizer_state", state):
                continue
            kept = replace(s, optimizer_state=state)
            for share in sorted(_shares(problem, kept, space), reverse=memory):
                trial = replace(kept, offload_optimizer=share)
                fitted = fit(problem, trial, everything=memory)
                if isinstance(fitted, float):
                    continue
                plan = evaluate(problem, fitted)
                if plan.sequences_per_second >= objective.at_least:
                    if best is None or RANKING[objective.best](plan) < RANKING[objective.best](
                        best
                    ):
                        best = plan
                    break
    return best


RANKING: dict[str, Callable[[Plan], tuple[float, ...]]] = {
    "throughput": lambda p: (p.step, p.gpus, p.memory),
    "latency": lambda p: (p.layer_seconds, p.step, p.gpus),
    "cost": lambda p: (p.step * p.gpus, p.step, p.memory),
    "gpus": lambda p: (p.gpus, p.step, p.memory),
    "memory": lambda p: (p.memory, p.step, p.gpus),
}


def pareto(plans: list[Plan], *, latency: bool = False) -> list[Plan]:
    """Those that no other beats in step, memory and cards alike (and, with `latency`, the time of a
    layer), fastest first."""

    def key(p: Plan) -> tuple[float, ...]:
        return p.step, p.memory, p.gpus, *([p.layer_seconds] if latency else [])

    kept = [
        p
        for p in plans
        if not any(all(a <= b for a, b in zip(key(q), key(p))) and key(q) != key(p) for q in plans)
    ]
    return sorted(kept, key=key)


def _class(s: Strategy) -> str:
    layout = s.layout
    return f"TP{layout.tp} DP{layout.dp} PP{layout.pp} EP{layout.ep}" + (
        f" ETP{layout.etp}" if layout.etp > 1 else ""
    )


def _reasons(best: Plan, seen: Seen) -> list[Rejection]:
    rejected: list[tuple[float, Rejection]] = []
    own = f"{best.gpus}: {_class(best.strategy)}"
    prefix = f"{best.gpus}: "
    for key, (value, kind) in seen.classes.items():
        if key == own or not key.startswith(prefix):
            continue
        what = key.removeprefix(prefix)
        if kind == "memory":
            reason = f"{value / 1e9:.1f} GB over a card's memory with every layer checkpointed"
            rejected.append((float("inf"), Rejection(what, reason)))
        else:
            rejected.append((value, Rejection(what, f"{value / best.step:.2f}x the step or more")))
    rejected.sort(key=lambda entry: entry[0])
    return [entry[1] for entry in rejected]


def _endless(problem: Problem, passes: int) -> str:
    return (
        f"plan: {len(problem.batch.lengths)} sequences and {problem.model.num_layers} layers on "
        f"{problem.cluster.gpus} cards have schedules of {passes} forward passes to search, more "
        f"than {MOST_PASSES}; give --dp, --pp or --microbatches, or fewer sequences or layers"
    )


def _infeasible(
    problem: Problem, nearest: tuple[float, str] | None, space: Space, considered: int
) -> str:
    c = problem.cluster
    if nearest is None and considered:
        return (
            f"plan: a node's {c.host_memory / 1e9:g} GB do not hold {space.shares[-1]:g} of the "
            f"optimizer's state of its cards; use a smaller --offload-optimizer, or a larger "
            f"host_gb of [hardware]"
        )
    if nearest is None:
        return (
            f"plan: no layout of {c.gpus} cards divides the model's {problem.model.num_heads} "
            f"heads, {problem.model.num_layers} layers and {problem.model.num_experts} experts; "
            "use fewer constraints, or a power of two of cards"
        )
    over, what = nearest
    return (
        f"plan: nothing fits {c.gpus} cards of {c.memory / 1e9:g} GB ({c.reserve / 1e9:g} GB "
        f"reserved): memory binds, and the nearest, {what} with every layer checkpointed and bf16 "
        f"moments, is over by {over / 1e9:.1f} GB; use cards of "
        f"{(c.memory + over) / 1e9:.1f} GB, or more of them"
    )
