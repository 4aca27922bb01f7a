"""Training under a schedule that puts gradients of weights off is training under 1F1B."""

from __future__ import annotations

import json
import shutil

import pytest

from moekernels.cli import main
from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import argv, losses

# Over two stages, with lengths that vary and layers that are computed again.
MORE = "--pp 2 --steps 4 --save-every 2 --checkpoint-layers 2-3 --lengths 8:48 --lr 1e-2".split()


def norms(out):
    return [line["grad_norm"] for line in read_metrics(out)]


def test_zb_trains_bit_for_bit_as_1f1b_and_resumes(text, tmp_path, cache):
    whole, split = tmp_path / "1f1b", tmp_path / "zb"
    assert main(argv(text, whole, *MORE)) == 0
    assert main(argv(text, split, *MORE, "--schedule", "zb")) == 0
    assert (losses(split), norms(split)) == (losses(whole), norms(whole))
    passes = [
        (e["pid"], e["name"])
        for e in json.loads((split / "trace.json").read_text())["traceEvents"]
        if e["ph"] == "X" and e["tid"] == 0
    ]
    assert sorted(passes) == sorted(
        (stage, f"{kind}{m}") for stage in (0, 1) for kind in "FIW" for m in range(4)
    )
    for out in (split, whole):  # from its own checkpoint, and from the other schedule's
        shutil.rmtree(out / "checkpoints" / "step-0000004")
        expected = losses(out), norms(out)
        assert main(argv(text, out, *MORE, "--schedule", "zb", "--resume")) == 0
        assert (losses(out), norms(out)) == expected


def test_micro_batches_are_chosen_under_zb(text, tmp_path, cache, capfd):
    """Without a loss of each micro-batch's own, and in fp64, all numbers train alike."""
    more = "--pp 2 --steps 8 --balance-coef 0 --dtype fp64".split()
    chosen, fixed = tmp_path / "auto", tmp_path / "fixed"
    zb = ("--schedule", "zb", "--microbatches", "auto")
    assert main(argv(text, chosen, *more, *zb)) == 0
    assert "m* = " in capfd.readouterr().out
    assert main(argv(text, fixed, *more)) == 0
    assert losses(chosen) == pytest.approx(losses(fixed), rel=1e-9)
