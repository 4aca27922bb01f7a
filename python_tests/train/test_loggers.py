"""`--log`: what a run's numbers reach, and that it ends without them."""

import json
import sys
import types

import pytest

from moekernels.errors import UsageError
from moekernels.run import files as cfg
from moekernels.run.sections import TrainSection
from moekernels.train import loggers
from moekernels.train.loggers import Log

LINES = [
    {"step": 1, "loss": 2.5, "dropped": 0, "exchange_hidden": None, "nonfinite": ["z"], "z": None},
    {"step": 2, "loss": 2.25, "dropped": 0, "exchange_hidden": 0.5, "eval_loss": 2.375},
]
SCALARS = [
    (1, {"loss": 2.5, "dropped": 0.0}),
    (2, {"loss": 2.25, "dropped": 0.0, "exchange_hidden": 0.5, "eval_loss": 2.375}),
]


def log(name, folder, lines, first=0):
    said = []
    config = cfg.resolve("tiny", None, {})
    one = Log(name, folder, "run-identity", config, first, said.append)
    for line in lines:
        one.write(json.loads(json.dumps(line)))
    one.close()
    return said


def test_every_choice_is_a_logger():
    kept = TrainSection.__dataclass_fields__["log"].metadata["choices"]
    assert kept == ("none", *loggers.LOGGERS)


def test_tensorboard_reads_the_numbers_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert log("tensorboard", tmp_path, LINES) == []
    assert log("tensorboard", tmp_path, [LINES[1]], first=1) == []  # a run that went on
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "dropped", "exchange_hidden", "eval_loss"):
        expected = [(step, values[name]) for step, values in SCALARS if name in values]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "model.top_k = 2" in text


def test_wandb_goes_on_in_the_run_of_that_identity(tmp_path, monkeypatch):
    made, logged, done = [], [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            done.append(True)

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: made.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert log("wandb", tmp_path, LINES) == [] and logged == SCALARS and done == [True]
    assert made[0]["id"] == "run-identity" and made[0]["resume"] == "allow"
    assert made[0]["name"] == tmp_path.name and made[0]["config"]["train.lr"] > 0


@pytest.mark.parametrize("again", [False, True])
def test_mlflow_goes_on_in_the_run_of_that_identity(tmp_path, monkeypatch, again):
    begun, params, logged, done = [], [], [], []
    fake = types.ModuleType("mlflow")
    fake.set_experiment = lambda name: None
    old = types.SimpleNamespace(info=types.SimpleNamespace(run_id="old"))
    fake.search_runs = lambda **options: (
        [old] if again and "'run-identity'" in options["filter_string"] else []
    )
    fake.start_run = lambda **options: begun.append(options)
    fake.log_params, fake.end_run = params.append, lambda: done.append(True)
    fake.log_metrics = lambda values, step: logged.append((step, values))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    assert log("mlflow", tmp_path, LINES) == [] and logged == SCALARS and done == [True]
    if again:
        assert begun == [{"run_id": "old"}] and not params
    else:
        assert begun[0]["tags"] == {"moekernels.run": "run-identity"} and len(params) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_logger_that_fails_is_told_once(tmp_path, monkeypatch, where):
    def fails(*_, **__):
        raise ConnectionError("no\nnetwork")

    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **_: run
    setattr(fake if where == "init" else run, where, fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert log("wandb", tmp_path, LINES) == [
        "log      wandb failed, metrics.jsonl has what follows: ConnectionError: no network"
    ]


def test_a_library_that_is_missing_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="--log mlflow needs a package .* pip install mlflow"):
        loggers.check("mlflow")
    loggers.check("none")
