"""`--offload-optimizer`: the same run, whatever part of its state lies in the host's memory."""

import pytest

from moekernels.cli import main
from python_tests.support.small_runs import argv, losses, trained

TINY = "--layers 2 --experts 4 --d-model 16 --heads 2 --vocab-size 258 --tp 1 --dp 2".split()
BF16 = "--dtype bf16 --optimizer-state bf16".split()


@pytest.fixture
def train(text, cache, capfd, tmp_path):
    def run(*more, out="run"):
        printed = trained(text, tmp_path / out, capfd, *TINY, *more)
        return losses(tmp_path / out), printed

    return run


def test_losses_have_the_same_bits_through_moves(train):
    """Experts that move between ranks cross the border between card and host."""
    moves = ("--ep", "2", "--replan", "random:1", "--dispatcher", "all_to_all", *BF16)
    expected, said = train(*moves, "--steps", "5", out="here")
    assert "of a rank's state lie in the host's" not in said
    got, said = train(*moves, "--steps", "5", "--offload-optimizer", "0.3", out="host")
    assert got == expected
    assert "MiB of a rank's state lie in the host's" in said


def test_a_run_goes_on_with_another_share(train):
    more = ("--save-every", "2", "--lr-schedule", "constant")
    expected, _ = train(*more, "--steps", "4", out="here")
    train(*more, "--steps", "2", "--offload-optimizer", "0.5")
    got, said = train(*more, "--steps", "4", "--offload-optimizer", "1", "--resume")
    assert got == expected
    assert "offload" not in "".join(x for x in said.splitlines() if x.startswith("resume"))


def test_auto_keeps_all_where_there_is_no_card(train):
    _, said = train("--steps", "1", "--offload-optimizer", "auto")
    assert "offload  auto: 0 of the optimizer's state" in said


@pytest.mark.parametrize("share", ["-0.1", "1.5", "half", "nan"])
def test_other_shares_are_refused(share, text, tmp_path, capfd):
    assert main(argv(text, tmp_path / "run", *TINY, f"--offload-optimizer={share}")) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--offload-optimizer" in err
