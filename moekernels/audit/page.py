"""The report as one HTML file with its plots inside: no script, no other file."""

from __future__ import annotations

import io
from html import escape

from rich.console import Console

from moekernels.audit.report import Report
from moekernels.audit.screen import show
from moekernels.plan.evaluate import timeline

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5",
           "#9498a0", "#ff8ab7", "#2f4b7c")  # fmt: skip
WIDTH, ROW = 900, 26


def _legend(names: list[str], y: float) -> tuple[str, float]:
    """The legend from height y on, in as many lines as it takes, and where it ends."""
    out, x = [], 0
    for i, name in enumerate(names):
        if x + 30 + 7 * len(name) > WIDTH:
            x, y = 0, y + 16
        colour = COLOURS[i % len(COLOURS)]
        out.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    return "".join(out), y + 18


def bars(rows: list[tuple[str, dict[str, float]]], unit: str, limit: float | None = None) -> str:
    """Stacked horizontal bars; `limit` is drawn as a line."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    largest = max([sum(parts.values()) for _, parts in rows] + ([limit] if limit else []))
    scale = (WIDTH - 190) / largest if largest > 0 else 0.0
    out = []
    for i, (label, parts) in enumerate(rows):
        y, x = i * ROW, 70.0
        out.append(f'<text x="0" y="{y + 16}">{escape(label)}</text>')
        for name, value in parts.items():
            w = value * scale
            colour = COLOURS[names.index(name) % len(COLOURS)]
            out.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{w:.1f}" height="{ROW - 8}" fill="{colour}">'
                f"<title>{escape(name)}: {value:.3g} {unit}</title></rect>"
            )
            x += w
        out.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{sum(parts.values()):.3g} {unit}</text>')
    height = len(rows) * ROW
    if limit:
        x = 70 + limit * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c00"/>')
    legend, end = _legend(names, height + 6)
    return _svg("".join([*out, legend]), end)


def scatter(points: list[tuple[float, float, str]], x_name: str, y_name: str) -> str:
    """Points from the origin; each with its label."""
    high_x = max(p[0] for p in points) * 1.1
    high_y = max(p[1] for p in points) * 1.1
    height, left = 260, 50
    out = [
        f'<line x1="{left}" y1="{height}" x2="{WIDTH}" y2="{height}" stroke="#888"/>',
        f'<line x1="{left}" y1="0" x2="{left}" y2="{height}" stroke="#888"/>',
        f'<text x="{WIDTH - 120}" y="{height + 28}">{x_name}</text>',
        f'<text x="{left + 6}" y="12">{y_name}</text>',
    ]
    for part in (0.25, 0.5, 0.75, 1.0):
        px, py = left + part * (WIDTH - left - 160), height - part * height
        out.append(f'<text x="{px - 12:.1f}" y="{height + 14}">{part * high_x:.3g}</text>')
        out.append(f'<text x="0" y="{py + 10:.1f}">{part * high_y:.3g}</text>')
    for x, y, label in points:
        px = left + x / high_x * (WIDTH - left - 160)
        py = height - y / high_y * height
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{COLOURS[0]}"/>')
        out.append(f'<text x="{px + 7:.1f}" y="{py + 4:.1f}">{escape(label)}</text>')
    return _svg("".join(out), height + 34)


def gantt(report: Report) -> str:
    """The planned flush: forward and backward of every stage."""
    played = timeline(report.problem, report.result.best.strategy)
    scale = (WIDTH - 70) / played.makespan
    out = []
    stages = report.result.best.strategy.layout.pp
    for stage in range(stages):
        out.append(f'<text x="0" y="{stage * ROW + 16}">stage {stage}</text>')
    for e in played.events:
        if not e.kind.computes:
            continue
        colour = COLOURS[0] if e.kind.forward else COLOURS[4]
        out.append(
            f'<rect x="{70 + e.start * scale:.1f}" y="{e.stage * ROW + 3}" '
            f'width="{max(0.3, (e.end - e.start) * scale - 0.4):.1f}" height="{ROW - 8}" '
            f'fill="{colour}"><title>{e.kind}{e.microbatch} chunk {e.chunk}</title></rect>'
        )
    return _svg("".join(out), stages * ROW + 4)


def _svg(body: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img" font-size="12" '
        f'font-family="sans-serif">{body}</svg>'
    )


def page(report: Report) -> str:
    best = report.result.best
    with io.StringIO() as nowhere:
        console = Console(record=True, width=150, file=nowhere, highlight=False)
        show(report, console, everything=True)
        text = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    memory = [
        (f"stage {i}", {name: value / 1e9 for name, value in stage.parts().items()})
        for i, stage in enumerate(best.stages)
    ]
    pareto = [
        (p.step, p.memory / 1e9, f"{p.gpus} cards, {p.strategy.optimizer_state}")
        for p in report.result.pareto
    ]
    sections = [
        ("Memory by stage", bars(memory, "GB", report.problem.cluster.memory / 1e9)),
        ("Step by part", bars([("step", {k: v for k, v in best.parts.items() if v > 0})], "s")),
        ("Step and memory", scatter(pareto, "seconds per step", "GB per card")),
        ("The flush as planned", gantt(report)),
    ]
    plots = "".join(f"<h2>{title}</h2>{plot}" for title, plot in sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Plan: {escape(report.name)}'
        "</title><style>body{font-family:sans-serif;max-width:1100px;margin:2em auto}"
        f"pre{{overflow-x:auto;font-size:12px}}</style><h1>Plan: {escape(report.name)}</h1>"
        f"{plots}<h2>In numbers</h2>{text}</html>\n"
    )
