"""Four of the promised layouts compute what one process computes; and a mistake would be seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekernels.errors import UsageError
from moekernels.model.dispatch import WAYS
from moekernels.parallel.optimizer import Optimizer
from moekernels.verify import compare as module
from moekernels.verify.command import verify, verify_layout
from moekernels.verify.variants import LAYOUTS, Variant, variants_of

ROOT = Path(__file__).resolve().parents[2]
TESTED = [
    {"tp": 2, "pp": 4},
    {"dp": 8, "ep": 8},
    {"tp": 2, "dp": 2, "etp": 2, "ep": 2},
    {"tp": 2, "pp": 2},
]


@pytest.mark.parametrize("degrees", TESTED, ids=str)
def test_a_layout_computes_what_one_process_computes(degrees, capfd):
    """All variants within one start of the ranks: schedules, K from 1 to 8, 6 experts."""
    assert degrees in LAYOUTS
    variants = variants_of(degrees, steps=2)
    assert verify_layout(degrees, variants, "fp64", "cpu") == 0
    out = capfd.readouterr().out
    assert out.count("  ok\n") == len(variants) and "FAILED" not in out


def test_the_variants_are_those_promised():
    found = variants_of({"tp": 2, "pp": 4}, 3)
    assert {v.top_k for v in found if v.experts == 8} == set(range(1, 9))
    schedules = {(v.schedule, v.virtual_stages) for v in found}
    assert schedules == {("1f1b", 1), ("zb", 1), ("overlap", 1), ("interleaved", 2), ("zb", 2)}
    assert any(v.experts == 6 for v in found)
    assert any(v.guests for v in found)
    tied = {(v.schedule, v.virtual_stages) for v in found if v.tied}
    assert tied == schedules and {v.shard_optimizer for v in found if v.tied} == {True, False}
    assert {v.dispatcher for v in variants_of({"dp": 8, "ep": 8}, 3)} == {"auto", *WAYS}
    assert {v.dispatcher for v in found} == {"auto", *WAYS} - {"hierarchical"}, "one rank a node"
    assert not any(v.experts == 6 for v in variants_of({"dp": 8, "ep": 8}, 3)), "8 do not divide 6"
    schedules = {(v.schedule, v.virtual_stages) for v in variants_of({"tp": 4}, 3)}
    assert schedules == {("1f1b", 1), ("zb", 1), ("zb", 2), ("overlap", 1)}
    alone = {v.schedule for v in variants_of({"tp": 4, "ep": 1}, 3)}
    assert alone == {"1f1b", "zb"}, "where no rows are exchanged none are hidden"


@pytest.mark.parametrize("mistake", ["gradient", "reduction", "loss", "choice", "parameter"])
def test_a_mistake_is_seen_and_named(mistake, monkeypatch, capfd):
    side = module.Side
    if mistake == "gradient":
        step = side.step

        def wrong(self, batches, hook):
            loss = step(self, batches, hook)
            if self.mesh.world.size > 1 and self.mesh.rank == 1:
                name, p, _ = next(s for s in self.shards if s[0].endswith("experts.w2"))
                p.main_grad.view(-1)[0] += 1e-6 * p.main_grad.abs().max()
            return loss

        monkeypatch.setattr(side, "step", wrong)
    elif mistake == "reduction":
        monkeypatch.setattr(Optimizer, "reduce", lambda self: None)
    elif mistake == "loss":
        step = side.step
        monkeypatch.setattr(
            side, "step", lambda s, *a: step(s, *a) * (1 + 1e-8 * (s.mesh.world.size > 1))
        )
    elif mistake == "choice":
        differing = module._differing

        def other(logits, ids, wanted, tie):
            return differing(logits, ids.roll(1, 0), wanted, tie)

        monkeypatch.setattr(module, "_differing", other)
    else:
        init = side.__init__

        def forgetful(self, run, mesh):
            init(self, run, mesh)
            if mesh.world.size > 1:
                self.shards = [s for s in self.shards if "moe_norm" not in s[0]]

        monkeypatch.setattr(side, "__init__", forgetful)
    assert verify_layout({"tp": 2}, [Variant(steps=1)], "fp64", "cpu") == 1
    out = capfd.readouterr().out
    assert "FAILED" in out
    expected = {"gradient": "experts.w2", "choice": "differ", "parameter": "on no rank"}
    assert expected.get(mistake, "worst gradient") in out


def torchrun(*arguments):
    """A command under torchrun on four ranks; what it printed, and its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "-m", "moekernels", "verify", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


def test_under_torchrun():
    """It takes the ranks it is given, all leave, and rank 0 alone speaks."""
    done = torchrun("--tp", "2", "--dp", "2", "--ep", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dense    4 ranks = tp 2 x dp 2 x pp 1") == 1
    assert done.stdout.count("  ok\n") == 1


def test_all_layouts_start_their_own_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="leave torchrun out"):
        verify({}, everything=True)


def test_ties_are_told_from_other_choices():
    logits = torch.tensor([[2.0, 1.0, 1.0 + 1e-9, 0.0]] * 3, dtype=torch.float64)
    ids = torch.tensor([[0, 2], [0, 2], [0, 2]])
    wanted = torch.tensor([[2, 0], [0, 1], [0, 3]])  # the same set, a tie, neither
    assert module._differing(logits, ids, wanted, 1e-5) == (1, 1)
    assert module._differing(logits, ids, wanted, 1e-12) == (0, 2)


def test_bad_requests():
    for given, text in (
        ({"dtype": "fp16"}, "--dtype"),
        ({"schedule": "x"}, "--schedule"),
        ({"steps": 0}, "--steps"),
        ({"device": "tpu"}, "--device"),
        ({"top_k": 9}, "top_k 9"),
    ):
        with pytest.raises(UsageError, match=text):
            verify({"tp": 2}, **given)
