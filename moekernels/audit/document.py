"""The tables behind a document's claims: readings of its dimensions, of its layout, of its memory,
of its checkpointed layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.experts import ACTIVATIONS, one_expert
from moekernels.model.layout import Layout
from moekernels.pipeline.build import in_pairs, offered
from moekernels.plan import cost
from moekernels.plan.candidates import splits
from moekernels.plan.evaluate import Plan, Problem, batch_sizes, evaluate, memory_of
from moekernels.plan.search import SHARES, fit
from moekernels.plan.strategy import Strategy, ranges_text

# bytes per parameter, what they are, and whether `moekernels train` has it
FORMATS = (
    (18, "bf16 weight, fp32 gradient, master and moments", True),
    (16, "bf16 gradient", False),
    (14, "bf16 weight, fp32 gradient and master, bf16 moments", True),
    (12, "bf16 gradient and moments, fp32 master", False),
    (10, "8-bit moments", False),
    (8, "no master", False),
    (2, "weights alone", False),
)


@dataclass(frozen=True)
class Reading:
    """One way to take the document's dimensions."""

    name: str
    model: DecoderSpec
    parameters: int
    active: int
    per_expert: int
    train_flops: float  # a token
    sequences_per_second: float  # at 100 % of the cards' FLOP/s


def readings(problem: Problem) -> list[Reading]:
    """The expert's widths and matrices, combined in every way that the model's numbers allow."""
    m = problem.model
    width, inner, hidden = m.d_model, m.d_in, m.expert_d_ff
    shapes = [(width, width, hidden), (width, inner, hidden)]
    if m.lifted:
        shapes += [(width, width, inner), (inner, inner, hidden)]
    found = []
    for d_model, d_in, d_ff in sorted(set(shapes), key=lambda s: (s[0] * s[1] * s[2], s)):
        for gated in (False, True):
            gate = m.activation if ACTIVATIONS[m.activation] else "swiglu"
            model = replace(
                m,
                d_model=d_model,
                expert_d_in=d_in,
                expert_d_ff=d_ff,
                gated=gated,
                activation=gate if gated else "gelu",
            )
            lift = f"{d_model}>" if d_in != d_model else ""
            name = f"{lift}{d_in}-{d_ff}-{d_in}{'>' + str(d_model) if lift else ''}"
            lengths = problem.batch.lengths
            tokens, squares = sum(lengths), sum(n * n for n in lengths)
            flops = 3 * cost.forward_flops(model, tokens, squares)
            peak = problem.cluster.gpus * problem.cluster.flops
            found.append(
                Reading(
                    f"{name}, {'SwiGLU (3)' if gated else '2 matrices'}",
                    model,
                    model.parameters_count(),
                    model.parameters_count(active=True),
                    one_expert(model),
                    flops / tokens,
                    len(lengths) * peak / flops,
                )
            )
    return found


@dataclass(frozen=True)
class NamedLayout:
    """A reading of the document's parallel degrees."""

    name: str
    layout: Layout | None
    gpus: int
    dense: str
    experts: str
    experts_per_gpu: float
    modules_per_gpu: float
    agrees: str
    plan: Plan | None = None
    why_not: str = ""


