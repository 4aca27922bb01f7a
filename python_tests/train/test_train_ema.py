"""`--ema`: a moving average of the weights, against one by hand, through layouts, checkpoints,
evaluation, export and the planner."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moekernels import cli
from moekernels.parallel.average import approach
from moekernels.plan.memory import owned_parameters, stage_memory
from moekernels.plan.problem import configured
from moekernels.run import files as cfg
from moekernels.run.folder import read_metrics
from moekernels.train import checkpoint, generating, manifest, weights
from python_tests.support.small_runs import train_here

DECAY = 0.75
RUN = ["--steps", "4", "--sequences", "8", "--microbatches", "2", "--warmup", "1"]
RUN += ["--eval-sequences", "4", "--save-every", "1", "--keep", "9", "--ema", str(DECAY)]


def saved(out, step):
    """Full tensors of a checkpoint, by name."""
    path = out / "checkpoints" / manifest.step_name(step)
    tensors = manifest.read(path).tensors
    full = {}
    with checkpoint.shards.Reader(path) as reader:
        for name, x in tensors.items():
            full[name] = torch.empty(x.shape, dtype=getattr(torch, x.dtype))
            assert reader.fill(full[name], (0,) * len(x.shape), x)
    return full


def by_hand(out):
    """The average behind the last step, from the masters behind each, in fp64."""
    steps = [saved(out, step) for step in range(1, 5)]
    names = [name[7:] for name in steps[0] if name.startswith("master.")]
    # Behind the first step: DECAY of where the run began, which no checkpoint has.
    found = {}
    for name in names:
        average = steps[0][f"ema.{name}"].double()
        for step in steps[1:]:
            average = DECAY * average + (1 - DECAY) * step[f"master.{name}"].double()
        found[name] = average
    return found


@pytest.fixture(autouse=True)
def _kept_apart(cache):
    pass


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("ema") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(text / "cache"))
        assert train_here(text, out, *RUN) == 0
    return out


def test_it_is_the_average_of_the_masters(run):
    last = saved(run, 4)
    for name, average in by_hand(run).items():
        torch.testing.assert_close(last[f"ema.{name}"].double(), average, rtol=1e-5, atol=1e-7)
        assert last[f"ema.{name}"].dtype == torch.float32
        assert not torch.equal(last[f"ema.{name}"], last[f"master.{name}"])
    first = saved(run, 1)["master.embedding.weight"]
    assert (saved(run, 1)["ema.embedding.weight"] - first).norm() < 0.3 * first.norm(), "from 0"


LAYOUTS = {
    "sharded": ["--dp", "2", "--shard-optimizer"],
    "tp and ep": ["--tp", "2", "--ep", "2"],
    "host": ["--offload-optimizer", "0.5", "--dtype", "bf16"],
    "bf16 moments": ["--dp", "2", "--optimizer-state", "bf16", "--shard-optimizer"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_keeps_it(text, tmp_path, name):
    assert train_here(text, tmp_path / "run", *RUN, *LAYOUTS[name]) == 0
    last = saved(tmp_path / "run", 4)
    for name, average in by_hand(tmp_path / "run").items():
        torch.testing.assert_close(last[f"ema.{name}"].double(), average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", [[], ["--dp", "2", "--shard-optimizer"]], ids=["one", "two"])
def test_a_run_goes_on_bit_for_bit(text, run, tmp_path, layout):
    """In its own layout to the same averages; in another from the same ones."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for step in (3, 4):
        shutil.rmtree(out / "checkpoints" / manifest.step_name(step))
    before = saved(out, 2)
    assert train_here(text, out, *RUN, *layout, "--resume") == 0
    after, then, whole = saved(out, 3), saved(out, 4), saved(run, 4)
    for name in (name for name in before if name.startswith("ema.")):
        wanted = before[name] * DECAY + after[f"master.{name[4:]}"] * (1 - DECAY)
        assert torch.equal(after[name], wanted), name
        if not layout:
            assert torch.equal(then[name], whole[name]), name


def test_a_run_without_one_begins_it_anew(text, tmp_path, capfd):
    out = tmp_path / "run"
    plain = [*RUN[:-2], "--steps", "2"]
    assert train_here(text, out, *plain) == 0
    assert not [name for name in saved(out, 2) if name.startswith("ema.")]
    assert train_here(text, out, *RUN, "--steps", "3", "--resume") == 0
    assert "--ema was 0.0 when the checkpoint was saved, is 0.75" in capfd.readouterr().out
    before, after = saved(out, 2), saved(out, 3)
    for name in (name for name in before if name.startswith("master.")):
        wanted = before[name] * DECAY + after[name] * (1 - DECAY)
        assert torch.equal(after["ema." + name[7:]], wanted), name


