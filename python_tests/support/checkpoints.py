"""Checkpoints of a few small tensors, written and read by any layout."""

from __future__ import annotations

import torch

from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import even_range, shard
from moekernels.train import checkpoint, resume
from moekernels.train.checkpoint import Checkpoints

ONE = Mesh(Layout())
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


def write(folder, mesh, *steps, keep=2, run="a", facts=None):
    checkpoints = Checkpoints(folder, mesh, keep, run=run)
    for step in steps:
        checkpoints.save(step, state_of(mesh, True), facts or {})
    checkpoints.close()
    return checkpoints


def read(folder, mesh, run=None):
    """(step, whether all that was loaded is right, what was passed over)."""
    found = resume.newest(folder, run)
    if found.path is None:
        return None, False, found.passed
    state = state_of(mesh, False)
    checkpoint.load(found.path, found.manifest.tensors, state)
    right = all(torch.equal(x, info.take(full(n))) for n, x, info in state)
    return found.facts["step"], right, found.passed
