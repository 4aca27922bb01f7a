"""Steps and states that are not finite: not applied, not saved, named."""

import math
import shutil

import pytest
import torch

from moekernels.errors import RunError
from moekernels.model.layout import Layout
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import shard
from moekernels.train.metrics import METRICS, read_metrics
from moekernels.train.nonfinite import Guard
from python_tests.support.distributed import run_ranks
from python_tests.support.small_runs import train_here
from python_tests.support.strict_json import strict

RUN = "--sequences 4 --microbatches 2 --warmup 4 --eval-sequences 4".split()


@pytest.fixture
def run(text, cache, tmp_path, capfd):
    """A run in tmp_path/run: its exit code, lines of metrics, and what it said on stderr."""

    def one(*more):
        out = tmp_path / "run"
        code = train_here(text, out, *RUN, *more)
        lines = [strict(x) for x in (out / METRICS).read_text().splitlines()]
        return code, lines, capfd.readouterr()

    one.folder = tmp_path / "run"
    return one


def poison(monkeypatch, steps, rank=0, expert=3):
    """In these steps a rank's gradient of an expert becomes infinite. Forked ranks have it too."""
    reduce = Optimizer.reduce
    seen = [0]

    def poisoned(self):
        seen[0] += 1
        if seen[0] in steps and self.mesh.rank == rank:
            name = next(n for n in reversed(self.parameters) if n.endswith("experts.w1"))
            self.parameters[name][0].main_grad[expert] = math.inf
        reduce(self)

    monkeypatch.setattr(Optimizer, "reduce", poisoned)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(run):
    more = ("--steps", "12", "--save-every", "1", "--keep", "2")
    code, lines, said = run(*more, "--lr", "1e4")
    assert code == 1 and said.err.count("\n") == 1 and "Traceback" not in said.err
    step = lines[-1]["step"]
    assert f"step {step} is not applied: its " in said.err
    assert lines[-1]["grad_norm"] is None and "grad_norm" in lines[-1]["nonfinite"]
    assert [x["skipped"] for x in lines] == [0] * (step - 1) + [1]
    saved = sorted(p.name for p in (run.folder / "checkpoints").glob("step-*"))
    assert saved == [f"step-{s:07d}" for s in (step - 2, step - 1)]


def test_a_bad_step_is_skipped_and_changes_nothing(run, monkeypatch, tmp_path):
    """Neither parameters, moments, selection biases nor the optimiser's step count; resumed behind
    it, the run is the same bit for bit."""
    states = {}
    check = Guard.check_state

    def recorded(self, step, state):
        state = list(state)
        check(self, step, state)
        states[step] = {name: x.clone() for name, x, _ in state}

    monkeypatch.setattr(Guard, "check_state", recorded)
    poison(monkeypatch, {3})
    more = ("--steps", "4", "--save-every", "1", "--keep", "9", "--bias-update-rate", "0.01")
    code, lines, said = run(*more, "--skip-bad-steps", "1")
    assert code == 0 and [x["skipped"] for x in lines] == [0, 0, 1, 0]
    assert "step 3 skipped: its gradient's norm is inf" in said.out
    assert "layers.2.moe.experts.w1 (layer 2, expert 3)" in said.out
    assert "steps skipped" in said.out and "1, not applied" in said.out
    for name, x in states[2].items():
        assert torch.equal(x, states[3][name]), name
        assert x.isfinite().all() and not torch.equal(x, states[4][name])
    assert any("selection_bias" in name for name in states[2])
    assert lines[2]["lr"] == lines[3]["lr"] > lines[1]["lr"]

    shutil.rmtree(run.folder / "checkpoints" / "step-0000004")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # undone as well
    code, again, _ = run(*more, "--skip-bad-steps", "1", "--resume")
    for key in ("loss", "grad_norm", "lr", "skipped"):
        assert [x[key] for x in again] == [x[key] for x in lines], key


