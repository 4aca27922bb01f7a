"""A plan for people (one screen) and for programs (JSON), its trace, and the line that runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moekernels import assembly
from moekernels.audit.claims import Contradiction, Verdict, contradictions, verdicts
from moekernels.audit.document import (
    Format,
    InOrder,
    NamedLayout,
    OnHost,
    Reading,
    Recompute,
    formats,
    in_orders,
    named_layouts,
    on_hosts,
    readings,
    recomputes,
)
from moekernels.errors import UsageError
from moekernels.plan import replicas
from moekernels.plan.evaluate import Plan, Problem, evaluate
from moekernels.plan.problem import configured
from moekernels.plan.search import Result, Space, _class, search
from moekernels.plan.strategy import Strategy, ranges_text
from moekernels.run import files as cfg

UNCALIBRATED = "uncalibrated: the constants are assumed, not measured, and carry no error band"


@dataclass
class Report:
    """All that `moekernels plan` knows."""

    name: str
    problem: Problem
    result: Result
    own: Plan | None  # the configuration's own strategy
    verdicts: list[Verdict]
    contradictions: list[Contradiction]
    readings: list[Reading]
    layouts: list[NamedLayout]
    formats: list[Format]
    recomputes: list[Recompute]
    on_hosts: list[OnHost]
    in_orders: list[InOrder]
    launch: str


def make(
    run: cfg.RunConfig, problem: Problem, space: Space, source: list[str], name: str
) -> Report:
    """Search, and judge the claims if there are any. `source`: the flags that name the model."""
    result = search(problem, space)
    found = result.best.strategy
    if problem.replicas and not found.replicas:
        where = found.layout, found.dispatcher, problem.replicas, problem.cluster.loads
        reason = replicas.why_not(problem.model, *where)
        raise UsageError(f"--replicas {problem.replicas}: {reason}; leave it out, or give --ep")
    claims = run.claims
    claimed = any(asdict(claims).values())
    best = evaluate(problem, result.best.strategy, exact_order=True)
    result.pareto = [best if p is result.best else p for p in result.pareto]
    result.best = best
    report = Report(
        name,
        problem,
        result,
        None,
        *([], [], [], [], [], [], [], []),
        launch_line(best, problem, source),
    )
    report.formats = formats(problem, best.strategy)
    report.on_hosts = on_hosts(problem, best.strategy)
    report.in_orders = in_orders(problem, best.strategy)
    if not claimed:
        return report
    if run.batch.microbatches == cfg.AUTO:
        most = len(problem.batch.lengths) // run.layout.dp
        run.batch.microbatches = max(1, min(best.strategy.microbatches, most))
        run.batch.accumulation = 1
    report.own = evaluate(problem, configured(run), exact_order=True)
    s = report.own.strategy
    m = run.batch.microbatches
    report.verdicts = verdicts(problem, claims, report.own, best, m)
    report.contradictions = contradictions(problem, claims, {m, m * run.batch.accumulation})
    report.readings = readings(problem)
    report.layouts = named_layouts(problem, claims)
    report.formats = formats(problem, s)
    report.on_hosts = on_hosts(problem, s)
    report.in_orders = in_orders(problem, s)
    if claims.checkpoint_layers:
        run.layout.checkpoint_layers = claims.checkpoint_layers
        again = tuple(sorted(assembly.checkpointed(run)))
        report.recomputes = recomputes(problem, s, again)
    return report


def launch_line(plan: Plan, problem: Problem, source: list[str]) -> str:
    """The command that trains as planned."""
    s, c = plan.strategy, problem.cluster
    layout = s.layout
    words = ["moekernels train", *source]
    words += [f"--{d} {getattr(layout, d)}" for d in cfg.DEGREES]
    words.append(f"--schedule {s.schedule}")
    if s.virtual_stages > 1:
        words.append(f"--virtual-stages {s.virtual_stages}")
    if len(set(s.layers)) > 1:
        words.append("--layers-per-stage " + ",".join(map(str, s.layers)))
    words += [f"--microbatches {s.microbatches}", "--accumulation 1"]
    words.append(f"--checkpoint-layers {ranges_text(s.checkpoint_layers)}")
    words.append(f"--dispatcher {s.dispatcher}")
    words += [f"--dtype {s.dtype}", f"--optimizer-state {s.optimizer_state}"]
    words += [] if s.shard_optimizer else ["--no-shard-optimizer"]
    words += [f"--optimizer {s.optimizer}"] if s.optimizer != "adamw" else []
    words += [f"--ema {s.ema:g}"] if s.ema else []
    words += [f"--replicas {s.replicas}"] if s.replicas else []
    words += [f"--offload-optimizer {s.offload_optimizer:g}"] if s.offload_optimizer else []
    line = " ".join(words)
    if layout.world <= c.gpus_per_node:
        return f"python -m {line}"
    nodes = -(-layout.world // c.gpus_per_node)
    return f"torchrun --nnodes {nodes} --nproc-per-node {c.gpus_per_node} -m {line}"


def strategy_text(s: Strategy) -> str:
    schedule = s.schedule if s.virtual_stages == 1 else f"{s.schedule} x{s.virtual_stages}"
    several = s.layout.dp > 1 or s.layout.edp > 1
    split = " and masters split" if s.shard_optimizer and several else ""
    split += ", their average" if s.ema else ""
    split += ", muon" if s.optimizer == "muon" else ""
    away = f" ({s.offload_optimizer:g} of the state on the host)" if s.offload_optimizer else ""
    return (
        f"{_class(s)}, {schedule}, {s.microbatches} microbatches, layers "
        f"{','.join(map(str, s.layers))}, checkpointed {ranges_text(s.checkpoint_layers)}, "
        f"{s.optimizer_state} moments{split}{away}, {s.dispatcher}"
        f"{f', {s.replicas} replicas a rank and layer' if s.replicas else ''}"
    )


# --- for programs


def plan_dict(plan: Plan) -> dict:
    s = plan.strategy
    return {
        "gpus": plan.gpus,
        "strategy": {
            **{d: getattr(s.layout, d) for d in cfg.DEGREES},
            "edp": s.layout.edp,
            "schedule": s.schedule,
            "virtual_stages": s.virtual_stages,
            "microbatches": s.microbatches,
            "layers_per_stage": list(s.layers),
            "checkpointed_per_stage": list(s.checkpointed),
            "checkpoint_layers": ranges_text(s.checkpoint_layers),
            "optimizer_state": s.optimizer_state,
            "shard_optimizer": s.shard_optimizer,
            "offload_optimizer": s.offload_optimizer,
            "optimizer": s.optimizer,
            "ema": s.ema,
            "replicas": s.replicas,
            "dtype": s.dtype,
            "dispatcher": s.dispatcher,
        },
        "step_seconds": plan.step,
        "step_parts": plan.parts,
        "border_bytes": plan.border_bytes,
        "layer_ms": plan.layer_seconds * 1e3,
        "sequences_per_second": plan.sequences_per_second,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "bubble": plan.bubble,
        "memory_bytes": plan.memory,
        "host_memory_bytes": plan.host_memory,
        "memory_by_stage": [
            {**stage.parts(), "total": stage.total, "parameters": stage.parameters}
            for stage in plan.stages
        ],
    }


def as_dict(report: Report) -> dict:
    result = report.result
    return {
        "name": report.name,
        "model": {
            "parameters": report.problem.model.parameters_count(),
            "active_parameters": report.problem.model.parameters_count(active=True),
        },
        "batch": {
            "sequences": len(report.problem.batch.lengths),
            "tokens": report.problem.batch.tokens,
            "lengths": report.problem.batch.assumed,
        },
        "objective": asdict(report.problem.objective),
        "hardware": asdict(report.problem.cluster),
        "calibrated": bool(report.problem.cluster.calibrated),
        "error_band": report.problem.cluster.error_band or None,
        "recommended": plan_dict(result.best),
        "pareto": [plan_dict(p) for p in result.pareto],
        "rejected": [asdict(r) for r in result.rejected],
        "as_configured": plan_dict(report.own) if report.own else None,
        "claims": [asdict(v) for v in report.verdicts],
        "contradictions": [asdict(c) for c in report.contradictions],
        "readings": [{k: v for k, v in vars(r).items() if k != "model"} for r in report.readings],
        "layouts": [
            {
                **{k: v for k, v in vars(r).items() if k not in ("plan", "layout")},
                "plan": plan_dict(r.plan) if r.plan else None,
            }
            for r in report.layouts
        ],
        "formats": [asdict(f) for f in report.formats],
        "checkpoint_sets": [asdict(r) for r in report.recomputes],
        "state_on_host": [asdict(x) for x in report.on_hosts],
        "schedules": [asdict(x) for x in report.in_orders],
        "considered": result.considered,
        "played": result.played,
        "launch": report.launch,
    }


def trace(report: Report) -> list[dict]:
    from moekernels.pipeline.trace import exchange_events, trace_events
    from moekernels.plan.tracks import tracks

    events, exchanges = tracks(report.problem, report.result.best.strategy)
    entries = trace_events(events, planned=True)
    for stage, sent in sorted(exchanges.items()):
        entries += exchange_events(stage, sent, planned=True)
    return entries
