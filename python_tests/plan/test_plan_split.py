"""What a backward in two takes and leaves, as the planner counts it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.ops import _deferred
from moekernels.parallel.mesh import Mesh
from moekernels.pipeline.build import build
from moekernels.pipeline.schedule import Kind
from moekernels.plan.evaluate import batch_sizes, flush_costs, lower_bound, play
from moekernels.plan.memory import chunk_activations, layer_bytes, place_of, stage_memory
from moekernels.plan.search import Space, search
from moekernels.plan.strategy import Strategy
from python_tests.support.activations import DTYPES, pack, small, total, tracking
from python_tests.support.plans import problem


def _measure(model, layers, dtype, tokens, checkpoint, queue):
    """(left behind by a backward that puts weights' gradients off to `queue`, its peak), bytes
    above the state."""
    batch = pack(tokens)
    chunk = StageModel(
        model, Mesh(Layout()), range(1, layers + 1), True, False,
        dtype=DTYPES[dtype], checkpoint_layers=checkpoint,
    )  # fmt: skip
    with tracking(chunk, batch) as tracker:
        before = total(tracker, "current")
        y = chunk(batch, None)
        edge, grad = torch.autograd.graph.get_gradient_edge(y), torch.ones_like(y)
        del y
        with _deferred.deferred(queue):
            torch.autograd.backward([edge], [grad])
        del edge
        owed = total(tracker, "current") - before - grad.nbytes
        peak = total(tracker, "peak") - before
        queue.run()
        left = total(tracker, "current") - before - grad.nbytes
    assert len(queue) == 0
    return owed - left, peak - left


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_in": 128, "qk_norm": True},
        {"shared_d_ff": 96, "shared_gate": True, "dense_layers": 1, "dense_d_ff": 160},
        {"kv_rank": 24, "q_rank": 20, "rotary_dim": 4},
    ],
    ids=str,
)
def test_what_a_backward_leaves_to_its_weights(dtype, checkpoint, options):
    model, tokens = small(**options), 512
    owed, peak = _measure(model, 3, dtype, tokens, range(1, 1 + checkpoint), _deferred.Queue())
    s = Strategy(Layout(), (3,), (checkpoint,), 1, dtype=dtype)
    kinds = s.kinds_of_layers(model, 0)
    said = chunk_activations(model, place_of(s, tokens, device="cpu"), kinds, True, False)
    message = tokens * model.d_model * DTYPES[dtype].itemsize  # the output's gradient
    most = said.kept + said.split + message
    assert said.owed == pytest.approx(owed, rel=0.03)
    assert 0.97 * peak <= most <= 1.15 * peak


@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"d_in": 128}, {"shared_d_ff": 96, "shared_gate": True, "dense_layers": 1}],
    ids=str,
)
def test_what_a_backward_leaves_to_be_joined(checkpoint, options):
    options = {"dense_d_ff": 160, **options} if "dense_layers" in options else options
    model, tokens = small(**options), 512
    owed, peak = _measure(model, 3, "fp32", tokens, range(1, 1 + checkpoint), _deferred.Joined())
    s = Strategy(Layout(), (3,), (checkpoint,), 1, dtype="fp32")
    kinds = s.kinds_of_layers(model, 0)
    said = chunk_activations(model, place_of(s, tokens, device="cpu"), kinds, True, False)
    message = tokens * model.d_model * 4  # the output's gradient
    assert said.joined == pytest.approx(owed, rel=0.08)
    assert 0.9 * peak <= said.kept + said.apart + message <= 1.13 * peak


def test_the_planner_counts_what_waits_to_be_joined():
    task, s = problem(gpus=2), Strategy(Layout(pp=2), (1, 1), (0, 0), 8)
    one, three = (
        stage_memory(task.model, replace(s, at_once=n), 0, 512).activations for n in (1, 3)
    )
    layer = layer_bytes(task.model, place_of(s, 512))
    assert three - one == pytest.approx(2 * layer.joined) and layer.joined > 0


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_a_backward_in_two_takes_what_it_takes_in_one(checkpointed):
    """And one action more: W has each product once, without what attention squares or a layer
    computes again."""
    task = problem(gpus=2, action_overhead=1e-3)
    s = Strategy(Layout(pp=2), (2, 2), (checkpointed, 0), 4)
    sl = batch_sizes(task.model, task.batch, 1, 4, 1)
    one, two = (flush_costs(task, replace(s, schedule=name), sl) for name in ("1f1b", "zb"))
    for v in range(2):
        assert (two[v, Kind.F] == one[v, Kind.F]).all()
        both = two[v, Kind.I] + two[v, Kind.W]
        assert both == pytest.approx(one[v, Kind.B] + 1e-3, rel=1e-12)
        assert (two[v, Kind.W] < two[v, Kind.I]).all()
    assert (two[0, Kind.W] == two[1, Kind.W]).all()
    assert (two[0, Kind.I] > two[1, Kind.I]).all() == bool(checkpointed)


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_no_flush_is_shorter_than_its_bound(schedule):
    for pp, microbatches in ((2, 4), (4, 4), (4, 16)):
        task = problem(gpus=pp, action_overhead=0.0)
        for layers in ((1,) * 4, (3, 1), (1, 3)):
            if len(layers) == pp:
                s = Strategy(Layout(pp=pp), layers, (0,) * pp, microbatches, schedule)
                sl = batch_sizes(task.model, task.batch, 1, microbatches, 1)
                assert lower_bound(task, s, sl) <= play(task, s, sl)[0].makespan


def test_the_planner_counts_what_a_split_backward_holds():
    """Beside 1F1B's: a stage's W that wait, most of them on the last."""
    task = problem(gpus=4)
    for rank in range(4):
        one, two = (
            stage_memory(task.model, Strategy(Layout(pp=4), (1,) * 4, (0,) * 4, 8, name), rank, 512)
            for name in ("1f1b", "zb")
        )
        layer = layer_bytes(task.model, place_of(Strategy(Layout(pp=4), (), (), 8), 512)).owed
        waiting = rank * (layer.inputs + layer.gradients)
        assert two.activations == pytest.approx(one.activations + waiting)
        assert two.working >= one.working


def test_the_planner_counts_what_virtual_stages_hold():
    """At some moment of a flush, chunk by chunk; on the first rank two, of one layer each."""
    task = problem(gpus=2)
    s = Strategy(Layout(pp=2), (1,) * 4, (0,) * 4, 4, "zb", 2)
    chunks = [
        chunk_activations(
            task.model, place_of(s, 512), s.kinds_of_layers(task.model, v), v == 0, False
        )
        for v in (0, 2)
    ]
    kept, owed = Counter(), Counter()
    most = 0.0
    for action in build("zb", 2, 4, 2).computations(0):
        kept[action.chunk] += action.kind is Kind.F
        if action.kind is not Kind.W:
            now = sum(kept[c] * chunks[c].kept + owed[c] * chunks[c].owed for c in (0, 1))
            most = max(most, now)
        kept[action.chunk] -= action.kind is Kind.I
        owed[action.chunk] += (action.kind is Kind.I) - (action.kind is Kind.W)
    found = stage_memory(task.model, s, 0, 512)
    assert found.activations == pytest.approx(most)
    assert found.working == max(chunk.split for chunk in chunks)


def test_a_search_weighs_zb_beside_1f1b():
    """Where stages wait for each other it wins, and on one stage it is not asked."""
    task = problem(gpus=4, memory=2e9)
    chosen = search(task, Space(pp=4, microbatches=4)).best
    named = search(task, Space(pp=4, microbatches=4, schedule="1f1b")).best
    assert chosen.strategy.schedule == "zb" and chosen.step < named.step
    assert search(task, Space(pp=1)).best.strategy.schedule == "1f1b"
