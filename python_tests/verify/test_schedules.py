"""Schedules that split a backward, or run it beside a forward, train to the bits of 1F1B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo  # of checkpoints: once here, not once in each rank that is forked
from torch import Tensor

from moekernels.assembly import layout_of
from moekernels.ops import _deferred
from moekernels.parallel import turns
from moekernels.parallel.mesh import Mesh
from moekernels.verify.compare import Side
from moekernels.verify.variants import Variant, configure, draw_batches
from python_tests.support.distributed import RankPool

STEPS = 20
MICROBATCHES = 3


def _train(
    mesh: Mesh,
    schedule: str,
    dtype: str,
    steps: int = STEPS,
    chunks: int = 1,
    at_once: int = 1,
) -> list[tuple[float, list[Tensor]]]:
    """Each step's loss and gradients, of a model with every kind of part."""
    degrees = {name: getattr(mesh.layout, name) for name in ("dp", "ep", "pp")}
    variant = Variant(schedule=schedule, virtual_stages=chunks, guests=True)
    run = configure(degrees, variant, "fp32", mesh.layout.world)
    run.model = replace(run.model, num_layers=max(2, mesh.layout.pp * chunks))
    run.batch = replace(run.batch, microbatches=MICROBATCHES, context=8)
    run.layout.checkpoint_layers = "2"
    run.train.dtype, run.train.weights_at_once = dtype, at_once
    side, done = Side(run, mesh), []
    for step in range(steps):
        batches = draw_batches(run, step)[mesh.dp_index]
        loss = side.step(batches, lambda *_: None)
        done.append((loss, [p.main_grad.clone() for _, p, _ in side.shards]))
        side.optimizer.step()
    return done


def _assert_same(found: list, expected: list) -> None:
    for (loss, gradients), (other, others) in zip(found, expected, strict=True):
        assert loss == other
        assert all(map(torch.equal, gradients, others))


def _both(rank: int, pp: int, chunks: int, dtypes: list[str]) -> float:
    """How many products a microbatch has put off, on this rank."""
    name = "1f1b" if chunks == 1 else "interleaved"
    run = configure({"pp": pp}, Variant(), "fp32", pp)
    mesh = Mesh(layout_of(run), device=torch.device("cpu"))
    put, counts = _deferred.Queue.put, []

    def counted(queue: _deferred.Queue, work: _deferred.Work) -> None:
        counts.append(1)
        put(queue, work)

    for dtype in dtypes:
        whole = _train(mesh, name, dtype, chunks=chunks)
        _deferred.Queue.put = counted
        split = _train(mesh, "zb", dtype, chunks=chunks)
        _deferred.Queue.put = put
        _assert_same(split, whole)
    return len(counts) / STEPS / MICROBATCHES / len(dtypes)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_zb_is_1f1b_bit_for_bit(pp, chunks):
    """Interleaved 1F1B, if a rank has several virtual stages."""
    with RankPool(pp) as pool:
        put_off = pool.run(_both, pp, chunks, ["fp32", "bf16"])
    # Of each microbatch: attention's 2 products, and the first layer's FFN's 2, or of another the
    # router's 1, the experts' 4 (they lift and lower), and the shared expert's 3.
    first, other = 2 + 2, 2 + 1 + 4 + 3
    last = chunks - 1 if pp > 1 else 0  # layers of a rank's later chunks
    assert put_off == [
        (first if rank == 0 else other) + last * other + (pp == 1) * other for rank in range(pp)
    ]


def _pairs(rank: int, pp: int, exchange: str) -> list[int]:
    """How many turns the passes of a step took, by dtype, on this rank."""
    run = configure({"dp": 2, "ep": 2, "pp": pp}, Variant(), "fp32", 2 * pp)
    mesh = Mesh(layout_of(run), device=torch.device("cpu"), exchange_mode=exchange)
    found, counts = turns.border, []

    def counted(*where: object, forward: bool) -> None:
        counts.append(turns._running is not None)
        found(*where, forward=forward)

    steps = STEPS if exchange == "shared" else 2
    for dtype in ("fp32", "bf16"):
        whole = _train(mesh, "1f1b", dtype, steps)
        turns.border = counted
        paired = _train(mesh, "overlap", dtype, steps)
        turns.border = found
        _assert_same(paired, whole)
    return sum(counts) // steps // 2


@pytest.mark.parametrize("pp, exchange", [(1, "shared"), (2, "shared"), (2, "collective")])
def test_overlap_is_1f1b_bit_for_bit(pp, exchange):
    """The second layer exchanges rows, with two stages the second one's; as it is computed again,
    its results come home once more, for which there is no turn."""
    with RankPool(2 * pp) as pool:
        turned = pool.run(_pairs, pp, exchange)
    a_pair, pairs = 5 + 1, MICROBATCHES - 1
    assert turned == {1: 2 * [pairs * a_pair], 2: [0, 0, *2 * [pairs * a_pair]]}[pp]


def _at_once(rank: int, layout: dict[str, int], schedule: str, chunks: int) -> list[int]:
    """How many calls there are of several microbatches' gradients, and of how many."""
    run = configure(layout, Variant(schedule=schedule, virtual_stages=chunks), "fp32", len(RANKS))
    mesh = Mesh(layout_of(run), device=torch.device("cpu"))
    whole = _train(mesh, schedule, "fp32", 2, chunks)
    ran, calls = _deferred.Joined.run, []

    def counted(queue: _deferred.Joined, most: int | None = None) -> int:
        calls.append(ran(queue, most))
        return calls[-1]

    _deferred.Joined.run = counted
    _assert_same(_train(mesh, schedule, "fp32", 2, chunks, at_once=2), whole)
    _deferred.Joined.run = ran
    return [n for n in calls if n]


RANKS = range(2)


@pytest.mark.parametrize("schedule, chunks", [("1f1b", 1), ("interleaved", 2)])
@pytest.mark.parametrize("layout", [{"pp": 2}, {"dp": 2, "ep": 2}], ids=str)
def test_gradients_of_several_microbatches_at_once_are_those_of_each(layout, schedule, chunks):
    """Of 3 microbatches: 2, and 1 at the end of the step."""
    if layout.get("pp", 1) == 1 and chunks > 1:
        pytest.skip("several chunks are of several stages")
    with RankPool(2) as pool:
        calls = pool.run(_at_once, layout, schedule, chunks)
    for ran in calls:  # in two steps, of each chunk: of two microbatches, and of one
        left = sorted(ran)
        assert len(left) == 2 * 2 * chunks and all(left)
        while left:
            left.remove(2 * left.pop(0))
