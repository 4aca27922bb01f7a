"""The report on a terminal, with rich."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from moekernels.plan.evaluate import Plan
from moekernels.plan.report import UNCALIBRATED, Report, strategy_text

GB = 1e9


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show(report: Report, console: Console | None = None, *, everything: bool = False) -> None:
    """What an engineer asks first; `everything` adds the tables of readings, layouts, formats and
    the longer list of rejections."""
    console = console or Console(highlight=False)
    problem, best = report.problem, report.result.best
    c, model = problem.cluster, problem.model
    console.print(
        f"[bold]{report.name}[/]: {model.parameters_count() / 1e9:.1f} B parameters, "
        f"{model.parameters_count(active=True) / 1e9:.2f} B active; {problem.batch.assumed}; "
        f"{c.gpus} cards of {c.flops / 1e12:.0f} TFLOP/s, {c.memory / GB:.0f} GB"
    )
    console.print(f"[bold green]recommended[/]  {strategy_text(best.strategy)}")
    console.print("             " + _summary(best))
    if report.own is not None:
        fits = "" if report.own.memory <= c.memory - c.reserve else "  [red]does not fit[/]"
        console.print(f"[bold]as written[/]   {strategy_text(report.own.strategy)}{fits}")
        console.print("             " + _summary(report.own))
    parts = "  ".join(f"{k} {v:.2f}" for k, v in best.parts.items() if v >= 0.005)
    console.print(f"step of {best.step:.2f} s: {parts}")
    console.print(f"[dim]{c.calibrated or UNCALIBRATED}[/]", soft_wrap=False)

    names = ("weights", "gradients", "optimizer", "activations", "working", "messages")
    memory = _table("memory by stage, GB", "stage", *names, "total", f"of {c.memory / GB:.0f}")
    for i, stage in enumerate(best.stages):
        values = [f"{stage.parts()[n] / GB:.1f}" for n in names]
        memory.add_row(
            str(i), *values, f"{stage.total / GB:.1f}", f"{100 * stage.total / c.memory:.0f} %"
        )
    console.print(memory)

    if report.verdicts:
        table = _table("claims, on the layout as written", "claimed", "", "instead")
        for v in report.verdicts:
            colour = "green" if v.verdict == "holds" else "red"
            table.add_row(v.claimed, f"[{colour}]{v.verdict}[/]", v.instead)
        table.columns[2].justify = "left"
        console.print(table)
    if report.contradictions:
        table = _table(
            "cannot all be true, in any reading or layout, at up to 100 % of the cards' FLOP/s",
            "claims",
            "one change that repairs it",
        )
        table.columns[1].justify = "left"
        for x in report.contradictions:
            table.add_row(" + ".join(x.claims), " or ".join(x.repairs) or x.repair)
        console.print(table)
    if everything:
        _details(report, console)
    slower = [r for r in report.result.rejected if not r.reason.endswith("checkpointed")]
    over = [r for r in report.result.rejected if r.reason.endswith("checkpointed")]
    shown = slower if everything else slower[:4]
    if shown:
        console.print("[bold]not[/] " + "; ".join(f"{r.what}: {r.reason}" for r in shown))
    if over:
        nearest = min(over, key=lambda r: float(r.reason.split()[0]))
        console.print(
            f"[bold]too large[/] {len(over)} layouts; nearest {nearest.what}: {nearest.reason}"
        )
    console.print(f"[bold]run[/] {report.launch}", soft_wrap=True)


def _summary(p: Plan) -> str:
    return (
        f"{p.step:.2f} s a step, {p.sequences_per_second:.1f} sequences/s, "
        f"{p.tokens_per_second / 1e3:.0f} k tokens/s, MFU {100 * p.mfu:.1f} %, "
        f"HFU {100 * p.hfu:.1f} %, {1e3 * p.layer_seconds:.1f} ms a layer, "
        f"idle {100 * p.bubble:.0f} %, {p.memory / GB:.1f} GB"
    )


def _details(report: Report, console: Console) -> None:
    table = _table(
        "Pareto: step, memory, cards", "cards", "s a step", "GB", "sequences/s", "MFU", "strategy"
    )
    table.columns[5].justify = "left"
    for p in report.result.pareto:
        table.add_row(
            str(p.gpus), f"{p.step:.2f}", f"{p.memory / GB:.1f}", f"{p.sequences_per_second:.1f}",
            f"{100 * p.mfu:.0f} %", strategy_text(p.strategy),
        )  # fmt: skip
    console.print(table)
    if report.readings:
        table = _table(
            "readings of the dimensions", "expert", "M an expert", "B in all", "B active",
            "GFLOP a token", "sequences/s at 100 %", "at 40 %",
        )  # fmt: skip
        for r in report.readings:
            table.add_row(
                r.name, f"{r.per_expert / 1e6:.2f}", f"{r.parameters / 1e9:.2f}",
                f"{r.active / 1e9:.2f}", f"{r.train_flops / 1e9:.2f}",
                f"{r.sequences_per_second:.0f}", f"{0.4 * r.sequences_per_second:.0f}",
            )  # fmt: skip
        console.print(table)
    if report.layouts:
        table = _table(
            "readings of the layout", "", "cards", "dense", "experts", "experts a card",
            "modules a card", "sequences/s", "GB", "agrees with",
        )  # fmt: skip
        for r in report.layouts:
            note = f"{r.agrees}; {r.why_not}" if r.why_not else r.agrees
            part = f" of 1/{r.layout.etp}" if r.layout and r.layout.etp > 1 else ""
            ends = (
                (f"{r.plan.sequences_per_second:.1f}", f"{r.plan.memory / GB:.1f}")
                if r.plan
                else ("-", "-")
            )
            table.add_row(
                r.name, str(r.gpus), r.dense, r.experts, f"{r.experts_per_gpu:g}{part}",
                f"{r.modules_per_gpu:g}{part}", *ends, note,
            )  # fmt: skip
        console.print(table)
    table = _table(
        "training state by format", "bytes a parameter", "GB a card", "GB left", "what", "train"
    )
    for f in report.formats:
        table.add_row(
            str(f.bytes_per_parameter), f"{f.state / GB:.1f}", f"{f.spare / GB:.1f}", f.what,
            "yes" if f.offered else "no",
        )  # fmt: skip
    console.print(table)
    if report.recomputes:
        table = _table("layers computed again", "set", "layers", "s a step", "GB by stage", "fits")
        for r in report.recomputes:
            table.add_row(
                r.name, r.layers, f"{r.step:.2f}",
                " / ".join(f"{m / GB:.1f}" for m in r.memory), "yes" if r.fits else "no",
            )  # fmt: skip
        console.print(table)
