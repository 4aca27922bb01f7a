"""`--optimizer muon`: the same losses on every layout, resumed bit for bit, planned."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moekernels import cli
from moekernels.run.folder import read_metrics
from moekernels.train import manifest, shards
from python_tests.support.small_runs import train_here

RUN = "--optimizer muon --dtype fp64 --sequences 8 --microbatches 4 --warmup 1 --eval-sequences 4"
RUN = [*RUN.split(), "--balance-scope", "sequence", "--steps", "4"]
LAYOUTS = {
    "tp2 ep2": "--tp 2 --ep 2",
    "pp2": "--pp 2",
    "dp2 ep2": "--dp 2 --ep 2",
    "dp2 sharded": "--dp 2 --shard-optimizer",
}


@pytest.fixture(autouse=True)
def _kept_apart(cache):
    pass


def losses(out):
    return [line["loss"] for line in read_metrics(out)]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("muon") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(text / "cache"))
        assert train_here(text, out, *RUN, "--save-every", "2", "--keep", "9") == 0
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_losses_of_one_process(text, tmp_path, alone, name):
    assert train_here(text, tmp_path / "run", *RUN, *LAYOUTS[name].split()) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-9)


def test_it_is_another_optimizer(text, tmp_path, alone):
    assert train_here(text, tmp_path / "run", *RUN, "--optimizer", "adamw") == 0
    other = losses(tmp_path / "run")
    assert other[0] == losses(alone)[0] and other[2] != pytest.approx(losses(alone)[2], rel=1e-4)


@pytest.mark.parametrize("name", ["", "tp2 ep2", "dp2 sharded"])
def test_a_run_goes_on(text, tmp_path, alone, name):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoints" / manifest.step_name(4))
    more = LAYOUTS[name].split() if name else []
    assert train_here(text, out, *RUN, *more, "--resume") == 0
    got, wanted = losses(out), losses(alone)
    assert got == pytest.approx(wanted, rel=1e-9)
    assert name or got == wanted


def test_in_fp32_and_bf16_it_learns(text, tmp_path):
    for dtype in ("fp32", "bf16"):
        more = ["--dtype", dtype, "--optimizer-state", dtype, "--steps", "6", "--ema", "0.9"]
        assert train_here(text, tmp_path / dtype, *RUN, *more) == 0
        found = losses(tmp_path / dtype)
        assert found[-1] < found[0] - 0.1


def test_what_is_refused_is_one_line(text, tmp_path, alone, capfd):
    tries = (
        "--tp 2 --etp 2 --ep 1",
        "--offload-optimizer 0.5",
        "--offload-optimizer auto",
        "--optimizer sgd",
        "--momentum 1",
    )
    for number, flags in enumerate(tries):
        assert train_here(text, tmp_path / str(number), *RUN, *flags.split()) == 2
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    more = ["--optimizer", "adamw", "--steps", "6", "--resume"]
    assert train_here(text, out, *RUN, *more) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(tries) + 1
    assert "--etp 2 parts each expert's" in lines[0] and "leave --offload-optimizer out" in lines[1]
    assert "leave --offload-optimizer out" in lines[2]
    assert "adamw or muon" in lines[3] or "adamw, muon" in lines[3] or "'sgd'" in lines[3]
    assert "--momentum must be at most 0.9999" in lines[4]
    assert "was saved with --optimizer muon, this run has adamw" in lines[5]


def test_a_plan_counts_it(capsys):
    best = {}
    for name in ("adamw", "muon"):
        assert cli.main(["plan", "--json", "--gpus", "8", "--optimizer", name]) == 0
        best[name] = json.loads(capsys.readouterr().out)
    one, other = (best[name]["recommended"] for name in ("adamw", "muon"))
    assert "--optimizer muon" in best["muon"]["launch"] and "muon" not in best["adamw"]["launch"]
    assert other["step_parts"]["optimizer"] != one["step_parts"]["optimizer"]
    assert {p["strategy"]["optimizer"] for p in best["muon"]["pareto"]} == {"muon"}


def test_experts_that_move_take_momentum_and_average_along(text, tmp_path):
    """The run's bits stay, in the checkpoint too; so does the loss that the average has."""
    more = "--dp 2 --ep 2 --ema 0.5 --eval-weights ema --save-every 4 --no-shard-optimizer"
    tensors = []
    for name, replan in (("here", "never"), ("moved", "random:1")):
        out = tmp_path / name
        assert train_here(text, out, *RUN, *more.split(), "--replan", replan) == 0
        lines = read_metrics(out)
        saved = manifest.read(out / "checkpoints" / manifest.step_name(4))
        full = {}
        with shards.Reader(out / "checkpoints" / manifest.step_name(4)) as reader:
            for key, x in saved.tensors.items():
                full[key] = torch.empty(x.shape, dtype=getattr(torch, x.dtype))
                assert reader.fill(full[key], (0,) * len(x.shape), x)
        tensors.append(([x["loss"] for x in lines], lines[-1]["eval_loss"], full))
    (losses_here, held_here, here), (losses_moved, held_moved, moved) = tensors
    assert losses_here == losses_moved and held_here == held_moved
    assert (
        "ema.layers.1.moe.experts.w1" in here and "exp_avg_sq.layers.1.moe.experts.w1" not in here
    )
    assert here.keys() == moved.keys()
    assert all(torch.equal(x, moved[key]) for key, x in here.items())
