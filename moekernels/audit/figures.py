"""A plan's pictures by matplotlib, as SVG. Each is drawn for a number of CSS pixels across, so that
its text has the same size on a phone and on a desk.

A hue means the same in all of them: see `HUES`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from moekernels.audit.report import Report
from moekernels.canvas import canvas
from moekernels.plan.evaluate import Plan, timeline
from moekernels.plan.search import _class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = 12.5  # CSS pixels
NARROW, WIDE = 358, 820  # a phone of 390 pixels with margins of 16, and a desk
GB = 1e9
LIMIT, INK = "#c92a2a", "#343a40"
MOST_SHAPES = 3000  # beyond them a flush is a picture of dots within its figure

HUES = {  # what it stands for, its shades
    "blue": ("computing, and what it keeps", "#1c4e9c #4a86d8 #8fbaf0 #16306b #7a78d0 #bcd0ee"),
    "orange": ("what travels between cards", "#d9601a #f2913d #f7bd6d #a63c06"),
    "green": ("the model's state, and its update", "#1b6e34 #5cb374 #2f9e44 #a3d9b1"),
    "grey": ("waiting, and room that is free", "#c3c9d1"),
}
HUE_OF = {
    "blue": (
        ("attention", "experts", "memory-bound", "head and loss", "recomputation", "overhead"),
        ("activations", "working"),
        ("backward", "forward", "weights' gradients"),
    ),
    "orange": (("expert exchange", "tensor exchange", "gradient sum"), ("messages",)),
    "green": (("weights", "gradients", "optimizer", "step overhead"),),
    "grey": (("waiting",), ("idle",)),
}
COLOURS = {
    name: HUES[hue][1].split()[place]
    for hue, figures in HUE_OF.items()
    for names in figures
    for place, name in enumerate(names)
}


def memory(report: Report, across: int) -> Figure:
    """What each stage holds, and how much a card has."""
    best, cluster = report.result.best, report.problem.cluster
    figure, axes = _axes(across, 60 + 30 * len(best.stages), legend=6)
    for row, stage in enumerate(best.stages):
        left = 0.0
        for name, size in stage.parts().items():
            axes.barh(row, size / GB, left=left, color=COLOURS[name], label=_once(axes, name))
            left += size / GB
        axes.annotate(f" {left:.1f}", (left, row), va="center", backgroundcolor="#ffffffc0")
    room = (cluster.memory - cluster.reserve) / GB
    _limit(axes, room, f"{room:.4g} of {cluster.memory / GB:.4g} GB to use", 0)
    axes.set_xlim(0, 1.02 * max(axes.get_xlim()[1], room))
    _rows(axes, [f"stage {row}" for row in range(len(best.stages))])
    axes.set_xlabel("GB per card")
    return _done(figure, axes, across)


def step(report: Report, across: int) -> Figure:
    """Where the step's time goes, one thing behind the other."""
    best = report.result.best
    parts = {name: seconds for name, seconds in best.parts.items() if seconds > 0}
    unit, scale = _unit(best.step)
    figure, axes = _axes(across, 60 + 22 * len(parts), legend=0)
    done = 0.0
    for row, (name, seconds) in enumerate(parts.items()):
        axes.barh(row, seconds * scale, left=done * scale, color=COLOURS[name])
        text, end = f" {seconds * scale:.3g} {unit} ", done + seconds
        after = end < 0.7 * best.step
        where = (end if after else done) * scale, row
        axes.annotate(text, where, va="center", ha="left" if after else "right")
        done = end
    _limit(axes, best.mfu * best.step * scale, "at 100 % of the FLOP/s", 0)
    _limit(axes, best.step * scale, f"step {best.step * scale:.3g} {unit}", 1)
    axes.set_xlim(0, 1.02 * best.step * scale)
    _rows(axes, list(parts))
    axes.set_xlabel(f"time in the step, {unit}")
    return _done(figure, axes, across)


