"""The command line from outside: exit codes and the one line that a mistake costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekernels import cli
from moekernels.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *argv):
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["train", "--stps", "3"], ["--stps", "--steps"]),
        (["train", "more"], ["unknown argument more; see moekernels train -h"]),
        (["train", "--lr", "fast"], ["--lr", "'fast'"]),
        (["train", "--lr", "-1"], ["--lr", "greater than 0"]),
        (["train", "--steps", "2.5"], ["--steps", "whole number"]),
        (["train", "--preset", "tny"], ["tny", "tiny"]),
        (["train", "--dtype", "fp8"], ["--dtype", "'fp8'"]),
        (["train", "--config", "no/such.toml"], ["no/such.toml", "no such file"]),
        (["train", "--tp", "3"], ["tp 3", "4"]),
        (["train", "--pp", "3"], ["pp 3", "16 layers", "4"]),
        (["train", "--dp", "7", "--ep", "7"], ["ep 7", "64 experts", "8"]),
        (["train", "--dp", "2", "--ep", "4"], ["ep 1 or 2"]),
        (["train", "--layers-per-stage", "4,4,4,5"], ["4,4,4,5", "16"]),
        (["train", "--layers-per-stage", "four"], ["four"]),
        (["train", "--checkpoint-layers", "2-99"], ["2-99", "16"]),
        (["train", "--data", "/no/such/text"], ["/no/such/text", "missing"]),
        (["train", "--out", "/proc/run"], ["/proc/run"]),
        (["train", "--resume", "--out", "/tmp/moekernels-never-there"], ["no checkpoint"]),
        (["verify", "--tp", "3"], ["tp 3"]),
        (["verify", "--experts", "6", "--dp", "4", "--ep", "4"], ["ep 4", "6 experts"]),
        (["verify", "--dtype", "bf16"], ["bf16", "it is one of fp32, fp64"]),
        (["verify", "--schedule", "1f1d"], ["1f1d", "1f1b"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2"], ["K missing", "T=16384"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2 K=3"], ["K=3", "E=2"]),
        (["info", "--explain", "T=4 H=8 F=8 E=two K=1"], ["E must be", "'two'"]),
        (["info", "--explain", "T=0 H=8 F=8 E=2 K=1"], ["T must be", "'0'"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2 K=1 Q=3"], ["'Q=3'"]),
        (["info", "--explain", ""], ["T H F E K missing"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2 K=1 dtype=fp8"], ["dtype", "'fp8'", "bf16"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2 K=1", "--device", "h200"], ["--device", "sm_90"]),
        (["info", "--explain", "T=4 H=8 F=8 E=2 K=1", "--device", "sm_70"], ["sm_80 or later"]),
        (["info", "--device", "sm_90"], ["--device", "--explain"]),
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["x"], ["unknown command x", "plan, import, export, generate, experts, bench, info"]),
        ([], ["no command given", "plan, import, export, generate, experts, bench, info"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_costs_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, argv, parts):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("moekernels: ") and "Traceback" not in err
    for part in parts:
        assert part in err
    assert not list(tmp_path.rglob("*")), "nothing is left behind"


def test_info_says_what_is_here(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for name in ("moekernels", "backends", "torch", "python", "cpu", "memory", "gpu"):
        assert f"\n{name}" in "\n" + out


def test_help_shows_every_key(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for flag in (
        "--tp",
        "--experts",
        "--top-k",
        "--lengths",
        "--optimizer-state",
        "--save-every",
        "--no-gated",
    ):
        assert flag in out


def test_bench_elsewhere_than_in_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("moekernels.cli.commands.__file__", str(tmp_path / "moekernels/cli/x.py"))
    code, _, err = run(capsys, "bench")
    assert code == 2 and "source checkout" in err


@pytest.mark.parametrize("command", ["train", "plan", "verify", "bench"])
def test_a_missing_package_is_named_before_anything_begins(capsys, monkeypatch, command):
    here = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "numpy" else here(name))
    code, out, err = run(capsys, command)
    assert code == 2 and not out
    assert err == f"moekernels: {command} needs packages that are not here: pip install numpy\n"


def test_module_and_script_are_the_same_program():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "moekernels", "train", "--preset", "x"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("moekernels: unknown preset 'x'")
        and not done.stdout
    )
    assert '"moekernels.cli:main"' in (ROOT / "pyproject.toml").read_text()
