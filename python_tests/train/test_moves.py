"""Experts that move between steps: the same run, bit for bit, in few messages, where it pays."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moekernels.balance import placement, replan
from moekernels.balance.record import Record
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import shard
from moekernels.run.folder import read_metrics
from moekernels.run.sections import RunConfig
from moekernels.train import manifest, moves, shards
from moekernels.train.migrate import migrate
from python_tests.support.distributed import run_ranks
from python_tests.support.layouts import TINY
from python_tests.support.small_runs import losses, start, wait_for_steps

WAYS = ("--ep", "2", "--tp", "2", "--dispatcher", "all_to_all")


def saved(folder):
    """All tensors of a checkpoint, whole."""
    tensors = {}
    with shards.Reader(folder) as reader:
        for name, kept in manifest.read(folder).tensors.items():
            tensors[name] = torch.empty(kept.shape, dtype=getattr(torch, kept.dtype))
            assert reader.fill(tensors[name], [0] * len(kept.shape), kept)
    return tensors


def finished(process):
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr


def test_a_run_with_moves_is_the_run_without(text, tmp_path):
    """Random moves, a SIGKILL and a resume between them; then another layout from the moved
    checkpoint."""
    steps = ("--steps", "10", "--optimizer-state", "bf16")
    still = start(text, tmp_path / "still", *WAYS, *steps)
    moved = (*WAYS, *steps, "--replan", "random:2", "--save-every", "3")
    process = start(text, tmp_path / "moved", *moved)
    wait_for_steps(tmp_path / "moved", 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "moved", other)
    process = start(text, tmp_path / "moved", *moved, "--resume")
    finished(still)
    finished(process)
    lines = read_metrics(tmp_path / "moved")
    expected = read_metrics(tmp_path / "still")
    assert sum(x.get("moved_experts", 0) for x in lines) > 20
    for key in ("loss", "grad_norm", "aux", "load_max_over_mean"):
        assert [x[key] for x in lines] == [x[key] for x in expected]
    assert lines[-1]["eval_loss"] == expected[-1]["eval_loss"]
    ends = [saved(tmp_path / run / "checkpoints" / "step-0000010") for run in ("still", "moved")]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name

    left = [Record.read(tmp_path / run) for run in ("still", "moved")]
    assert torch.equal(left[0].pairs, left[1].pairs) and left[0].pairs.any()
    assert torch.equal(left[0].loads, left[1].loads)
    assert not torch.equal(left[0].slot_of, left[1].slot_of)
    for line in (lines[-1], expected[-1]):
        assert line["nodes_a_token"] == 1 and 0 < line["together_on_a_rank"] < 1

    alone = ("--tp", "1", "--ep", "1", "--replan", "never")
    finished(start(text, other, *alone, *steps, "--resume"))
    assert losses(other)[:6] == losses(tmp_path / "still")[:6]
    assert losses(other)[6:] == pytest.approx(losses(tmp_path / "still")[6:], rel=1e-5)


def build(layout, dtype, state):
    mesh = Mesh(layout)
    chunks = [StageModel(TINY, mesh, range(1, 3), True, True, dtype=dtype)]
    everything = [s for chunk in chunks for s in chunk.named_shards()]
    return mesh, chunks, everything, Optimizer(everything, mesh, AdamWConfig(state_dtype=state))


def mark(optimizer):
    """Every element of an expert's state tells its expert and its place in it."""
    for number, (_, tensor, info) in enumerate(optimizer.state()):
        if info.apart:
            full = torch.arange(torch.Size(info.full_shape).numel()) % 97 + number
            tensor.copy_(info.take(full.view(info.full_shape)))


def bring(rank, layout, dtype, state):
    mesh, chunks, everything, optimizer = build(layout, dtype, state)
    mark(optimizer)
    optimizer.moved(everything)
    began = placement.unmoved(2, TINY.num_experts)
    goal = replan.drawn(began, layout.ep, seed=1, step=1)
    sent, send = Counter(), dist.all_to_all_single

    def counted(out, x, receive=None, send_=None, **more):
        sent.update(str(x.dtype) for n in send_ if n)
        return send(out, x, receive, send_, **more)

    dist.all_to_all_single = counted
    try:
        moved = migrate(chunks, optimizer, mesh, [began], [goal])
    finally:
        dist.all_to_all_single = send
    optimizer.moved([s for chunk in chunks for s in chunk.named_shards()])
    got = {name: tensor.clone() for name, tensor, info in optimizer.state() if info.apart}
    mark(optimizer)  # by the shards as they are now
    for name, tensor, info in optimizer.state():
        if info.apart:
            assert torch.equal(got[name], tensor), name
            layer = int(name.split(".")[2]) - 1
            held = torch.argsort(goal[layer])[mesh.ep_index * len(tensor) :][: len(tensor)]
            assert info.held() == held.tolist()
    for name, parameter, info in everything:
        if info.apart:
            assert torch.equal(parameter.data, got[f"master.{name}"].to(dtype))
    return moved, sent, mesh.ep_index