def strategies(report: Report, across: int) -> Figure:
    """Step and memory of the strategies that no other beats in both; cards, then the layout."""
    cluster = report.problem.cluster
    unit, scale = _unit(report.result.best.step)
    figure, axes = _axes(across, 480 if across == NARROW else 380, legend=3)
    marked = [("no other beats it", "o", INK, p) for p in report.result.pareto]
    if report.own is not None:
        marked.append(("as written", "s", "#868e96", report.own))
    marked.append(("recommended", "*", "#9c36b5", report.result.best))
    for label, marker, colour, p in marked:
        size = 170 if marker == "*" else 45
        point = p.step * scale, p.memory / GB
        label = _once(axes, label)
        axes.scatter(*point, size, color=colour, marker=marker, label=label, zorder=3)
    steps = [p.step * scale for *_, p in marked]
    if max(steps) > 6 * min(steps):
        axes.set_xscale("log")
        axes.set_xlim(0.7 * min(steps), 1.5 * max(steps))
        _log_ticks(axes)
    else:
        axes.set_xlim(0, 1.15 * max(steps))
        _round_ticks(axes)
    room = (cluster.memory - cluster.reserve) / GB
    axes.axhline(room, color=LIMIT, linestyle="--")
    axes.set_ylim(0, 1.15 * max(room, *(p.memory / GB for *_, p in marked)))
    axes.annotate(
        f"{room:.4g} GB to use ", (1, room), xycoords=("axes fraction", "data"), color=LIMIT,
        ha="right", va="bottom",
    )  # fmt: skip
    axes.set(xlabel=f"{unit} per step", ylabel="GB per card")
    axes.grid(alpha=0.3)
    _done(figure, axes, across)
    seen: dict[tuple[float, float], str] = {}
    for *_, p in marked:
        seen.setdefault((p.step * scale, p.memory / GB), _named(p, across))
    _place_labels(figure, axes, seen)
    return figure


def flush(report: Report, across: int) -> Figure:
    """The flush as planned: what every stage does when."""
    played = timeline(report.problem, report.result.best.strategy)
    stages = report.result.best.strategy.layout.pp
    unit, scale = _unit(played.makespan)
    figure, axes = _axes(across, 60 + 30 * stages, legend=4)
    names = {"F": "forward", "B": "backward", "I": "backward", "W": "weights' gradients"}
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for e in played.events:
        if e.kind.computes:
            span = e.start * scale, (e.end - e.start) * scale
            spans.setdefault((names[str(e.kind)], e.stage), []).append(span)
    count = sum(map(len, spans.values()))
    idle = f"idle, {100 * sum(played.bubble) / stages:.0f} %"
    axes.barh(range(stages), played.makespan * scale, color=COLOURS["idle"], label=idle)
    edge = 0.6 if count / stages * 4 < across else 0.0
    for (name, stage), each in sorted(
        spans.items(), key=lambda entry: list(names.values()).index(entry[0][0])
    ):
        axes.broken_barh(
            each, (stage - 0.4, 0.8), facecolors=COLOURS[name], edgecolors="white",
            linewidth=edge, label=_once(axes, name), rasterized=count > MOST_SHAPES,
        )  # fmt: skip
    _limit(axes, max(played.busy) * scale, "the busiest stage alone", 0)
    _limit(axes, played.makespan * scale, f"flush {played.makespan * scale:.3g} {unit}", 1)
    axes.set_xlim(0, 1.02 * played.makespan * scale)
    _rows(axes, [f"stage {stage}" for stage in range(stages)])
    axes.set_xlabel(f"time in the flush, {unit}")
    return _done(figure, axes, across)


FIGURES: dict[str, tuple[str, Callable[[Report, int], Figure]]] = {
    "Memory by stage": (memory.__doc__ or "", memory),
    "The step by part": (step.__doc__ or "", step),
    "Step and memory": (strategies.__doc__ or "", strategies),
    "The flush": (flush.__doc__ or "", flush),
}


