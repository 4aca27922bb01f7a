"""Checkpoints: whole or not there, and readable by another layout."""

import json

import pytest
import torch
from distributed import run_ranks

from moekernels.errors import UsageError
from moekernels.parallel.mesh import Layout, Mesh
from moekernels.parallel.shard import even_range, shard
from moekernels.train.checkpoint import Checkpoints, check_model, newest_whole

SHAPES = {"head": (10, 6), "norm": (6,), "w1": (4, 8, 6), "bias": (4,)}


def full(name):
    torch.manual_seed(len(name))
    return torch.randn(SHAPES[name])


def state_of(mesh, fill):
    """The rank's part of every tensor; w1 is gated: its shard has rows of both halves."""
    lay, tp = mesh.layout, mesh.tp
    e, f = 4 // lay.ep, 4 // lay.etp
    experts = (mesh.ep_index * e, (mesh.ep_index + 1) * e)
    hidden = (mesh.etp_index * f, (mesh.etp_index + 1) * f)
    infos = {
        "head": shard(SHAPES["head"], {0: [even_range(10, tp.rank, tp.size)]}),
        "norm": shard(SHAPES["norm"], copies="stage"),
        "w1": shard(
            SHAPES["w1"], {0: [experts], 1: [hidden, (4 + hidden[0], 4 + hidden[1])]}, copies="edp"
        ),
        "bias": shard(SHAPES["bias"], copies="stage"),
    }
    here = [name for i, name in enumerate(SHAPES) if i % lay.pp == mesh.pp_index]
    return [
        (n, infos[n].take(full(n)) if fill else torch.full(infos[n].local_shape, -1.0), infos[n])
        for n in here
    ]


def save(rank, layout, folder, step=5):
    mesh = Mesh(layout)
    Checkpoints(folder, mesh, keep=2).save(step, state_of(mesh, True), {"model": {"d_model": 6}})


def load(rank, layout, folder):
    mesh = Mesh(layout)
    path, facts = newest_whole(folder)
    state = state_of(mesh, False)
    Checkpoints(folder, mesh, keep=2).load(path, state)
    return facts["step"], [bool(torch.equal(x, info.take(full(n)))) for n, x, info in state]


LAYOUTS = [
    Layout(),
    Layout(tp=2, ep=2),
    Layout(tp=2, etp=2),
    Layout(pp=2),
    Layout(dp=3),
    Layout(tp=2, dp=2, ep=2, etp=2),
]


@pytest.mark.parametrize("there", LAYOUTS, ids=str)
@pytest.mark.parametrize("here", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[5]], ids=str)
def test_one_layout_reads_what_another_wrote(tmp_path, here, there):
    run_ranks(there.world, save, there, tmp_path)
    for step, equal in run_ranks(here.world, load, here, tmp_path):
        assert step == 5 and all(equal)


def one_process(folder, *steps, keep=2):
    mesh = Mesh(Layout())
    for step in steps:
        Checkpoints(folder, mesh, keep).save(step, state_of(mesh, True), {"model": {"d_model": 6}})
    return mesh


def test_the_newest_are_kept(tmp_path):
    one_process(tmp_path, 1, 9, 10, 11, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000010", "step-0000011"]


@pytest.mark.parametrize("damage", ["partial", "no facts", "torn facts", "short file", "lost file"])
def test_what_is_not_whole_is_passed_over(tmp_path, damage):
    one_process(tmp_path, 1, 2)
    newest = tmp_path / "step-0000002"
    facts = newest / "checkpoint.json"
    data = next(newest.glob("*.distcp"))
    if damage == "partial":
        newest.rename(tmp_path / ".partial-step-0000002")
    elif damage == "no facts":
        facts.unlink()
    elif damage == "torn facts":
        facts.write_text(facts.read_text()[:20])
    elif damage == "short file":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.unlink()
    path, found = newest_whole(tmp_path)
    assert path.name == "step-0000001" and found["step"] == 1
    one_process(tmp_path, 2)  # and the run writes over what was not whole
    assert newest_whole(tmp_path)[1]["step"] == 2


def test_nothing_there(tmp_path):
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "no") is None


def test_another_model_is_refused_by_name(tmp_path):
    mesh = one_process(tmp_path, 3)
    path, facts = newest_whole(tmp_path)
    check_model(path, facts, {"d_model": 6})
    with pytest.raises(UsageError, match="model.d_model = 6, this run has 8"):
        check_model(path, facts, {"d_model": 8})
    for info, text in ((shard((7,)), "has shape"), (shard((6,)), "is missing")):
        name = "norm" if text == "has shape" else "other"
        with pytest.raises(UsageError, match=text):
            Checkpoints(tmp_path, mesh, 2).load(path, [(name, torch.zeros(info.full_shape), info)])
    assert json.loads((path / "checkpoint.json").read_text()) == facts, "nothing saved was touched"
