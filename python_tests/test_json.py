"""What is written as JSON is JSON, whatever the numbers."""

import ast
import json
import math
from pathlib import Path

import pytest

from moekernels import jsonio
from moekernels.run.sections import RunConfig
from moekernels.train.metrics import METRICS, RunFolder, read_metrics
from python_tests.support.strict_json import strict

ROOT = Path(__file__).resolve().parents[1]


def test_numbers_that_are_not_finite_are_null_and_named():
    line = {"step": 1, "loss": math.nan, "z": -math.inf, "loads": [1.0, math.inf], "lr": 0.1}
    assert strict(jsonio.dumps(line)) == {
        "step": 1,
        "loss": None,
        "z": None,
        "loads": [1.0, None],
        "lr": 0.1,
        "nonfinite": ["loss", "z", "loads"],
    }
    nested = {"a": {"b": math.nan}, "c": [{"d": math.inf}, 2], "e": (1, 2)}
    assert strict(jsonio.dumps(nested)) == {
        "a": {"b": None, "nonfinite": ["b"]},
        "c": [{"d": None, "nonfinite": ["d"]}, 2],
        "e": [1, 2],
    }
    assert strict(jsonio.dumps([math.nan, 1.0])) == [None, 1.0]


def test_ordinary_values_are_written_as_ever():
    value = {"a": [1, 2.5, "é", True, None], "b": {"c": ()}}
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}):
        assert jsonio.dumps(value, **options) == json.dumps(value, **options)


def test_metrics_come_back_with_their_nans(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    folder.begin(RunConfig(), 0)
    folder.write({"step": 1, "loss": 2.0})
    folder.write({"step": 2, "loss": math.inf})
    folder.begin(RunConfig(), 2)  # as a resumed run does: the lines are written anew
    text = (folder.path / METRICS).read_text()
    assert [strict(line) for line in text.splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "nonfinite": ["loss"]},
    ]
    first, second = read_metrics(folder.path)
    assert first == {"step": 1, "loss": 2.0}
    assert math.isnan(second.pop("loss")) and second == {"step": 2}


@pytest.mark.parametrize("folder", ["moekernels", "bench"])
def test_one_function_writes_json(folder):
    stray = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path == Path(jsonio.__file__).resolve():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder"):
                if isinstance(node.value, ast.Name) and node.value.id == "json":
                    stray.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and node.module == "json":
                stray.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not stray, f"moekernels.jsonio.dumps writes JSON; elsewhere: {stray}"
