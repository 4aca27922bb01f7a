"""A schedule that puts gradients of weights off trains to the bits of one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo  # of checkpoints: once here, not once in each rank that is forked
from torch import Tensor

from moekernels.assembly import layout_of
from moekernels.ops import _deferred
from moekernels.parallel.mesh import Mesh
from moekernels.verify.compare import Side
from moekernels.verify.variants import Variant, configure, draw_batches
from python_tests.support.distributed import RankPool

STEPS = 20
MICROBATCHES = 3


def _train(mesh: Mesh, schedule: str, pp: int, dtype: str) -> list[tuple[float, list[Tensor]]]:
    """Each step's loss and gradients, of a model with every kind of part."""
    run = configure({"pp": pp}, Variant(schedule=schedule, guests=True), "fp32", pp)
    run.model = replace(run.model, num_layers=max(2, pp))
    run.batch = replace(run.batch, microbatches=MICROBATCHES, context=8)
    run.layout.checkpoint_layers = "2"
    run.train.dtype = dtype
    side, steps = Side(run, mesh), []
    for step in range(STEPS):
        (batches,) = draw_batches(run, step)
        loss = side.step(batches, lambda *_: None)
        steps.append((loss, [p.main_grad.clone() for _, p, _ in side.shards]))
        side.optimizer.step()
    return steps


def _both(rank: int, pp: int, dtypes: list[str]) -> float:
    """How many products a micro-batch has put off, on this rank."""
    run = configure({"pp": pp}, Variant(), "fp32", pp)
    mesh = Mesh(layout_of(run), device=torch.device("cpu"))
    put, counts = _deferred.Queue.put, []

    def counted(queue: _deferred.Queue, work: _deferred.Work) -> None:
        counts.append(1)
        put(queue, work)

    for dtype in dtypes:
        whole = _train(mesh, "1f1b", pp, dtype)
        _deferred.Queue.put = counted
        split = _train(mesh, "zb", pp, dtype)
        _deferred.Queue.put = put
        for (loss, gradients), (expected, others) in zip(split, whole, strict=True):
            assert loss == expected
            assert all(map(torch.equal, gradients, others))
    return len(counts) / STEPS / MICROBATCHES / len(dtypes)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_zb_is_1f1b_bit_for_bit(pp):
    with RankPool(pp) as pool:
        put_off = pool.run(_both, pp, ["fp32", "bf16"])
    # Of each micro-batch: attention's 2 products, and the first layer's FFN's 2, or of another the
    # router's 1, the experts' 4 (they lift and lower), and the shared expert's 3.
    first, other = 2 + 2, 2 + 1 + 4 + 3
    assert put_off == {1: [first + other], 2: [first, other], 4: [first, *3 * [other]]}[pp]
