"""The report on a terminal, with rich."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from moekernels.audit.report import UNCALIBRATED, Report, strategy_text
from moekernels.console import count
from moekernels.plan.evaluate import Plan
from moekernels.plan.strategy import ranges_text

GB = 1e9
UNBROKEN = 100_000  # columns


def _console() -> Console:
    """As wide as the terminal; where there is none, no line is broken."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNBROKEN)


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
    """What an engineer asks first, on one screen; `everything`: every table in full."""
    console = console or _console()
    problem, best = report.problem, report.result.best
    c, model, objective = problem.cluster, problem.model, problem.objective
    console.print(
        f"[bold]{report.name}[/]: {count(model.parameters_count())} parameters, "
        f"{count(model.parameters_count(active=True))} active; {problem.batch.assumed}; "
        f"{c.gpus} {'cards' if c.device == 'cuda' else 'ranks'} of {c.flops / 1e12:.3g} TFLOP/s, "
        f"{c.memory / GB:.0f} GB"
    )
    goal = "recommended" if objective.best == "throughput" else f"best in {objective.best}"
    if objective.at_least:
        goal += f", at least {objective.at_least:g} sequences/s"
    console.print(f"[bold green]{goal}[/]  {strategy_text(best.strategy)}")
    console.print("             " + _summary(best, c.error_band))
    if report.own is not None:
        fits = "" if report.own.memory <= c.memory - c.reserve else "  [red]does not fit[/]"
        console.print(f"[bold]as written[/]   {strategy_text(report.own.strategy)}{fits}")
        console.print("             " + _summary(report.own, c.error_band))
    parts = ", ".join(f"{k} {v:.2g}" for k, v in best.parts.items() if v >= 0.01 * best.step)
    console.print(f"[bold]step[/] {best.step:.3g} s: {parts}")
    if best.border_bytes:
        sent = f"{best.border_bytes / GB:.3g} GB a step by all cards, {best.strategy.dispatcher}"
        console.print(f"[bold]between nodes[/] the experts' exchange sends {sent}")
    skew = c.skew(best.strategy)
    if skew > 1.0:
        console.print(f"[bold]routing[/] the busiest rank has {skew:.2f}x the mean rows")
    console.print(f"[dim]{c.calibrated or UNCALIBRATED}[/]", soft_wrap=False)
    console.print(_memory(best, c.memory))
    if report.verdicts:
        _claims(report, console, everything=everything)
    if everything:
        _details(report, console)
    elif report.readings:
        _digest(report, console)
    if report.on_hosts:
        console.print(f"[bold]optimizer state on the host[/] {_on_hosts(report)}")
    if report.in_orders:
        console.print(f"[bold]schedules[/] {_in_orders(report)}")
    slower = [r for r in report.result.rejected if not r.reason.endswith("checkpointed")]
    over = [r for r in report.result.rejected if r.reason.endswith("checkpointed")]
    shown = slower if everything else slower[:4]
    if shown:
        listed = "; ".join(f"{r.what} {r.reason.removesuffix(' the step or more')}" for r in shown)
        fastest = objective.best == "throughput"
        label = "slower[/], by this much or more" if fastest else "others[/], their step over this"
        console.print(f"[bold]{label}: {listed}")
    if over:
        nearest = min(over, key=lambda r: float(r.reason.split()[0]))
        console.print(
            f"[bold]too large[/] {len(over)} layouts; nearest {nearest.what}: {nearest.reason}"
        )
    console.print(f"[bold]run[/] {report.launch}", soft_wrap=True)


def _memory(best: Plan, card: float) -> Table:
    names = {
        "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ",
        "working": "work", "messages": "msgs",
    }  # fmt: skip
    table = _table("memory, GB", "stage", *names.values(), "total", f"of {card / GB:.0f}")
    alike: list[tuple[list[int], list[str]]] = []
    for i, stage in enumerate(best.stages):
        values = [f"{stage.parts()[n] / GB:.1f}" for n in names]
        values += [f"{stage.total / GB:.1f}", f"{100 * stage.total / card:.0f} %"]
        if alike and alike[-1][1] == values:
            alike[-1][0].append(i)
        else:
            alike.append(([i], values))
    for stages, values in alike:
        table.add_row(ranges_text(tuple(stages)), *values)
    return table


def _claims(report: Report, console: Console, *, everything: bool) -> None:
    held = [v.claimed for v in report.verdicts if v.verdict == "holds"]
    if held:
        console.print(f"[bold green]holds[/]  {', '.join(held)}")
    failed = [v for v in report.verdicts if v.verdict != "holds"]
    if failed:
        table = _table("[red]fails[/], on the layout as written", "claimed", "instead")
        table.columns[1].justify = "left"
        for v in failed:
            table.add_row(v.claimed, v.instead)
        console.print(table)
    if report.contradictions:
        table = _table(
            "cannot all be true, in any reading or layout, at up to 100 % of the FLOP/s",
            "claims",
            "one change that repairs it",
        )
        table.columns[1].justify = "left"
        shown = report.contradictions if everything else report.contradictions[:5]
        for x in shown:
            table.add_row(" + ".join(x.claims), " or ".join(x.repairs) or x.repair)
        console.print(table)
        if len(shown) < len(report.contradictions):
            console.print(f"[dim]and {len(report.contradictions) - len(shown)} more: --all[/]")


