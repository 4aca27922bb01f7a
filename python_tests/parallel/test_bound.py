"""Buffers of a bounded size: what fits has the bits of exact ones, what does not is known to every
rank, and nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.parallel import expert
from moekernels.parallel.bound import Bound, stands
from moekernels.parallel.exchange import Part
from moekernels.parallel.mesh import Group, Mesh
from moekernels.run.buffers import parse
from python_tests.support.distributed import run_ranks
from python_tests.support.exchanges import (
    EXPERTS,
    Threads,
    group_of,
    in_threads,
    inputs,
    layers,
    over_the_cpu,
)

CPU = torch.device("cpu")


def test_what_can_be_asked_for() -> None:
    assert parse("exact") is None
    assert [parse(f"bounded:{x}") for x in ("1", "1.25", " 2.")] == [1.0, 1.25, 2.0]
    for text in ("bounded", "bounded:", "bounded:-1", "bounded:nan", "bounded:1e3", "some"):
        with pytest.raises(UsageError, match="must be exact or a bound over the mean rows of a ra"):
            parse(text)
    for text in ("bounded:0", "bounded:0.999", "bounded:.5"):
        with pytest.raises(UsageError, match=f"{text}: below 1 not even rows that are spread even"):
            parse(text)


def test_a_bound_grows_to_what_was_needed_and_by_a_quarter_at_least() -> None:
    bound = Bound(1.0, Group(None, 0, 4, (0, 1, 2, 3)), CPU)
    with pytest.raises(RuntimeError, match="Bound.begin was not called"):
        bound.room()
    bound.rows = 10
    assert bound.take(10) == 10 and bound.needed() == 0 and bound.fits(0.0)
    assert bound.take(12) == 10 and bound.take(11) == 10 and bound.needed() == 1.2
    assert bound.take(7, share=0.5) == 5 and bound.needed() == 1.4
    assert not bound.fits(1.1) and bound.factor == 1.25 and bound.needed() == 0
    assert not bound.fits(3.3) and bound.room() == 33
    assert not bound.fits(3.4) and bound.room() == 40 and bound.take(40) == 40  # all there are
    assert bound.factor == 4.125 and bound.room(0.5) == 21
    assert bound.fits(float(bound.needed()))
    bound.counter.fill_(40)
    assert bound.needed() == 0
    bound.factor = 3.0
    assert bound.needed() == 4.0


def bounded(groups: list[Group], factor: float, rows: int) -> list[Group]:
    """The same ranks under a bound; `rows` is the most that one of them sends."""
    for group in groups:
        object.__setattr__(group, "bound", Bound(factor, group, CPU))
        group.bound.rows = rows
    return groups


def most_sent(size: int) -> int:
    return max(inputs(r, torch.float32, size, 2)[1].numel() for r in range(size))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("device", [False, True])
def test_what_fits_has_the_bits_of_exact_buffers(size: int, device: bool) -> None:
    """But for zeros behind the rows that come."""
    rows, threads = most_sent(size), Threads(size)
    groups = [group_of(threads, r, size) for r in range(size)] if device else over_the_cpu(size)
    found = in_threads(size, layers, bounded(groups, float(size), rows), torch.float32)
    expected = in_threads(size, layers, over_the_cpu(size), torch.float32)
    for mine, theirs in zip(found, expected):
        for one, other in zip(mine, theirs):
            for place, (a, b) in enumerate(zip(one, other)):
                if place < 2:
                    assert len(a) == size * rows and not a[len(b) :].any()
                    a = a[: len(b)]
                assert torch.equal(a, b)
    assert all(group.bound.needed() == 0 for group in groups)


def everything_to_one(rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four rows of each rank, all for expert 1 of rank 0."""
    ids = torch.full((4, 1), 1, dtype=torch.int32)
    return torch.full((4, 3), 1.0 + rank), ids, torch.ones(4, 1)


def overflow(rank: int, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that come where 5 fit, offsets, and what comes home."""
    group = groups[rank]
    x, ids, weights = everything_to_one(rank, group.size)
    plan = expert.ExchangePlan.make(ids, EXPERTS, group)
    rows, _, offsets = expert.dispatch(x, weights, plan)
    return rows, offsets, expert.combine(rows, plan)


@pytest.mark.parametrize("device", [False, True])
def test_what_does_not_fit_is_left_out_and_everybody_goes_on(device: bool) -> None:
    threads = Threads(3)
    groups = [group_of(threads, r, 3) for r in range(3)] if device else over_the_cpu(3)
    found = in_threads(3, overflow, bounded(groups, 1.25, 4))
    rows, offsets, _ = found[0]
    assert rows[:, 0].tolist() == [1, 1, 1, 1, 2] and offsets.tolist() == [0, 0, 5]
    assert not found[1][0].any() and found[1][1].tolist() == [0, 0, 0]
    home = [x[2][:, 0].tolist() for x in found]
    assert home == [[1, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]]
    needed = [float(group.bound.needed()) for group in groups]
    assert max(needed) == 3.0  # on CPUs the one that took them in knows, until all ask
    assert not groups[1].bound.fits(3.0)
    assert in_threads(3, overflow, bounded(groups, 3.0, 4))[2][2][:, 0].tolist() == [3, 3, 3, 3]


def _parts(rank: int) -> list:
    """What a part of the experts has room for, whether an attempt stands, and the bound then."""
    mesh = Mesh(Layout(dp=2, ep=2), exchange_mode="shared")
    group = bounded([mesh.exchange], 1.0, -1)[0]
    group.bound.begin(4 - rank)
    x, ids, weights = everything_to_one(rank, 2)
    told = []
    for _ in range(2):
        plan = expert.ExchangePlan.make(ids, EXPERTS, group)
        parts = plan.parts(2)
        posted = [plan.exchange.post_out(x, weights, plan, part) for part in parts]
        rows = [p.wait().rows for p in posted]
        told.append(([len(r) for r in rows], stands(group.bound, mesh.world), group.bound.factor))
    assert parts == [Part(0, 1), Part(1, 2)]
    return told


def test_ranks_agree_that_a_part_did_not_fit() -> None:
    """Of two parts with an expert each one gets all 8 rows, as if 16 came where a rank sends 4."""
    assert run_ranks(2, _parts) == [[([2, 2], False, 4.0), ([8, 8], True, 4.0)]] * 2
