"""A split optimiser: the same training, in less memory, and checkpoints that any layout reads."""

import pytest
import torch

from python_tests.support.small_runs import losses, trained

TINY = "--layers 2 --experts 4 --d-model 16 --heads 2 --vocab-size 258 --tp 1".split()


@pytest.fixture
def train(text, cache, capfd, tmp_path):
    def run(*more, out="run"):
        trained(text, tmp_path / out, capfd, *TINY, *more)
        return losses(tmp_path / out)

    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_ranks_train_bit_for_bit_as_unsharded(train, dtype):
    """Two terms have one order; without a clip nothing hangs on the norm's last digit."""
    more = (
        "--dp",
        "2",
        "--steps",
        "3",
        "--clip",
        "0",
        "--dtype",
        dtype,
        "--optimizer-state",
        dtype,
    )
    assert train(*more) == train(*more, "--no-shard-optimizer", out="whole")


def test_a_run_goes_on_sharded_and_whole_and_elsewhere(train):
    more = ("--steps", "4", "--save-every", "2", "--keep", "9", "--clip", "0")
    expected = train("--dp", "2", *more)
    for out, steps in (("a", ("--dp", "2", "--no-shard-optimizer")), ("b", ("--dp", "2"))):
        train("--dp", "2", "--steps", "2", "--clip", "0", out=out)
        got = train(*steps, "--steps", "4", "--clip", "0", "--resume", out=out)
        assert got[:2] != got[2:] and len(got) == 4
    first = train("--dp", "2", "--ep", "2", *more, out="c")
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degrees", ["--tp 1 --dp 4 --ep 2", "--tp 2 --dp 2 --ep 2 --etp 2"])
def test_experts_that_move_stay_whole(train, degrees):
    """And those of one copy whose lifts lie whole on each etp shard; what they compute does not
    hang on it."""
    more = [*degrees.split(), "--steps", "3", "--clip", "0", "--replan", "random:1"]
    assert train(*more) == train(*more, "--no-shard-optimizer", out="whole")
