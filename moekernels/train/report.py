"""What a run tells its user: the layout before it, the table after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from moekernels import assembly
from moekernels.console import count, duration
from moekernels.model import dispatch
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import gather
from moekernels.parallel.optimizer import Optimizer
from moekernels.pipeline.schedule import RELATIVE_COST
from moekernels.pipeline.simulate import Simulator
from moekernels.plan.cost import border_bytes
from moekernels.plan.problem import configured
from moekernels.run import files as cfg

if TYPE_CHECKING:
    from moekernels.data.loader import BatchLoader

# Dense bf16 FLOP/s by a part of the card's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the card where they are known; nothing is guessed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class Holding(NamedTuple):
    """What one rank holds."""

    layers: str
    modules: int  # of experts
    parameters: int
    bytes: int
    host: int  # bytes of the optimiser's state in the host's memory


def layout_report(
    run: cfg.RunConfig,
    mesh: Mesh,
    chunks: list[StageModel],
    optimizer: Optimizer,
    loader: BatchLoader,
) -> str:
    """Both factorisations, what each rank holds, batch and schedule. Called by all ranks together.

    Raises RuntimeError if the ranks do not hold every expert module exactly edp*etp times over.
    """
    layers = [f"{min(map(int, c.layers))}-{max(map(int, c.layers))}" for c in chunks]
    held = sum(
        info.local_shape[0]
        for chunk in chunks
        for name, _, info in chunk.named_shards()
        if name.endswith("experts.w2")
    )
    mine = Holding(
        layers=" ".join(layers),
        modules=held,
        parameters=sum(p.numel() for c in chunks for p in c.parameters()),
        bytes=optimizer.bytes()
        + sum(moe.experts.spare.bytes() for chunk in chunks for moe in chunk.experts_layers),
        host=optimizer.host_bytes(),
    )
    ranks = gather(mine, mesh.world.size)
    layout, m, b = mesh.layout, run.model, run.batch
    modules = m.moe_layers * m.num_experts
    total = sum(r.modules for r in ranks)
    if total != modules * layout.edp * layout.etp:
        raise RuntimeError(
            f"the ranks hold {total} expert modules, {modules} x edp {layout.edp} x etp "
            f"{layout.etp} were expected"
        )
    shares = sorted({r.modules for r in ranks})
    each = str(shares[0]) if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
    copies = f" x {layout.edp} copies" if layout.edp > 1 else ""
    parts = f" x {layout.etp} shards" if layout.etp > 1 else ""
    schedule = assembly.build_schedule(run)
    plan = loader.plan(1)
    costs = [max(stage[i] for stage in plan.costs) for i in range(schedule.microbatches)]
    bubble = Simulator(schedule).run(lambda _, i, kind: costs[i] * (RELATIVE_COST[kind])).bubble
    lines = [
        f"model    {count(m.parameters_count())} parameters, "
        f"{count(m.parameters_count(active=True))} "
        f"active per token; {m.moe_layers} layers x {m.num_experts} experts = {modules} expert "
        f"modules",
        layout.describe(),
        f"modules  {modules}{copies}{parts} / {layout.world} ranks = {each} per rank (checked)",
        f"data     {loader.describe()}",
        f"batch    {b.sequences} sequences, about {loader.global_tokens(1)} tokens, in "
        f"{b.microbatches} microbatches x "
        f"{b.accumulation} accumulation steps = one flush of {schedule.microbatches} ({b.policy}, "
        f"imbalance {plan.imbalance:.3f})",
        f"schedule {run.layout.schedule}, {100 * sum(bubble) / len(bubble):.1f} % idle if all "
        f"else were free",
        f"{'rank':>6}  {'tp':>3} {'dp':>3} {'pp':>3}  {'layers':<12} {'modules':>8} "
        f"{'parameters':>11} {'memory':>9}",
    ]
    lines[2:2] = _topology(run, mesh, loader.global_tokens(1))
    for place, rank in enumerate(mesh.order):
        r = ranks[rank]
        stage, inside = divmod(place, layout.stage_ranks)
        lines.append(
            f"{rank:>6}  {inside % layout.tp:>3} {inside // layout.tp:>3} {stage:>3}  "
            f"{r.layers:<12} {r.modules:>8} {count(r.parameters):>11} "
            f"{r.bytes / 2**20:>5.0f} MiB"
        )
    text = "         memory: weights, gradients and optimizer state; activations come on top"
    if away := sorted({f"{r.host / 2**20:.0f}" for r in ranks if r.host}, key=int):
        ends = away if len(away) == 1 else (away[0], away[-1])
        text += f"; {' to '.join(ends)} MiB of a rank's state lie in the host's"
    lines.append(text)
    return "\n".join(lines)


GROUP_NAMES = {"tp": "tensor parallel", "exchange": "experts' exchange", "pp": "pipeline"}


def _topology(run: cfg.RunConfig, mesh: Mesh, tokens: int) -> list[str]:
    """Which groups stay inside a node, where there are several; and what an exchange that does not
    stay sends over the network in a step of so many tokens."""
    nodes = mesh.nodes
    if nodes.count == 1:
        return []
    sizes = sorted({nodes.of.count(node) for node in nodes.of})
    several = {key: mesh.across(key) for key in GROUP_NAMES if getattr(mesh.layout, key) > 1}
    inside = [GROUP_NAMES[key] for key, across in several.items() if not across]
    outside = [GROUP_NAMES[key] for key, across in several.items() if across]
    text = f"nodes    {nodes.count} of {' to '.join(map(str, sizes))} ranks"
    text += f"; inside a node: {', '.join(inside) or 'nothing'}; across: "
    lines = [text + (", ".join(outside) or "data parallel alone")]
    if several.get("exchange"):
        lines.append(_exchange_over_network(run, mesh, tokens))
    return lines


def _exchange_over_network(run: cfg.RunConfig, mesh: Mesh, tokens: int) -> str:
    """Bytes per rank and step, if experts are chosen evenly, and seconds at [hardware]'s rate."""
    layout, strategy = mesh.layout, configured(run)
    way = dispatch.choose(run.layout.dispatcher, run.model, layout, mesh.rail.size)
    alike = [
        sum(mesh.nodes.of[a] == mesh.nodes.of[b] for a in ranks for b in ranks) / len(ranks) ** 2
        for ranks in mesh.members["exchange"]
    ]
    nodes = 1 / min(alike)  # as on so many with equally many ranks each
    strategy = replace(strategy, dispatcher=way, nodes=nodes)
    size = border_bytes(run.model, strategy, tokens) / layout.world
    rate = run.hardware.network_gbps * 1e9
    return (
        f"         EP {layout.ep} over the network, {way}: about {size / 1e9:.3g} GB per rank and "
        f"step, {size / rate:.3g} s at {run.hardware.network_gbps:g} GB/s; an ep*etp that divides "
        f"{min(mesh.nodes.of.count(n) for n in mesh.nodes.of)} ranks stays inside a node"
    )


