"""What a specification claims, against what can be.

A verdict is about the document's own strategy: its layout on its cards, played and counted. A
contradiction is harder: a smallest set of claims that nothing satisfies together, whatever the
reading of the dimensions, the layout, the number of microbatches and the efficiency up to 100 % of
the cards' FLOP/s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekernels.audit.document import readings
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout, divisors
from moekernels.plan import cost
from moekernels.plan.evaluate import Plan, Problem, evaluate, memory_of
from moekernels.plan.search import fit
from moekernels.plan.strategy import Strategy, ranges_text
from moekernels.run.sections import ClaimsSection

Claimed = float | list[float]  # a figure, or from the one to the other
NEAR = 0.05  # a claim of a size holds within this part of it


@dataclass(frozen=True)
class Verdict:
    name: str
    claimed: str
    verdict: str  # holds | fails
    instead: str


@dataclass(frozen=True)
class Contradiction:
    claims: tuple[str, ...]
    repair: str  # the smallest single change
    repairs: tuple[str, ...]  # of each claim in turn, where one alone suffices


UNITS = {
    "parameters": "parameters",
    "gpus": "cards",
    "tp": "TP",
    "pp": "PP",
    "ep": "EP",
    "experts_per_gpu": "experts per card",
    "modules_per_gpu": "expert modules per card",
    "memory_gb": "GB per card",
    "layer_ms": "ms per layer",
    "sequences_per_second": "sequences/s",
    "mfu": "MFU",
}


def text_of(name: str, value: Claimed) -> str:
    """A value with its unit: 30 B parameters, 55-65 % MFU, 8 cards."""
    if isinstance(value, list):
        low, high = value
        if name == "mfu":
            return f"{100 * low:.0f}-{100 * high:.0f} % MFU"
        return f"{low:g}-{high:g} {UNITS[name]}"
    if name == "parameters":
        return f"{value / 1e9:.3g} B parameters"
    if name == "mfu":
        return f"{100 * value:.0f} % MFU"
    if name in ("tp", "pp", "ep"):
        return f"{UNITS[name]}{value:g}"
    return f"{value:.3g} {UNITS[name]}" if isinstance(value, float) else f"{value} {UNITS[name]}"


def said(claims: ClaimsSection) -> dict[str, Claimed]:
    """The claims of a figure that were made, by name."""
    return {name: value for name in UNITS if (value := getattr(claims, name))}


def check(value: float, claimed: Claimed) -> bool:
    if isinstance(claimed, list):
        return claimed[0] <= value <= claimed[1]
    return abs(value - claimed) <= NEAR * claimed


def _sizes(model: DecoderSpec, layout: Layout) -> dict[str, float]:
    """The claims that a layout alone decides."""
    local = model.num_experts / layout.ep
    return {
        "gpus": layout.world,
        "tp": layout.tp,
        "pp": layout.pp,
        "ep": layout.ep,
        "experts_per_gpu": local,
        "modules_per_gpu": local * model.num_layers / layout.pp,
    }


def verdicts(
    problem: Problem,
    claims: ClaimsSection,
    own: Plan,
    best: Plan,
    unfolded: int = 0,
) -> list[Verdict]:
    """Each claim, judged on the document's own strategy `own`; `best` is the recommended plan.

    `unfolded`: the microbatches of one accumulation step, where a flush holds several steps'."""
    model, layout = problem.model, own.strategy.layout
    values: dict[str, float] = {
        "parameters": float(model.parameters_count()),
        **_sizes(model, layout),
        "memory_gb": own.memory / 1e9,
        "layer_ms": own.layer_seconds * 1e3,
        "sequences_per_second": own.sequences_per_second,
        "mfu": own.mfu,
    }
    recommended = {
        "memory_gb": best.memory / 1e9,
        "layer_ms": best.layer_seconds * 1e3,
        "sequences_per_second": best.sequences_per_second,
        "mfu": best.mfu,
    }
    found = []
    for name, claimed in said(claims).items():
        holds = check(values[name], claimed)
        instead = text_of(name, _tidy(values[name]))
        if name in recommended and best.strategy != own.strategy:
            instead += f" ({text_of(name, _tidy(recommended[name]))} as recommended)"
        if name == "layer_ms":
            instead += f", forward, microbatches of {own.mean_tokens / 1e3:.1f} k tokens"
            if 0 < unfolded < own.strategy.microbatches:
                coarse = evaluate(problem, replace(own.strategy, microbatches=unfolded))
                instead += f"; {1e3 * coarse.layer_seconds:.1f} ms at {unfolded} microbatches"
        found.append(Verdict(name, text_of(name, claimed), "holds" if holds else "fails", instead))
    if claims.checkpoint_layers:
        found.append(_checkpoints(problem, own.strategy, claims.checkpoint_layers))
    return found


def _tidy(value: float) -> float | int:
    return int(value) if value == int(value) and value < 1e6 else float(value)


def _checkpoints(problem: Problem, s: Strategy, claimed: str) -> Verdict:
    """A set holds if it is what as few as fit come to."""
    fitted = fit(problem, replace(s, checkpointed=(0,) * s.depth))
    name, text = "checkpoint_layers", f"layers {claimed}"
    if isinstance(fitted, float):
        return Verdict(name, text, "fails", f"no set fits: {fitted / 1e9:.1f} GB over")
    best = ranges_text(fitted.checkpoint_layers)
    same = best.replace(" ", "") == claimed.replace(" ", "")
    return Verdict(name, text, "holds" if same else "fails", f"layers {best}: as few as fit")


# --- contradictions


@dataclass(frozen=True)
class Point:
    """A world that could be: values by claim's name."""

    values: dict[str, float]


def _layouts(claims: ClaimsSection, model: DecoderSpec) -> Iterator[Layout]:
    base = claims.gpus or 8
    for world in (base << i for i in range(6)):
        for tp in sorted({1, claims.tp or 1}):
            for pp in sorted({1, claims.pp or 1}):
                if world % (tp * pp) or model.num_layers % pp:
                    continue
                stage = world // pp
                for ep in divisors(stage):
                    if model.num_experts % ep == 0:
                        yield Layout(tp, stage // tp, pp, ep)


def points(problem: Problem, claims: ClaimsSection, microbatches: set[int]) -> list[Point]:
    """Every reading, layout, number of microbatches and utilisation that tells claims apart."""
    lengths = problem.batch.lengths
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    found = []
    for reading in readings(problem):
        model = reading.model
        whole = cost.forward_flops(model, tokens, squares)
        layer = cost.layer_flops(model, tokens, squares)
        for layout, m in itertools.product(_layouts(claims, model), sorted(microbatches)):
            s = Strategy(
                layout,
                (model.num_layers // layout.pp,) * layout.pp,
                (model.num_layers // layout.pp,) * layout.pp,
                m,
                optimizer_state="bf16",
            )
            least = replace(problem, model=model)
            mean = math.ceil(tokens / (layout.dp * m))
            rate = layout.world * problem.cluster.flops
            filled = m / (m + layout.pp - 1)  # no utilisation is above it
            fixed = {
                "parameters": float(reading.parameters),
                **_sizes(model, layout),
            }
            if claims.memory_gb:
                fixed["memory_gb"] = memory_of(least, s, 0, mean).total / 1e9
            per_second = len(lengths) * rate / (3 * whole)  # at full utilisation
            millis = 1e3 * layer / m / (layout.stage_ranks * problem.cluster.flops) * filled
            edges = {filled}
            edges |= set(claims.mfu)
            edges |= {edge / per_second for edge in claims.sequences_per_second}
            edges |= {millis / edge for edge in claims.layer_ms}
            for mfu in sorted(e for e in edges if 0 < e <= filled):
                found.append(
                    Point(
                        fixed
                        | {
                            "mfu": mfu,
                            "sequences_per_second": per_second * mfu,
                            "layer_ms": millis / mfu,
                        }
                    )
                )
    return found


def satisfies(point: Point, name: str, claimed: Claimed) -> bool:
    value = point.values[name]
    if isinstance(claimed, list):
        if name == "sequences_per_second":
            return value >= claimed[0] * (1 - 1e-9)
        return claimed[0] * (1 - 1e-9) <= value <= claimed[1] * (1 + 1e-9)
    if name == "memory_gb":  # the least that training takes: no more than claimed
        return value <= claimed * (1 + NEAR)
    return check(value, claimed)


def contradictions(
    problem: Problem, claims: ClaimsSection, microbatches: set[int]
) -> list[Contradiction]:
    """The smallest sets of claims that no point satisfies, smallest first, with their repairs."""
    wanted = said(claims)
    if wanted.get("ep") and wanted.get("experts_per_gpu") == problem.model.num_experts / claims.ep:
        wanted.pop("ep")  # the same claim in other words
    names = list(wanted)
    where: dict[int, list[Point]] = {}
    for point in points(problem, claims, microbatches):
        mask = sum(1 << i for i, n in enumerate(names) if satisfies(point, n, wanted[n]))
        where.setdefault(mask, []).append(point)
    minimal: list[int] = []
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            mask = sum(1 << i for i in chosen)
            if any(mask & known == known for known in minimal):
                continue
            if not any(mask & have == mask for have in where):
                minimal.append(mask)
    found = []
    for mask in minimal:
        inside = [n for i, n in enumerate(names) if mask >> i & 1]
        changes = []
        for name in inside:
            others = mask & ~(1 << names.index(name))
            nearest = _nearest(
                [p for have, ps in where.items() if have & others == others for p in ps],
                name,
                wanted[name],
            )
            if nearest is not None:
                changes.append((nearest[0], f"{text_of(name, _tidy(nearest[1]))}"))
        changes.sort()
        texts = tuple(text for _, text in changes)
        claimed = tuple(text_of(n, wanted[n]) for n in inside)
        found.append(Contradiction(claimed, texts[0] if texts else "no single change", texts))
    return found


def _nearest(points_: list[Point], name: str, claimed: Claimed) -> tuple[float, float] | None:
    """(how far, value) of the value nearest to the claim, by ratio."""
    bounds = claimed if isinstance(claimed, list) else [claimed]
    best = None
    for value in {p.values[name] for p in points_}:
        off = min(abs(math.log(value / bound)) for bound in bounds)
        if best is None or off < best[0]:
            best = (off, value)
    return best