def test_no_bit_hangs_on_the_place():
    master, average = torch.randn(2, 1000)
    whole = average.clone()
    approach(whole, master, 0.9)
    for begin in range(40):
        part = average[begin:].clone()
        approach(part, master[begin:], 0.9)
        assert torch.equal(part, whole[begin:])


@pytest.mark.parametrize(
    "layout", [[], ["--dp", "2", "--ep", "2", "--shard-optimizer"]], ids=["one", "two"]
)
def test_evaluation_by_the_average_leaves_the_run_as_it_is(text, tmp_path, layout):
    """And is the loss that the exported average has."""
    lines = {}
    for kind in ("model", "ema"):
        more = ["--eval-weights", kind, "--eval-every", "2", *layout]
        assert train_here(text, tmp_path / kind, *RUN, *more) == 0
        lines[kind] = read_metrics(tmp_path / kind)
    assert [x["loss"] for x in lines["model"]] == [x["loss"] for x in lines["ema"]]
    one, other = ([x["eval_loss"] for x in each if "eval_loss" in x] for each in lines.values())
    assert len(one) == len(other) == 2 and one != other
    again = ["--steps", "1", "--warmup", "0", "--lr", "1e-12", "--weight-decay", "0"]
    average = tmp_path / "average"
    _begin_with_average(tmp_path / "ema", average)
    more = [*RUN[:-2], "--init-from", str(average), *again, *layout]
    assert train_here(text, tmp_path / "again", *more) == 0
    assert read_metrics(tmp_path / "again")[-1]["eval_loss"] == pytest.approx(other[-1], rel=1e-6)


def _begin_with_average(source, out):
    """A run's folder whose weights are the average of another's."""
    shutil.copytree(source, out)
    path = out / "checkpoints" / manifest.step_name(4)
    whole = manifest.read(path)
    tensors = dict(whole.tensors)
    for name in [name for name in tensors if name.startswith("master.")]:
        tensors[name] = tensors.pop("ema." + name[7:])
    changed = {**whole.__dict__, "tensors": tensors}
    manifest.Manifest(**changed).write(path)


def test_export_and_generate_take_it_on_request(run, tmp_path, capsys):
    from safetensors.torch import load_file

    for kind in ("model", "ema"):
        found = weights.find(run, kind=kind)
        model = generating.load(found, "cpu")
        prefix = weights.KINDS[kind]
        last = saved(run, 4)
        for name, p in model.named_parameters():
            assert torch.equal(p.data, last[prefix + name]), name
        out = tmp_path / kind
        assert cli.main(["export", str(run), "--out", str(out), "--weights", kind]) == 0
        written = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(written, last[prefix + "embedding.weight"])
    flags = ["generate", str(run), "--tokens", "2", "--temperature", "0", "--device", "cpu"]
    assert cli.main([*flags, "--weights", "ema"]) == 0
    capsys.readouterr()


def test_what_is_refused_is_one_line(text, run, tmp_path, capfd):
    assert train_here(text, tmp_path / "a", "--eval-weights", "ema") == 2
    assert train_here(text, tmp_path / "b", "--ema", "1") == 2
    assert train_here(text, tmp_path / "c", "--ema", "-0.5") == 2
    plain = tmp_path / "plain"
    assert train_here(text, plain, *RUN[:-2], "--steps", "1") == 0
    assert cli.main(["generate", str(plain), "--weights", "ema"]) == 2
    folder = tmp_path / "hf"
    assert cli.main(["export", str(run), "--out", str(folder)]) == 0
    assert cli.main(["generate", str(folder), "--weights", "ema"]) == 2
    first, second, third, fourth, fifth = capfd.readouterr().err.splitlines()
    assert "there is no moving average without --ema" in first
    assert "--ema must be at most" in second and "--ema must be at least 0" in third
    assert "has no moving average of its weights; leave it out, or train with --ema" in fourth
    assert "is no run's folder" in fifth


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("bf16", 4), ("fp64", 8)])
def test_the_planner_counts_its_bytes(dtype, size):
    run = cfg.resolve("tiny", None, {("train", "dtype"): dtype})
    totals = []
    for decay in (0.0, 0.999):
        run.train.ema = decay
        totals.append(stage_memory(run.model, configured(run), 1, 512))
    owned = owned_parameters(run.model, configured(run), totals[0].parameters)
    parameters = sum(owned.values())  # split as the masters are
    assert totals[1].optimizer - totals[0].optimizer == size * parameters
    assert totals[1].total - totals[0].total == size * parameters


def test_a_plan_keeps_it(capsys):
    assert cli.main(["plan", "--json", "--gpus", "8", "--ema", "0.99"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert "--ema 0.99" in data["launch"] and data["recommended"]["strategy"]["ema"] == 0.99
