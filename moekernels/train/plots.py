"""The pictures of a run: loss over steps, how the load lies over layers and experts, and the last
flush as it ran and as it was planned."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moekernels import files
from moekernels.balance.record import Record
from moekernels.canvas import canvas
from moekernels.errors import one_line
from moekernels.pipeline.schedule import Kind
from moekernels.train.traces import Tracks

MOST = 40.0  # inches of a side of a picture, 120 pixels each


def draw(
    folder: Path,
    lines: list[dict],
    loads: np.ndarray,
    unigram_entropy: float | None,
    record: Record | None = None,
    flush: Mapping[str, Tracks] | None = None,
) -> list[str]:
    """loss.png, experts.png and, of a `flush`, flush.png; what to say of those that could not be
    drawn: a run that is done does not fail for want of a picture."""
    said = []
    pictures = [
        ("loss.png", lambda path: plot_loss(path, lines, unigram_entropy)),
        ("experts.png", lambda path: plot_experts(path, loads, record)),
    ]
    if flush is not None:
        pictures.append(("flush.png", lambda path: plot_flush(path, flush)))
    for name, plot in pictures:
        try:
            plot(folder / name)
        except Exception as error:  # noqa: BLE001, matplotlib's own faults are many
            said.append(f"{name} is not drawn: {type(error).__name__}: {one_line(str(error))}")
    return said


def _figure(width: float, height: float, panels: list[float] | None = None):
    """A figure and its axes; a list of them for panels of these widths."""
    figure = canvas(width, height)
    if panels is None:
        return figure, figure.subplots()
    axes = figure.subplots(1, len(panels), width_ratios=panels, squeeze=False)
    return figure, list(axes[0])


def _save(figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(path, content.getvalue())


def plot_loss(path: Path, lines: list[dict], unigram_entropy: float | None = None) -> None:
    """Loss of each step, held-out losses, and the entropy that knowing only frequencies would
    reach."""
    figure, axes = _figure(8, 4.5)
    from matplotlib.ticker import MaxNLocator  # behind the figure, which minds MPLBACKEND

    axes.plot(
        [x["step"] for x in lines], [x["loss"] for x in lines], color="#1f6feb", label="training"
    )
    held = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
    if held:
        axes.plot(*zip(*held), "o-", color="#d29922", label="held out", clip_on=False)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#8b949e", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=path.absolute().parent.name)
    axes.title.set_parse_math(False)  # a folder may have any name
    if len(lines) > 1:
        steps = [0, *(x["step"] for x in lines)]
        tokens = np.cumsum([0, *(x["tokens"] for x in lines)]) / 1e6
        axes.set_xlim(0, steps[-1])
        top = axes.twiny()
        top.set(xlim=axes.get_xlim(), xlabel="million tokens")
        marks = [x for x in MaxNLocator(6).tick_values(0, tokens[-1]) if x <= tokens[-1]]
        top.set_xticks(np.interp(marks, tokens, steps), [f"{x:g}" for x in marks])
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _inches(least: float, wanted: float) -> float:
    """Of a heat map's side: beyond `MOST` its cells become smaller."""
    return min(max(least, wanted), MOST)