def test_more_bad_steps_in_a_row_than_allowed_stop_all_ranks(run, monkeypatch):
    poison(monkeypatch, {1, 3, 4, 5}, rank=3, expert=1)
    layout = ("--tp", "2", "--pp", "2", "--steps", "9")
    code, lines, said = run(*layout, "--skip-bad-steps", "2", "--save-every", "1")
    assert code == 1 and said.err.count("\n") == 1
    # Expert 1 of the second half of 8, which tp rank 1 of the last stage holds.
    assert "step 5 is not applied" in said.err and "(layer 2, expert 5)" in said.err
    assert [x["skipped"] for x in lines] == [1, 0, 1, 1, 1]


def test_a_held_out_loss_that_is_not_finite_stops_the_run_unsaved(run, monkeypatch):
    monkeypatch.setattr("moekernels.train.loop.evaluate", lambda trainer: math.nan)
    code, lines, said = run("--steps", "2", "--eval-every", "2", "--save-every", "1")
    assert code == 1 and "the held-out loss after step 2 is nan" in said.err
    assert lines[-1]["nonfinite"] == ["eval_loss"]
    saved = [p.name for p in (run.folder / "checkpoints").glob("step-*")]
    assert saved == ["step-0000001"]
    assert math.isnan(read_metrics(run.folder)[-1]["eval_loss"])


def bad_state(rank):
    """Rank 1 alone holds what is not finite: what every rank says of it."""
    mesh = Mesh(Layout(tp=2, ep=2))
    info = shard((4, 2), {0: [(2 * rank, 2 * rank + 2)]})
    x = torch.zeros(2, 2)
    guard, said = Guard([], mesh, 0), []
    for value in (0.0, -math.inf, math.nan):
        if rank == 1:
            x[1, 0] = value
        try:
            guard.check_state(7, [("exp_avg.layers.3.moe.experts.w1", x, info)])
        except RunError as error:
            said.append(str(error))
    return said


def test_a_state_that_is_not_finite_is_refused_by_all_ranks():
    first, second = run_ranks(2, bad_state)
    assert first == second and len(first) == 2
    assert "state after step 7" in first[0] and "w1 (layer 3, expert 3)" in first[0]


def optimizer_of(gradients, **settings):
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in gradients.items()}
    shards = [(name, p, shard(p.shape)) for name, p in parameters.items()]
    optimizer = Optimizer(shards, Mesh(Layout()), AdamWConfig(**settings))
    for name, p in parameters.items():
        p.main_grad.copy_(gradients[name])
    return optimizer, parameters


def test_the_norm_of_ordinary_gradients_is_the_same_bits():
    gradients = {"w": torch.randn(40, 30), "b": torch.randn(7)}
    optimizer, _ = optimizer_of(gradients)
    total = sum(torch.linalg.vector_norm(b.grads).double().square() for b in optimizer.buckets)
    assert torch.equal(optimizer.grad_norm(), total.sqrt())


@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_the_norm_of_finite_gradients_is_finite(size):
    gradients = {"w": torch.randn(30, 40).clamp(-1, 1) * size, "b": torch.randn(7)}
    optimizer, parameters = optimizer_of(gradients, lr=1.0, clip=1e-3, weight_decay=0.0)
    norm, _ = optimizer.step()
    expected = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    state = {name: x for name, x, _ in optimizer.state()}
    clipped = gradients["w"].double() * (1e-3 / expected) * 0.1
    torch.testing.assert_close(state["exp_avg.w"].double(), clipped, rtol=1e-5, atol=1e-12)
    assert all(x.isfinite().all() for x in state.values())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_norm_of_gradients_that_are_not_finite_is_not(bad):
    optimizer, _ = optimizer_of({"w": torch.full((3, 4), 1e30), "b": torch.tensor([1.0, bad])})
    assert not optimizer.grad_norm().isfinite()


def test_squares_that_the_moments_cannot_hold_are_a_bad_step():
    guard = Guard([], Mesh(Layout()), 0)
    line = {"step": 1, "loss": 1.0, "aux": 0.0, "z": 0.0, "grad_norm": 1e25}
    assert guard.passes(line, 1e19, clip=1.0) and line["skipped"] == 0
    assert not guard.passes(line, 1e19, clip=0.0) and line["skipped"] == 1
    with pytest.raises(RunError, match="step 1 is not applied: .* use --clip 1"):
        guard.stop_or_say(line)