def _digest(report: Report, console: Console) -> None:
    """The tables behind the claims, a line each; `--all` has them in full."""
    sizes = sorted(report.readings, key=lambda r: r.parameters)
    own = report.problem.model.parameters_count()
    mine = min(sizes, key=lambda r: abs(r.parameters - own))
    console.print(
        f"[bold]readings[/] of the dimensions: {len(sizes)}, of {sizes[0].parameters / 1e9:.1f} to "
        f"{sizes[-1].parameters / 1e9:.1f} B; this one is {mine.name}, "
        f"{mine.parameters / 1e9:.1f} B: {mine.sequences_per_second:.0f} sequences/s at 100 % of "
        f"the FLOP/s, {0.4 * mine.sequences_per_second:.0f} at 40 %"
    )
    if report.layouts:
        table = _table(
            "readings of the layout", "", "cards", "dense", "experts", "a card", "modules",
            "sequences/s", "GB",
        )  # fmt: skip
        table.columns[2].justify = table.columns[3].justify = "left"
        for r in report.layouts:
            part = f"/{r.layout.etp}" if r.layout and r.layout.etp > 1 else ""
            ends = ("-", "-")
            if r.plan:
                ends = (f"{r.plan.sequences_per_second:.1f}", f"{r.plan.memory / GB:.1f}")
            dense, experts = r.dense, r.experts.removesuffix(" stages")
            if r.layout:
                experts = f"EP{r.layout.ep}" + (f" ETP{r.layout.etp}" if part else "")
            table.add_row(
                r.name, str(r.gpus), dense, experts, f"{r.experts_per_gpu:g}{part}",
                f"{r.modules_per_gpu:g}{part}", *ends,
            )  # fmt: skip
        console.print(table)
    states = ", ".join(f"{f.state / GB:.1f} at {f.bytes_per_parameter}" for f in report.formats)
    console.print(f"[bold]state[/] GB per card by bytes per parameter: {states}")
    if report.recomputes:
        sets = "; ".join(
            f"{r.name}{'' if r.name == r.layers else f' {r.layers}'}: {r.step:.2f} s, "
            f"{max(r.memory) / GB:.0f} GB" + ("" if r.fits else " [red](does not fit)[/]")
            for r in report.recomputes
        )
        console.print(f"[bold]layers computed again[/] {sets}")


def _on_hosts(report: Report) -> str:
    """What a share of the state there costs and frees."""
    name = "as recommended" if report.own is None else "as written"
    shares = "; ".join(
        f"{x.share:g}: {x.step:.2f} s, {x.memory / GB:.0f} GB a card, {x.host / GB:.0f} GB a node, "
        f"again {x.layers}" + ("" if x.fits else " [red](does not fit)[/]")
        for x in report.on_hosts
    )
    return f"{name}: {shares}; [dim]--offload-optimizer auto searches it in all layouts[/]"


def _in_orders(report: Report) -> str:
    """What each schedule is worth in one layout."""
    name = "as recommended" if report.own is None else "as written"
    orders = "; ".join(
        f"{x.schedule}{f' x{x.virtual_stages}' * (x.virtual_stages > 1)}: {x.step:.2f} s, idle "
        f"{100 * x.idle:.1f} %, {x.memory / GB:.0f} GB, again {x.layers}"
        + ("" if x.fits else " [red](does not fit)[/]")
        for x in report.in_orders
    )
    return f"{name}: {orders}"


def _summary(p: Plan, band: float) -> str:
    """`band`: how far off a prediction may be, as calibrated."""
    about = f" ± {100 * band:.0f} %" if band else ""
    return (
        f"{p.step:.3g} s{about} per step, {p.sequences_per_second:.1f} sequences/s, "
        f"{p.tokens_per_second / 1e3:.0f} k tokens/s, MFU {100 * p.mfu:.1f} %, "
        f"HFU {100 * p.hfu:.1f} %, {1e3 * p.layer_seconds:.1f} ms per layer, "
        f"idle {100 * p.bubble:.0f} %, {p.memory / GB:.1f} GB"
    )


def _details(report: Report, console: Console) -> None:
    table = _table(
        "Pareto: step, memory, cards", "cards", "s per step", "GB", "sequences/s", "MFU", "strategy"
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
            "readings of the layout", "", "cards", "dense", "experts", "experts per card",
            "modules per card", "sequences/s", "GB", "agrees with",
        )  # fmt: skip
        for named in report.layouts:
            layout, plan = named.layout, named.plan
            note = f"{named.agrees}; {named.why_not}" if named.why_not else named.agrees
            part = f" of 1/{layout.etp}" if layout and layout.etp > 1 else ""
            ends = ("-", "-")
            if plan:
                ends = (f"{plan.sequences_per_second:.1f}", f"{plan.memory / GB:.1f}")
            table.add_row(
                named.name, str(named.gpus), named.dense, named.experts,
                f"{named.experts_per_gpu:g}{part}", f"{named.modules_per_gpu:g}{part}", *ends, note,
            )  # fmt: skip
        console.print(table)
    table = _table(
        "training state by format", "bytes per parameter", "GB per card", "GB left", "what", "train"
    )
    for f in report.formats:
        table.add_row(
            str(f.bytes_per_parameter), f"{f.state / GB:.1f}", f"{f.spare / GB:.1f}", f.what,
            "yes" if f.offered else "no",
        )  # fmt: skip
    console.print(table)
    if report.recomputes:
        table = _table(
            "layers computed again", "set", "layers", "s per step", "GB by stage", "fits"
        )
        for again in report.recomputes:
            table.add_row(
                again.name, again.layers, f"{again.step:.2f}",
                " / ".join(f"{m / GB:.1f}" for m in again.memory), "yes" if again.fits else "no",
            )  # fmt: skip
        console.print(table)
