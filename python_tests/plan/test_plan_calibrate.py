"""Calibration: the fit finds constants that are there, and a run is held to the prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moekernels.cli import main
from moekernels.model.decoder import chunk_parameters
from moekernels.plan import calibrate as cal
from moekernels.plan.cost import layer_cost, loss_cost, update_bytes
from moekernels.plan.measure import Sample, Took, measure, numbers_of_ranks, samples
from moekernels.plan.memory import place_of
from moekernels.plan.strategy import Strategy
from moekernels.run import files as cfg

TRUE = {
    "dense": 2e-11, "attention": 5e-11, "grouped": 3e-11, "weights": 4e-10, "bytes": 1e-10,
    "layers": 4e-4, "backward_layers": 3e-4, "actions": 2e-4, "latency": 1e-4, "link": 1e-9,
}  # fmt: skip
UPDATE = {"update": 5e-11, "steps": 1e-3}
ALONE = {name: 0.0 if name in ("latency", "link") else value for name, value in TRUE.items()}
FOUND = {
    "ranks": {"1": {**ALONE, **UPDATE}, "2": {**TRUE, **UPDATE}}, "cores": 2, "dtype": "fp32",
    "device": "cpu", "when": "then", "measurements": 64, "median_error": 0.03, "error_band": 0.08,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def took(sample: Sample) -> Took:
    """What the sample would take on a machine where TRUE holds."""
    model, layout = sample.model, sample.layout
    s = Strategy(layout, (model.num_layers,), (0,), 1, dtype="fp32")
    c = cal.cluster_of({**TRUE, **UPDATE}, layout.world)
    layer, size = layer_cost(model, c, s), (sample.tokens, sample.squares)
    loss = loss_cost(model, c, s)(*size) if sample.last else 0.0
    held = chunk_parameters(model, place_of(s, 0.0), s.layer_range(0), False, sample.last)
    return Took(
        model.num_layers * layer.total.forward(*size) + c.action_overhead + loss,
        model.num_layers * layer.total.backward(*size) + c.action_overhead,
        UPDATE["update"] * sum(held.values()) * update_bytes(s) + UPDATE["steps"],
    )


def test_the_fit_finds_the_constants(monkeypatch):
    """The samples tell all of them apart, and the counts rebuild the cost."""
    monkeypatch.setattr(cal, "measure", lambda chosen, *_: [took(s) for s in chosen])
    monkeypatch.setattr(cal, "numbers_of_ranks", lambda: [1, 2])
    found = cal.calibrate()
    assert found["ranks"]["2"] == pytest.approx({**TRUE, **UPDATE}, rel=1e-6)
    assert found["ranks"]["1"] == pytest.approx({**ALONE, **UPDATE}, rel=1e-6)
    assert found["error_band"] < 1e-6
    assert cal.stored() == found


def test_ranks_beyond_the_cores_take_turns():
    two, eight = cal.here(FOUND, 2), cal.here(FOUND, 8)
    assert two.overhead == TRUE["layers"] and eight.overhead == 4 * TRUE["layers"]
    for name in ("gemm_efficiency", "attention_efficiency", "grouped_efficiency"):
        rates = [c.flops * getattr(c, name) for c in (two, eight)]
        assert rates[1] == pytest.approx(rates[0] / 4)
    assert eight.grouped_half_rows == pytest.approx(two.grouped_half_rows)
    more = {**FOUND, "cores": 16, "ranks": {**FOUND["ranks"], "16": {**TRUE, "layers": 9e-4}}}
    assert [cal.here(more, n).overhead for n in (1, 2, 4, 16)] == [4e-4, 4e-4, 9e-4, 9e-4]
    assert cal.here(more, 32).overhead == 2 * 9e-4
    assert cal.here(FOUND, 1).latency == 0.0 and eight.latency == 4 * TRUE["latency"]


def test_the_fit_has_no_negative_constant():
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    constants = cal.fit(rows, np.array([3.0, 2.0, 1.0]))
    assert constants.min() >= 0


@pytest.mark.parametrize("cores, ranks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (96, [1, 2, 16])])
def test_samples_for_any_machine(cores, ranks, monkeypatch):
    monkeypatch.setattr("moekernels.plan.measure.cores", lambda: cores)
    assert numbers_of_ranks() == ranks
    for number in ranks:
        for sample in samples(number):
            m, layout = sample.model, sample.layout
            assert layout.world == number and sample.tokens % sample.segments == 0
            layout.validate(num_experts=m.num_experts, num_heads=m.num_heads, vocab_size=1024)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_measurement(ranks):
    smallest = [min(samples(ranks)[::-1], key=lambda s: s.tokens * s.model.num_layers)]
    (one,) = measure(smallest, "fp32", 0.0)
    assert 0 < one.forward < 60 and 0 < one.backward < 60 and 0 < one.update < 60


def test_a_calibration_of_another_release(capsys):
    cal.store().parent.mkdir(parents=True)
    cal.store().write_text('{"dense": 1e-11}')
    assert main(["plan", "--here", "2"]) == 2
    assert "of another release" in capsys.readouterr().err


def test_planning_for_this_machine(capsys):
    assert main(["plan", "--preset", "tiny", "--here", "2"]) == 2
    assert "run moekernels plan --calibrate" in capsys.readouterr().err
    cal.store().parent.mkdir(parents=True)
    cal.store().write_text(json.dumps(FOUND))
    assert main(["plan", "--preset", "tiny", "--here", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibrated"] is True and data["error_band"] == 0.08
    assert data["recommended"]["gpus"] <= 2
    assert 0 < data["recommended"]["mfu"] < 1
    assert main(["plan", "--preset", "tiny", "--here", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "90 % of them within 8 %" in out and "s ± 8 % per step" in out


def test_a_run_beside_the_prediction(tmp_path, capsys):
    run = cfg.resolve("tiny", None, {})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(cfg.to_toml(run))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "tokens": 8192, "seconds": 2.0}) + "\n"
    )
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
