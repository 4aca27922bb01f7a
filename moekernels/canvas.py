"""A picture to draw on, whatever a notebook or the environment asks of matplotlib."""

from __future__ import annotations

import os


def canvas(width: float, height: float, dpi: float = 120):
    """A matplotlib figure of so many inches that is drawn into memory, its axes packed."""
    asked = os.environ.pop("MPLBACKEND", None)  # read, and perhaps refused, on import
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure
