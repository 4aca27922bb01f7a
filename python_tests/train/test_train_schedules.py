"""Training under a schedule that puts weights' gradients off, or runs passes in pairs, is training
under 1F1B."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

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
        if e["ph"] == "X" and e["tid"] == 0 and "planned" not in e["args"]
    ]
    assert sorted(passes) == sorted(
        (stage, f"{kind}{m}") for stage in (0, 1) for kind in "FIW" for m in range(4)
    )
    for out in (split, whole):  # from its own checkpoint, and from the other schedule's
        shutil.rmtree(out / "checkpoints" / "step-0000004")
        expected = losses(out), norms(out)
        assert main(argv(text, out, *MORE, "--schedule", "zb", "--resume")) == 0
        assert (losses(out), norms(out)) == expected


def test_zb_over_virtual_stages_trains_bit_for_bit_as_interleaved_1f1b(text, tmp_path, cache):
    """Of microbatches that cost alike: others are put in the order that suits the schedule."""
    more = "--pp 2 --virtual-stages 2 --steps 3 --checkpoint-layers 2-3 --lr 1e-2".split()
    whole, split = tmp_path / "interleaved", tmp_path / "zb"
    assert main(argv(text, whole, *more, "--schedule", "interleaved")) == 0
    assert main(argv(text, split, *more, "--schedule", "zb")) == 0
    assert (losses(split), norms(split)) == (losses(whole), norms(whole))


def test_zb_over_virtual_stages_resumes(text, tmp_path, cache):
    more = [*MORE, "--virtual-stages", "2", "--schedule", "zb"]
    assert main(argv(text, tmp_path, *more)) == 0
    expected = losses(tmp_path), norms(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000004")
    assert main(argv(text, tmp_path, *more, "--resume")) == 0
    assert (losses(tmp_path), norms(tmp_path)) == expected


@pytest.mark.parametrize(
    "flags",
    [
        "--schedule zb",
        "--schedule zb --virtual-stages 2",
        "--schedule overlap --tp 1 --dp 2 --ep 2",
    ],
)
def test_micro_batches_are_chosen_under_any_schedule(flags, text, tmp_path, cache, capfd):
    """Without a loss of each microbatch's own, and in fp64, all numbers train alike."""
    more = "--pp 2 --steps 8 --balance-coef 0 --dtype fp64".split()
    chosen, fixed = tmp_path / "auto", tmp_path / "fixed"
    flags = [*more, *flags.split(), "--microbatches", "auto"]
    assert main(argv(text, chosen, *flags)) == 0
    assert "m* = " in capfd.readouterr().out
    assert main(argv(text, fixed, *more)) == 0
    assert losses(chosen) == pytest.approx(losses(fixed), rel=1e-9)


PAIRS = "--schedule overlap --dp 2 --ep 2".split()


def test_overlap_trains_bit_for_bit_as_1f1b_and_resumes(text, tmp_path, cache):
    """Also where two layers are computed again, lengths vary, and experts move."""
    more = ("--pp", "1", *MORE[2:], "--replan", "random:1")
    whole, pairs = tmp_path / "1f1b", tmp_path / "overlap"
    assert main(argv(text, whole, *more, "--dp", "2", "--ep", "2")) == 0
    assert main(argv(text, pairs, *more, *PAIRS)) == 0
    assert (losses(pairs), norms(pairs)) == (losses(whole), norms(whole))
    events = json.loads((pairs / "trace.json").read_text())["traceEvents"]
    for pid in (0, 1):  # measured, planned
        mine = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        passes = sorted((e["ts"], e["name"]) for e in mine if e["tid"] == 0)
        track = [name for _, name in passes]
        # a pair's pieces: of 4 layers 9 of a forward, and 13 of the backward before it
        assert track.count("F1") >= 9 and track.count("B0") >= 13
        assert sum(a != b for a, b in pairwise(track)) >= 3 * 2 * 8
        assert sum(e.get("cat") == "exchange" for e in mine) == 4 * 4 * 4
    shutil.rmtree(pairs / "checkpoints" / "step-0000004")
    expected = losses(pairs), norms(pairs)
    assert main(argv(text, pairs, *more, *PAIRS, "--resume")) == 0
    assert (losses(pairs), norms(pairs)) == expected


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--dp", "2", "--ep", "1"), "with ep 1 x etp 1 there is none"),
        (("--dp", "2", "--ep", "2", "--top-k", "3"), "give --dispatcher all_to_all"),
        (("--dp", "2", "--ep", "2", "--microbatches", "auto"), "give a number of 2 or more"),
        (("--dp", "2", "--ep", "2", "--exchange-parts", "2"), "--exchange-parts 2 cuts what"),
        (("--dp", "2", "--ep", "2", "--pp", "2", "--virtual-stages", "2"), "--virtual-stages 2"),
    ],
)
def test_overlap_is_refused_where_it_hides_nothing(text, tmp_path, capfd, flags, says):
    assert main(argv(text, tmp_path / "out", *flags, "--schedule", "overlap")) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1