def plot_experts(path: Path, counts: np.ndarray, record: Record | None = None) -> None:
    """Heat map of counts [layers, experts], each expert's load over its layer's mean; with a record
    also the ranks' loads, and in the layer that has the closest pair who is chosen with whom."""
    layers, experts = counts.shape
    width, height = _inches(6.0, experts * 0.16), _inches(2.5, layers * 0.25)
    panels = [width] if record is None else [width, _inches(3.0, record.ranks * 0.4), 5.0]
    figure, axes = _figure(sum(panels), height if record is None else max(4.5, height), panels)
    from matplotlib.colors import TwoSlopeNorm  # behind the figure, which minds MPLBACKEND

    step = max(1, layers // 16)

    def heat(place, loads: np.ndarray, of: str) -> None:
        share = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
        most = max(2.0, float(np.quantile(share, 0.99)))
        # White is the mean; what lies beyond the scale is marked by its pointed end.
        norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=most)
        image = place.imshow(share, aspect="auto", cmap="RdBu_r", norm=norm)
        place.set(xlabel=of, ylabel="layer", title=f"load of {of}s")
        place.set_yticks(range(0, layers, step), range(1, layers + 1, step))
        place.set_xticks(range(0, loads.shape[1], max(1, loads.shape[1] // 16)))
        beyond = "max" if share.max() > most else "neither"
        bar = figure.colorbar(image, ax=place, label="load over the layer's mean", extend=beyond)
        bar.ax.set_yscale("linear")  # equal lengths for equal loads

    heat(axes[0], counts, "expert")
    if record is not None:
        heat(axes[1], record.rank_loads.numpy(), "rank")
        together = record.together().numpy()
        layer = int(together.max(axis=(1, 2)).argmax())
        most = max(2.0, float(np.quantile(together[layer], 0.99)))
        image = axes[2].imshow(together[layer], cmap="magma", vmin=0, vmax=most)
        axes[2].set(xlabel="expert", ylabel="expert", title=f"chosen together, layer {layer + 1}")
        figure.colorbar(image, ax=axes[2], label="times as often as by chance")
    _save(figure, path)


PASSES = {
    Kind.F: ("forward", "#1f6feb"),
    Kind.B: ("backward", "#2da44e"),
    Kind.I: ("backward, inputs", "#2da44e"),
    Kind.W: ("backward, weights", "#9be9a8"),
}
EXCHANGE = "#d29922"
NAMED = 0.012  # of a flush: passes that are longer show their microbatch's number


def plot_flush(path: Path, flush: Mapping[str, Tracks]) -> None:
    """What each stage computed, and below it its exchanges, by what `flush` calls its tracks:
    measured above planned."""
    stages = sorted({e.stage for tracks in flush.values() for e in tracks.events})
    rows = [(stage, name) for stage in stages for name in flush]
    figure, axes = _figure(9, _inches(2.0, 1.0 + 0.55 * len(rows)))
    begin = min((e.start for tracks in flush.values() for e in tracks.events), default=0.0)
    end = max((e.end for tracks in flush.values() for e in tracks.events), default=0.0)
    used: dict[str, str] = {}  # by what the legend says

    def bars(low: float, height: float, spans: list, color: str, label: str, edge: str) -> None:
        if spans:
            used[label] = color
            places = [(1e3 * (s.start - begin), 1e3 * (s.end - s.start)) for s in spans]
            axes.broken_barh(places, (low, height), facecolors=color, edgecolor=edge, linewidth=0.3)

    for row, (stage, name) in enumerate(rows):
        tracks = flush[name]
        for kind, (label, color) in PASSES.items():
            mine = [e for e in tracks.events if (e.stage, e.kind) == (stage, kind)]
            bars(row - 0.35, 0.45, mine, color, label, "white")
            for e in mine:
                if e.end - e.start > NAMED * (end - begin):
                    middle = 500 * (e.start + e.end - 2 * begin)
                    axes.text(
                        middle, row - 0.125, str(e.microbatch), size=7, ha="center", va="center",
                        color="white",
                    )  # fmt: skip
        flights = tracks.flights.get(stage, [])
        bars(row + 0.14, 0.2, flights, EXCHANGE, "exchange", EXCHANGE)
    one = len(stages) == 1
    labels = [name if one else f"stage {stage}, {name}" for stage, name in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="milliseconds", xlim=(0, None), ylim=(len(rows) - 0.5, -0.5))
    from matplotlib.patches import Patch  # behind the figure, which minds MPLBACKEND

    keys = [Patch(color=color, label=label) for label, color in used.items()]
    axes.legend(
        handles=keys, ncols=len(keys), loc="lower right", bbox_to_anchor=(1, 1), frameon=False
    )
    _save(figure, path)