def svg(name: str, report: Report, across: int) -> str:
    """One of `FIGURES`, as an element of a page: its text is text, its lengths are CSS pixels."""
    canvas(1, 1)  # the import that minds MPLBACKEND
    from matplotlib import style

    settings = {"svg.fonttype": "none", "svg.hashsalt": f"{name} {across}", "font.size": TEXT}
    settings |= {f"{kind}.labelsize": TEXT for kind in ("axes", "xtick", "ytick")}
    settings |= {"legend.fontsize": TEXT, "axes.spines.top": False, "axes.spines.right": False}
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    content = io.StringIO()
    with style.context(["default", settings]):
        FIGURES[name][1](report, across).savefig(content, format="svg", metadata=about, dpi=216)
    text = content.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    inside = text[text.index(">", text.index("<svg")) + 1 :].rstrip()
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)  # of no use, and the same in every figure
    return f'<svg {box.group()} role="img" aria-label="{escape(name)}">{inside}'


# --- parts of a figure


def _axes(across: int, height: float, legend: int) -> tuple[Figure, Axes]:
    """A figure so many pixels across, its axes with `height` and names for so many colours."""
    lines = -(-legend // _columns(across)) if legend else 0
    figure = canvas(across / 72, (height + 20 * lines) / 72, dpi=72)
    return figure, figure.subplots()


def _columns(across: int) -> int:
    """Of a legend."""
    return 2 if across == NARROW else 6


def _done(figure: Figure, axes: Axes, across: int) -> Figure:
    """With a legend, if something has a name."""
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=_columns(across), frameon=False)
    return figure


def _once(axes: Axes, name: str) -> str:
    """For a legend, which leaves names with a line in front out: where it has the name."""
    return f"_{name}" if name in axes.get_legend_handles_labels()[1] else name


def _unit(seconds: float) -> tuple[str, float]:
    """What so much time is said in, and how many of them are a second."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3)


def _rows(axes: Axes, names: list[str]) -> None:
    """Name rows of bars, the first on top; few round numbers below."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    _round_ticks(axes)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _round_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _limit(axes: Axes, x: float, text: str, line: int) -> None:
    """A bound, named above the axes in that line of text."""
    axes.axvline(x, color=LIMIT, linestyle="--")
    right = x > 0.5 * axes.get_xlim()[1]
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + 1.3 * TEXT * line),
        textcoords="offset points", color=LIMIT, ha="right" if right else "left", va="bottom",
    )  # fmt: skip


def _named(p: Plan, across: int) -> str:
    """A point's label; on a phone without what is said elsewhere."""
    if across == NARROW:
        degrees = [word for word in _class(p.strategy).split() if not re.fullmatch(r"\D+1", word)]
        return f"{p.gpus}: {' '.join(degrees) or 'one'}"
    state = p.strategy.optimizer_state
    text = f"{p.gpus} card{'s' * (p.gpus > 1)}, {_class(p.strategy)}"
    return text if state == "fp32" else f"{text}, {state} moments"


def _place_labels(figure: Figure, axes: Axes, labels: dict[tuple[float, float], str]) -> None:
    """Beside their points, where nothing lies yet; further off with a line to it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()
    points = {p: axes.transData.transform(p) for p in labels}
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points.values()]
    taken += [x.get_window_extent() for x in axes.texts]
    frame = axes.bbox
    for point in sorted(labels, key=lambda p: -p[1]):
        made: Any = None
        for line in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6):
            for side in ("left", "right"):
                dx, dy = (10 if side == "left" else -10), 1.3 * TEXT * line
                made = axes.annotate(
                    labels[point], point, xytext=(dx, dy), textcoords="offset points", ha=side,
                    va="center", zorder=4, in_layout=False,
                    arrowprops={"arrowstyle": "-", "color": "#adb5bd"} if line else None,
                )  # fmt: skip
                made.update_positions(renderer)
                box = Text.get_window_extent(made).padded(1)  # without the line
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4
                inside &= frame.y0 <= box.y0 and box.y1 <= frame.y1
                if inside and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                made.remove()
                made = None
            if made is not None:
                break
        else:  # the last resort: over something
            axes.annotate(
                labels[point], point, xytext=(8, 0), textcoords="offset points", in_layout=False
            )