def closing(
    lines: list[dict], first_step: int, seconds: float, entropy: float, path: Path
) -> list[tuple[str, str]]:
    """The closing table's rows, from the run's own metrics."""
    first, last = lines[0], lines[-1]
    here = [x for x in lines if x["step"] > first_step]
    resumed = f", the last {len(here)}" if first_step else ""
    steady = sorted(x["tokens_per_s"] for x in here[1:] or here)
    rows = [
        ("steps", f"{last['step']}{resumed} in {duration(seconds)} min"),
        (
            "loss",
            f"{first['loss']:.3f} at step {first['step']} -> {last['loss']:.3f} "
            f"({last['loss'] - first['loss']:+.3f} nats)",
        ),
        ("unigram entropy", f"{entropy:.3f}"),
        ("tokens", f"{sum(x['tokens'] for x in lines):,}"),
        ("tokens/s", f"{steady[len(steady) // 2]:,.0f} (median)"),
        ("load max/mean", f"{last['load_max_over_mean']:.2f}, dead experts {last['dead_experts']}"),
        *_experts(lines, last),
        ("pipeline idle", f"{100 * last['bubble']:.1f} %"),
        ("memory", f"{last['memory_gb']:.2f} GB, the most of a rank"),
        ("written to", str(path)),
    ]
    if last["exchange_exposed"]:
        rows.insert(7, ("exchange", _exchange(last)))
    if skipped := sum(x.get("skipped", 0) for x in lines):
        rows.insert(1, ("steps skipped", f"{skipped}, not applied: a loss or norm was not finite"))
    if "eval_loss" in last:
        rows.insert(2, ("held-out loss", f"{last['eval_loss']:.3f}"))
    if "mfu" in last:
        rows.insert(5, ("MFU", f"{100 * last['mfu']:.1f} %"))
    return rows


FULL = 0.95  # of the cores' time: where ranks use more of it, one that waits leaves none idle


def _exchange(line: dict) -> str:
    """Shares of the step, and what of the exchange ran while something else did."""
    exposed = f"{100 * line['exchange_exposed']:.1f} %"
    if line["exchange_skew"] is None:
        text = f"{exposed} waited for, peers that came late included"
    else:
        text = f"{exposed} waited for, {100 * line['exchange_skew']:.1f} % for peers that came late"
    if line["exchange_hidden"] is not None:
        text += f"; {100 * line['exchange_hidden']:.0f} % of the flight hidden"
    if line["cores"] > FULL:
        text += "; ranks share cores: waiting is not idle time"
    return text


def _experts(lines: list[dict], last: dict) -> list[tuple[str, str]]:
    """Rows of the closing table: how ranks are loaded, what was watched of the choices, and what
    moves brought."""
    text = f"{last['rank_load_max_over_mean']:.2f}"
    if watched := [x for x in lines if "nodes_a_token" in x]:
        text += (
            f"; a token visits {watched[-1]['nodes_a_token']:.2f} nodes, "
            f"{100 * watched[-1]['together_on_a_rank']:.0f} % of its pairs of choices lie on one "
            f"rank"
        )
    rows = [("ranks max/mean", text)]
    if moves := [x for x in lines if "moved_experts" in x]:
        text = f"{sum(x['moved_experts'] for x in moves)} in {len(moves)} moves"
        text += f", {sum(x['move_seconds'] for x in moves):.2f} s"
        if any(x["predicted_gain"] for x in moves):
            gained = [x["realised_gain"] for x in lines if "realised_gain" in x]
            text += f"; {sum(x['predicted_gain'] for x in moves):.3f} s per step predicted"
            text += f", {sum(gained):.3f} s realised" if gained else ""
        rows.append(("experts moved", text))
    if copied := [x for x in lines if x.get("replicas")]:
        mean = [
            sum(x[key] for x in copied) / len(copied)
            for key in ("rank_load_max_over_mean", "rank_load_with_replicas")
        ]
        text = f"{copied[-1]['replicas']} copies of hot experts, in {len(copied)} steps"
        rows.append(("replicas", f"{text}; ranks max/mean {mean[0]:.2f}, with them {mean[1]:.2f}"))
    return rows
