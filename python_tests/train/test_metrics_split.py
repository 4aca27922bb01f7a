"""What a step reports and learns does not depend on how it is split: microbatches, accumulation,
data, tensor and pipeline ranks, policy."""

import pytest

from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import train_here

RUN = (
    "--sequences 8 --warmup 1 --eval-sequences 8 --dtype fp64 --steps 2 --balance-coef 1"
).split()
SPLITS = {
    "8 microbatches": "--microbatches 8",
    "2 x 2 accumulated": "--microbatches 2 --accumulation 2",
    "dp": "--microbatches 2 --dp 2 --ep 2",
    "buckets": "--microbatches 2 --policy buckets",
    "padded, tp and pp": "--microbatches 2 --policy padded --tp 2 --pp 2",
}
SUMS = ("loss", "z", "grad_norm", "load_max_over_mean", "dead_experts", "dropped", "tokens")


@pytest.fixture
def run(text, cache):
    def one(name, *more):
        out = text / name
        if not out.exists():  # the run that all are compared with
            assert train_here(text, out, *RUN, *more) == 0
        return read_metrics(out)

    return one


@pytest.mark.parametrize("split", SPLITS)
def test_every_sum_is_the_same_by_sequence(run, split):
    scope = ("--balance-scope", "sequence")
    first = run("sequence", *scope, "--microbatches", "2")
    other = run(f"sequence {split}", *scope, *SPLITS[split].split())
    for key in (*SUMS, "aux"):
        assert other[0][key] == pytest.approx(first[0][key], rel=1e-12), key
        assert other[1][key] == pytest.approx(first[1][key], rel=1e-9), key  # a step's learning
    assert other[1]["eval_loss"] == pytest.approx(first[1]["eval_loss"], rel=1e-9)


def test_by_micro_batch_only_the_load_balancing_loss_is_another(run):
    first, other = run("whole", "--microbatches", "2"), run("parts", "--microbatches", "8")
    for key in SUMS:
        if key != "grad_norm":
            assert other[0][key] == pytest.approx(first[0][key], rel=1e-12), key
    assert other[0]["aux"] != pytest.approx(first[0]["aux"], rel=1e-3)
