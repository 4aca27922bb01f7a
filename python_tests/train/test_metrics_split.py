"""What a step reports and learns does not depend on how it is split: micro-batches, accumulation,
data, tensor and pipeline ranks, policy."""

import pytest
import torch

from moekernels.cli import main
from moekernels.train.metrics import read_metrics

RUN = (
    "train --layers 2 --experts 8 --d-model 16 --heads 2 --head-dim 8 --expert-d-in 24 "
    "--expert-d-ff 16 --vocab-size 300 --sequences 8 --context 32 --accumulation 1 --warmup 1 "
    "--device cpu --eval-sequences 8 --dtype fp64 --steps 2 --tp 1 --balance-coef 1"
).split()
SPLITS = {
    "8 micro-batches": "--microbatches 8",
    "2 x 2 accumulated": "--microbatches 2 --accumulation 2",
    "dp": "--microbatches 2 --dp 2 --ep 2",
    "buckets": "--microbatches 2 --policy buckets",
    "padded, tp and pp": "--microbatches 2 --policy padded --tp 2 --pp 2",
}
SUMS = ("loss", "z", "grad_norm", "load_max_over_mean", "dead_experts", "dropped", "tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [f"line {i}: {'spam and eggs ' * (i % 5)}{i * i}" for i in range(1000)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    torch.set_num_threads(1)  # threads of so small a run only wait for each other

    def one(name, *more):
        out = text / name
        if not out.exists():  # the run that all are compared with
            assert main([*RUN, "--data", str(text / "text.txt"), "--out", str(out), *more]) == 0
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
