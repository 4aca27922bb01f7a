"""The pictures of a run: loss over steps, and how the load lies over layers and experts."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from moekernels import files
from moekernels.errors import one_line


def draw(
    folder: Path, lines: list[dict], loads: np.ndarray, unigram_entropy: float | None
) -> list[str]:
    """loss.png and experts.png; what to say of those that could not be drawn: a run that is done
    does not fail for want of a picture."""
    title = "load of each expert over its layer's mean"
    said = []
    for name, plot in (
        ("loss.png", lambda path: plot_loss(path, lines, unigram_entropy)),
        ("experts.png", lambda path: plot_experts(path, loads, title)),
    ):
        try:
            plot(folder / name)
        except Exception as error:  # noqa: BLE001, matplotlib's own faults are many
            said.append(f"{name} is not drawn: {type(error).__name__}: {one_line(str(error))}")
    return said


def _figure(width: float, height: float):
    """A figure that is drawn into memory, whatever a notebook or a file of settings asks for."""
    asked = os.environ.pop("MPLBACKEND", None)  # read, and perhaps refused, on import
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(path, content.getvalue())


def plot_loss(path: Path, lines: list[dict], unigram_entropy: float | None = None) -> None:
    """Loss of each step, the held-out losses, and the entropy that knowing only frequencies would
    reach."""
    figure, axes = _figure(8, 4.5)
    axes.plot(
        [x["step"] for x in lines], [x["loss"] for x in lines], color="#1f6feb", label="training"
    )
    held = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
    if held:
        axes.plot(*zip(*held), "o-", color="#d29922", label="held out")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#8b949e", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_experts(path: Path, counts: np.ndarray, title: str) -> None:
    """Heat map of counts [layers, experts]: each expert's load over its layer's mean."""
    share = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    layers, experts = share.shape
    figure, axes = _figure(max(6.0, experts * 0.16), max(2.5, layers * 0.25))
    image = axes.imshow(
        share, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(np.quantile(share, 0.99)))
    )
    axes.set(xlabel="expert", ylabel="layer", title=title)
    step = max(1, layers // 16)
    axes.set_yticks(range(0, layers, step), range(1, layers + 1, step))
    figure.colorbar(image, ax=axes, label="load / mean")
    _save(figure, path)
