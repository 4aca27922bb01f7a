"""What the benches of growth and of the layer say of figures made up here, and of a tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import bench_scaling  # noqa: E402
from machine import where  # noqa: E402


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_slope_is_the_power(power):
    points = [{"size": n, "layer": 3e-3 * n**power} for n in (1, 2, 4, 64)]
    assert bench_scaling.slope(points, "layer") == pytest.approx(power, abs=1e-9)


def test_a_point_has_every_part():
    small = bench_scaling.Size(tokens=4, hidden=8, ffn=8, experts=4, top_k=2)
    parts = bench_scaling.in_own_process(bench_scaling.point, small, 1)
    assert parts.keys() == {"memory", "gate", "route", "experts", "combine", "layer"}
    assert parts["layer"] > 0


def test_a_measurement_says_where_it_was_made():
    assert where().keys() == {"machine", "commit", "when"}
    assert where()["machine"].endswith("cores")