def named_layouts(problem: Problem, claims) -> list[NamedLayout]:
    """R1 to R5, from the claimed cards and degrees."""
    if not (claims.gpus and claims.tp and claims.pp and claims.ep):
        return []
    g, tp, pp, ep = claims.gpus, claims.tp, claims.pp, claims.ep
    model = problem.model
    wanted = []
    if g % (tp * pp) == 0:
        dp = g // (tp * pp)
        wanted.append(("R1", dict(tp=tp, dp=dp, pp=pp, ep=tp * dp), "cards, TP, PP, modules"))
        wanted.append(
            ("R1'", dict(tp=tp, dp=dp, pp=pp, ep=dp, etp=tp), "cards, TP (experts too), PP")
        )
    if g % tp == 0:
        wanted.append(("R2", dict(tp=tp, dp=g // tp, ep=ep), "cards, TP, EP, modules; not PP"))
    if ep % tp == 0:
        wanted.append(("R3", dict(tp=tp, dp=ep // tp, pp=pp, ep=ep), "TP, EP, PP; not the cards"))
    wanted.append(("R4", dict(tp=tp, dp=ep, pp=pp, ep=ep, etp=tp), "TP x EP x PP multiplied out"))
    found = []
    for name, degrees, agrees in wanted:
        try:
            layout = Layout(**degrees)
            layout.validate(
                num_experts=model.num_experts,
                num_layers=model.num_layers,
                num_heads=model.num_heads,
                d_ff=model.expert_d_ff,
            )
        except UsageError:
            continue
        plan, why = best_of(problem, layout)
        local = model.num_experts / layout.ep  # of them 1/etp each
        found.append(
            NamedLayout(
                name,
                layout,
                layout.world,
                f"TP{layout.tp} DP{layout.dp} PP{layout.pp}",
                f"ETP{layout.etp} EP{layout.ep} EDP{layout.edp} PP{layout.pp}",
                local,
                local * model.num_layers / layout.pp,
                agrees,
                plan,
                why,
            )
        )
    found.append(
        NamedLayout(
            "R5",
            None,
            g,
            f"TP{tp} PP{pp}",
            f"EP{ep} across stages",
            model.num_experts / ep,
            model.num_experts * model.num_layers / g,
            "all of them",
            None,
            "a layer's exchange would wait for every stage, each at another layer: no pipeline",
        )
    )
    return found


def best_of(problem: Problem, layout: Layout) -> tuple[Plan | None, str]:
    """The fastest plan on one layout, one layer split and 1F1B, or why there is none."""
    depth, sequences = layout.pp, len(problem.batch.lengths)
    grown = replace(problem, cluster=replace(problem.cluster, gpus=layout.world))
    layers = (problem.model.num_layers // depth,) * depth
    best, over = None, float("inf")
    for state in ("fp32", "bf16"):
        for micro in (1 << i for i in range((sequences // layout.dp).bit_length())):
            if micro < depth or micro > sequences // layout.dp:
                continue
            s = Strategy(layout, layers, (0,) * depth, micro, optimizer_state=state)
            fitted = fit(grown, s)
            if isinstance(fitted, float):
                over = min(over, fitted)
                continue
            plan = evaluate(grown, fitted)
            if best is None or plan.step < best.step:
                best = plan
    if best is None:
        return None, f"{over / 1e9:.1f} GB over a card's memory"
    return best, ""


@dataclass(frozen=True)
class Format:
    """Training state of the heaviest card in one format."""

    bytes_per_parameter: int
    what: str
    state: float
    spare: float  # of a card's memory, behind state and reserve
    offered: bool


def formats(problem: Problem, s: Strategy) -> list[Format]:
    largest = batch_sizes(
        problem.model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp
    ).largest
    stages = [memory_of(problem, s, r, largest) for r in range(s.layout.pp)]
    heaviest = max(sum(stage.parameters.values()) for stage in stages)
    room = problem.cluster.memory - problem.cluster.reserve
    return [Format(n, what, n * heaviest, room - n * heaviest, has) for n, what, has in FORMATS]


@dataclass(frozen=True)
class OnHost:
    """A share of the optimiser's state in the host's memory, and what it comes to."""

    share: float
    layers: str  # computed again
    step: float
    memory: float  # of a card
    host: float  # of a node
    fits: bool


def on_hosts(problem: Problem, s: Strategy) -> list[OnHost]:
    """The same strategy with shares of its state on the host, each with as few layers computed
    again as fit: none, what lets all be kept, all."""
    found: list[OnHost] = []
    room = problem.cluster.memory - problem.cluster.reserve
    lends = problem.cluster.host_memory and s.optimizer != "muon"
    for share in SHARES if lends else ():
        trial = replace(s, offload_optimizer=share, checkpointed=(0,) * s.depth)
        fitted = fit(problem, trial)
        kept = fitted if isinstance(fitted, Strategy) else replace(trial, checkpointed=s.layers)
        plan = evaluate(problem, kept)
        text = ranges_text(kept.checkpoint_layers)
        fits = plan.memory <= room and plan.host_memory <= problem.cluster.host_memory
        found.append(OnHost(share, text, plan.step, plan.memory, plan.host_memory, fits))
    fewest = next((x for x in found if x.fits and x.layers == "none"), None)
    return [x for x in found if x.share in (0.0, 1.0) or x is fewest]


@dataclass(frozen=True)
class InOrder:
    """A schedule in a layout, with as few layers computed again as fit, and what it comes to."""

    schedule: str
    virtual_stages: int
    layers: str  # computed again
    step: float
    idle: float  # of the flush
    memory: float  # of the fullest card
    fits: bool


def in_orders(problem: Problem, s: Strategy) -> list[InOrder]:
    """The same layout under every schedule worth running, with one and two virtual stages a rank;
    none where no stage waits for another."""
    found: list[InOrder] = []
    room = problem.cluster.memory - problem.cluster.reserve
    # As in `candidates`: pairs need an exchange that they hide whole, and a second microbatch.
    hides = s.dispatcher == "all_to_all" and s.layout.exchange > 1 and s.microbatches > 1
    hides &= problem.cluster.exchange_parts <= 1
    for chunks in (1, 2) if s.layout.pp > 1 else ():
        depth = s.layout.pp * chunks
        if depth > problem.model.num_layers:
            continue
        layers = s.layers if s.depth == depth else splits(problem.model.num_layers, depth, False)[0]
        for name in offered(chunks > 1):
            if in_pairs(name) and not hides:
                continue
            trial = replace(
                s, layers=layers, checkpointed=(0,) * depth, schedule=name, virtual_stages=chunks
            )
            fitted = fit(problem, trial)
            kept = fitted if isinstance(fitted, Strategy) else replace(trial, checkpointed=layers)
            plan = evaluate(problem, kept)
            text = ranges_text(kept.checkpoint_layers)
            fits = plan.memory <= room
            found.append(InOrder(name, chunks, text, plan.step, plan.bubble, plan.memory, fits))
    return found


@dataclass(frozen=True)
class Recompute:
    """A set of checkpointed layers and what it comes to."""

    name: str
    layers: str
    step: float
    memory: tuple[float, ...]  # of each stage
    fits: bool


def recomputes(problem: Problem, s: Strategy, claimed: tuple[int, ...]) -> list[Recompute]:
    """The claimed set, as few as fit, all, none."""
    first, per_stage = 1, []
    for count in s.layers:
        per_stage.append(len(set(range(first, first + count)) & set(claimed)))
        first += count
    fitted = fit(problem, replace(s, checkpointed=(0,) * s.depth))
    sets = [("as claimed", tuple(per_stage), ranges_text(claimed))]
    if isinstance(fitted, Strategy):
        sets.append(("as few as fit", fitted.checkpointed, ranges_text(fitted.checkpoint_layers)))
    sets += [("all", s.layers, f"1-{sum(s.layers)}"), ("none", (0,) * s.depth, "none")]
    room = problem.cluster.memory - problem.cluster.reserve
    found = []
    for name, again, text in sets:
        plan = evaluate(problem, replace(s, checkpointed=again))
        memory = tuple(stage.total for stage in plan.stages)
        found.append(Recompute(name, text, plan.step, memory, max(memory) <= room))
    return found
