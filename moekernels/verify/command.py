"""`moekernels verify`: from flags to ranks that compare."""

from __future__ import annotations

import torch.distributed as dist

from moekernels import assembly
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.model.router import SCOPES
from moekernels.parallel import launch, launcher
from moekernels.parallel.nodes import gather
from moekernels.parallel.peers import MODES
from moekernels.pipeline.build import SCHEDULES
from moekernels.plan import room
from moekernels.run import buffers
from moekernels.run import files as cfg
from moekernels.run.sections import SECTIONS
from moekernels.verify.compare import TOLERANCE, Recorded, Verdict, compare, record
from moekernels.verify.variants import (
    HIERARCHICAL,
    LAYOUTS,
    Variant,
    configure,
    two_nodes,
    variants_of,
)

MOST_STEPS = 1000


def verify(
    degrees: dict[str, int],
    *,
    everything: bool = False,
    schedule: str = "1f1b",
    virtual_stages: int = 0,
    experts: int = 8,
    top_k: int = 2,
    steps: int = 3,
    balance_scope: str = "microbatch",
    dtype: str = "fp64",
    device: str = "auto",
    exchange: str = "auto",
    exchange_buffers: str = buffers.EXACT,
) -> int:
    """Verify one layout, or all that are promised; 0 if everything agrees, 1 if not."""
    for flag, value, known in (
        ("dtype", dtype, TOLERANCE),
        ("schedule", schedule, SCHEDULES),
        ("balance-scope", balance_scope, SCOPES),
        ("device", device, ("auto", "cpu", "cuda")),
        ("exchange", exchange, MODES),
    ):
        if value not in known:
            raise UsageError(f"--{flag} {value!r}: {cfg.nearest(value, known)}")
    for flag, key, number in (("experts", "num_experts", experts), ("top-k", "top_k", top_k)):
        cfg.check_value(f"--{flag}", SECTIONS["model"], key, number)
    chunks = virtual_stages or (2 if SCHEDULES[schedule].several else 1)
    cfg.check_value("--virtual-stages", SECTIONS["layout"], "virtual_stages", chunks)
    if not 1 <= steps <= MOST_STEPS:  # all are recorded before the first is compared
        raise UsageError(f"--steps must be from 1 to {MOST_STEPS}, got {steps}")
    if everything and launcher.wanted():
        raise UsageError("--all starts the ranks of each layout by itself; leave torchrun out")
    if not everything:
        variant = Variant(
            schedule,
            experts,
            top_k,
            steps,
            balance_scope,
            buffers=exchange_buffers,
            virtual_stages=chunks,
        )
        return verify_layout(
            degrees, [variant], dtype, device, launcher.launched(), exchange=exchange
        )
    if exchange_buffers != buffers.EXACT:
        raise UsageError("--all verifies bounded buffers, too; leave --exchange-buffers out")
    codes = [
        verify_layout(d, variants_of(d, steps), dtype, device, exchange=exchange) for d in LAYOUTS
    ]
    print("all agree" if not any(codes) else f"{sum(codes)} of {len(codes)} layouts disagree")
    return max(codes)


def verify_layout(
    degrees: dict[str, int],
    variants: list[Variant],
    dtype: str,
    device: str = "auto",
    launched: launcher.Launched | None = None,
    exchange: str = "auto",
) -> int:
    """Verify variants of a layout with one start of its ranks; 0 if all agree, 1 if not."""
    world = launched.size if launched else None
    if exchange == "collective" and len(variants) > 1:
        variants = [v for v in variants if v.buffers == buffers.EXACT]  # the others do not exist
    runs = [configure(degrees, variant, dtype, world) for variant in variants]
    for run in runs:
        run.train.exchange = exchange
    layout = [assembly.layout_of(run) for run in runs][0]
    parts, describe = (layout, variants, runs), assembly.rank_names(layout)
    local = launched.local_size if launched else None
    device = launch.choose_device(device, local or layout.world)
    for run in runs:
        room.check(run, world, local, device)
    if launched is None:
        return launch.run_local(layout.world, device, _work, *parts, describe=describe)
    return launch.run_launched(launched, device, _work, *parts, describe=describe)


def _work(
    env: launch.RankEnv, layout: Layout, variants: list[Variant], runs: list[cfg.RunConfig]
) -> int:
    """A rank's part; the exit code, the same on every rank."""
    if env.leader:
        print(layout.describe(), flush=True)
    tied = [run for run in runs if run.model.tie_embeddings]  # whose mesh has one group more
    here = assembly.build_mesh([*tied, *runs][0], env.device)
    shares = here.exchange.memory is not None or here.exchange.device_memory is not None
    apart = None  # the same ranks, as if half of each exchange's lay elsewhere
    known: dict[tuple, list[Recorded]] = {}  # on rank 0: one recording for all schedules
    failed = False
    for variant, run in zip(variants, runs):
        mesh = here
        if variant.dispatcher == HIERARCHICAL:
            apart = apart or assembly.build_mesh(run, env.device, two_nodes(run.layout))
            mesh = apart
        if len(runs) > 1 and variant.buffers != buffers.EXACT and not shares:
            if env.leader:
                print(f"  {variant}: not here: {mesh.alone}")
            continue
        run.train.steps = variant.steps
        assembly.bound_rows(run, mesh)
        steps: list[list[Recorded]] = [[]]
        if env.leader:
            if len(known.get(variant.model, ())) < variant.steps:
                known[variant.model] = record(run, env.device)
            steps = [known[variant.model][: variant.steps]]
        if env.world > 1:
            dist.broadcast_object_list(steps, 0, device=env.device)
        total = Verdict()
        for verdict in gather(compare(run, mesh, steps[0]), env.world):
            total.add(verdict)
        agreed = _judge(total, set(steps[0][0].gradients), run.train.dtype)
        failed |= not agreed
        if env.leader:
            print(f"  {variant}: {_words(total, run.train.dtype)}  {'ok' if agreed else 'FAILED'}")
            missing = set(steps[0][0].gradients) - total.seen
            if missing:
                print(f"    on no rank: {', '.join(sorted(missing))}")
    return int(failed)


def _judge(total: Verdict, names: set[str], dtype: str) -> bool:
    close = total.loss <= TOLERANCE[dtype] and total.gradient <= TOLERANCE[dtype]
    return close and not total.wrong and total.seen == names


def _words(total: Verdict, dtype: str) -> str:
    text = (
        f"loss {total.loss:.1e}, worst gradient {total.gradient:.1e} ({total.name}), "
        f"allowed {TOLERANCE[dtype]:.0e}; {total.ties} of {total.choices} choices are ties"
    )
    return text + (f", {total.wrong} differ" if total.wrong else "")