@pytest.mark.parametrize(
    "layout, dtype, state",
    [
        (Layout(dp=2, ep=2), torch.float32, torch.float32),
        (Layout(dp=4, ep=4), torch.bfloat16, torch.bfloat16),
        (Layout(tp=2, dp=2, ep=2, etp=2), torch.float32, torch.bfloat16),
        (Layout(dp=4, ep=2), torch.float64, torch.float32),
    ],
    ids=str,
)
def test_all_that_moves_is_one_message_a_peer_and_dtype(layout, dtype, state):
    began = placement.unmoved(2, TINY.num_experts)
    each = TINY.num_experts // layout.ep
    goal = replan.drawn(began, layout.ep, seed=1, step=1)
    homes, then = began // each, goal // each
    dtypes = 1 if state == torch.float32 or dtype == torch.float64 else 2
    for moved, sent, ep in run_ranks(layout.world, bring, layout, dtype, state):
        peers = then[(homes == ep) & (then != ep)].unique().numel()
        assert moved.experts == (homes != then).sum()
        assert moved.messages == sum(sent.values()) == peers * dtypes
        assert len(sent) == (dtypes if peers else 0)


def test_who_stays_keeps_its_slot():
    mesh, chunks, _, optimizer = build(Layout(), torch.float32, torch.float32)
    began = placement.unmoved(2, TINY.num_experts)
    with pytest.raises(RuntimeError, match="must keep its slot"):
        migrate(chunks, optimizer, mesh, [began], [began.flip(1)])


def decide(rank, cores, seconds, loads, rate):
    """Looks of a run with `--replan auto` after ten steps of the same loads."""
    run = RunConfig(model=TINY)
    run.layout.dp = run.layout.ep = 2
    run.train.replan = "auto"
    moves.cores = lambda: cores
    mesh, chunks, everything, optimizer = build(Layout(dp=2, ep=2), torch.float32, torch.float32)
    held = moves.Moves(run, mesh, chunks, [slice(0, 2)], optimizer, everything)
    held.rate = rate
    clock = moves.expert_clock
    said = []
    for look in (10, 20):
        for _ in range(10):
            held.saw(torch.tensor(loads), 1.0 + look / 100)
        clock._seconds, clock._count = seconds, 1000
        assert held.look(look - 1, False) == {}
        said.append(held.look(look, False))
        held.before = held.before and 5.0
    return said, held.facts(), held.notes(), held.uneven(torch.tensor(loads))


STEEP = [[400.0, 300, 200, 100, 40, 30, 20, 10], [10.0] * 8]


def test_auto_moves_where_it_pays():
    for said, facts, notes, uneven in run_ranks(2, decide, 8, 3.0, STEEP, 1e9):
        # 3 ms a row forward, 6 backward; the busiest rank goes from 1000 rows to 550.
        assert said[0]["predicted_gain"] == pytest.approx(0.009 * 450)
        assert said[0]["moved_experts"] in (2, 4, 6, 8) and said[0]["move_seconds"] > 0
        assert said[1] == {"realised_gain": pytest.approx(5.0 - 1.2)}
        assert sorted(facts["placement"][0]) == facts["placement"][1] == list(range(8))
        assert notes == [] and uneven == 1.0


@pytest.mark.parametrize(
    "cores, seconds, loads, rate",
    [
        (8, 3.0, [[10.0] * 8] * 2, 1e9),
        (8, 3.0, [[0.0] * 8] * 2, 1e9),
        (8, 3.0, STEEP, 1.0),  # bytes/s
        (8, 0.0, STEEP, 1e9),
        (1, 3.0, STEEP, 1e9),
    ],
    ids=["balanced", "idle", "slow link", "free rows", "shared cores"],
)
def test_auto_moves_nothing_where_it_does_not(cores, seconds, loads, rate):
    for said, facts, notes, _ in run_ranks(2, decide, cores, seconds, loads, rate):
        assert said == [{}, {}] and facts == {}
        assert len(notes) == (cores == 1) and all("2 ranks share 1 cores" in x for x in notes)


def test_another_ep_begins_unmoved():
    run = RunConfig(model=replace(TINY))
    mesh, chunks, everything, optimizer = build(Layout(), torch.float32, torch.float32)
    held = moves.Moves(run, mesh, chunks, [slice(0, 2)], optimizer, everything)
    facts = {"placement": placement.unmoved(2, 8).flip(1).tolist()}
    held.restore(facts, {"ep": 2}, "step-1")
    assert held.facts() == {}
    held.restore(facts, {"ep": 1}, "step-1")
    assert held.facts() == facts
    assert [info.held() for _, _, info in everything if info.apart] == [list(range(7, -1, -1))] * 4
    assert shard((3, 2), {0: [(1, 3)]}).holding([2, 0]).held() == [2, 0]
