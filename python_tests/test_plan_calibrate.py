"""Calibration: the fit finds constants that are there, and a run is held to the prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moekernels.cli import main
from moekernels.plan import calibrate as cal
from moekernels.plan.cost import layer_cost
from moekernels.plan.strategy import Strategy
from moekernels.train import config as cfg

TRUE = {"dense": 2e-11, "grouped": 3e-11, "bytes": 1e-10, "layers": 4e-4}
FOUND = {
    **TRUE, "dtype": "fp32", "device": "cpu", "threads": 2, "when": "then", "measurements": 18,
    "median_error": 0.03, "error_band": 0.08,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def seconds_of(model, tokens, segments):
    s = Strategy(cal.Layout(), (model.num_layers,), (0,), 1, dtype="fp32")
    count = cal.counts(model, s, tokens, float(tokens * (tokens // segments)))
    constants = np.array([TRUE[c] for c in cal.CONSTANTS])
    return [model.num_layers * float(np.dot(count[way], constants)) for way in count]


def test_counts_rebuild_the_cost():
    """A layer's cost is the sum of constants times counts."""
    cluster = cal.here(FOUND, 1)
    model, tokens, segments = cal.shapes()[4]
    s = Strategy(cal.Layout(), (2,), (0,), 1, dtype="fp32")
    layer = layer_cost(model, cluster, s)
    squares = float(tokens * (tokens // segments))
    ahead, back = seconds_of(model, tokens, segments)
    slower = FOUND["threads"] / max(1, cal.os.cpu_count() or 1)
    fixed = 2 * layer.total(layer.forward).fixed
    measured = 2 * layer.total(layer.forward)(tokens, squares)
    assert (measured - fixed) / slower == pytest.approx(ahead - fixed, rel=1e-9)
    assert back > ahead


def test_the_fit_finds_the_constants(monkeypatch):
    monkeypatch.setattr(cal, "measure", lambda m, t, n, *_: tuple(seconds_of(m, t, n)))
    found = cal.calibrate()
    assert {c: found[c] for c in TRUE} == pytest.approx(TRUE, rel=1e-6)
    assert found["error_band"] < 1e-6
    assert cal.stored() == found


def test_the_fit_has_no_negative_constant():
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    constants = cal.fit(rows, np.array([3.0, 2.0, 1.0]))
    assert constants.min() >= 0


def test_a_real_measurement():
    model, tokens, segments = cal.shapes()[0]
    ahead, back = cal.measure(model, tokens, segments, "fp32", repeats=1)
    assert 0 < ahead < 60 and 0 < back < 60


def test_planning_for_this_machine(capsys):
    assert main(["plan", "--preset", "tiny", "--here", "2"]) == 2
    assert "plan --calibrate would do it" in capsys.readouterr().err
    cal.store().parent.mkdir(parents=True)
    cal.store().write_text(json.dumps(FOUND))
    assert main(["plan", "--preset", "tiny", "--here", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibrated"] is True
    assert data["recommended"]["gpus"] <= 2
    assert main(["plan", "--preset", "tiny", "--here", "2"]) == 0
    assert "90 % of them within 8 %" in " ".join(capsys.readouterr().out.split())


def test_a_run_beside_the_prediction(tmp_path, capsys):
    run = cfg.resolve("tiny", None, {})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(cfg.to_toml(run))
    (folder / "metrics.jsonl").write_text(json.dumps({"tokens": 8192, "seconds": 2.0}) + "\n")
    events = [
        {"ph": "X", "pid": p, "tid": 0, "name": f"{k}0", "dur": 1e4, "args": {"chunk": 0}}
        for p in range(4)
        for k in "FB"
    ]
    (folder / "trace.json").write_text(json.dumps({"traceEvents": events}))
    cal.store().parent.mkdir(parents=True)
    cal.store().write_text(json.dumps(FOUND))
    assert main(["plan", "--against", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["step"]["measured"] == 2.0 and data["step"]["predicted"] > 0
    assert [(a["stage"], a["action"]) for a in data["actions"]] == [
        (stage, kind) for stage in range(4) for kind in "BF"
    ]
    assert all(a["measured"] == pytest.approx(0.01) for a in data["actions"])
    assert main(["plan", "--against", str(folder)]) == 0
    assert "stage 3 F" in capsys.readouterr().out
    assert main(["plan", "--against", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.toml" in error
