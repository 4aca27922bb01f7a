"""The conjugate functions: what they compute, and that one's backward is the other's forward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moekernels.model.layout import Layout
from moekernels.parallel import tensor
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.shard import even_range, seeded_normal, shard
from python_tests.support.distributed import RankPool

WORLD = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What each rank holds: small integers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randint(-8, 9, (rows, columns), generator=generator).to(dtype) for _ in range(WORLD)
    ]


def _apply(rank: int, name: str, x: list[Tensor], grad: list[Tensor]) -> tuple[Tensor, Tensor]:
    group = Mesh(Layout(tp=WORLD)).tp
    mine = x[rank].requires_grad_()
    out = getattr(tensor, name)(mine, group)
    out.backward(grad[rank])
    return out.detach(), mine.grad


def run(pool: RankPool, name: str, x: list[Tensor], grad: list[Tensor]) -> tuple[list, list]:
    return tuple(zip(*pool.run(_apply, name, x, grad)))


def parts(x: Tensor) -> list[Tensor]:
    return list(x.chunk(WORLD))


def columns_of(x: list[Tensor]) -> Tensor:
    """[T, C/P] of every rank -> [T, C]."""
    return torch.cat(x, dim=1)


IDENTITY = (lambda x: x, 1)
SUM = (lambda x: [sum(x)] * WORLD, 1)
GATHER = (lambda x: [torch.cat(x)] * WORLD, WORLD)
SCATTER = (lambda x: parts(sum(x)), 1 / WORLD)
SPLIT = (lambda x: [parts(one)[rank] for rank, one in enumerate(x)], 1 / WORLD)
CASES: dict[str, tuple[tuple, Callable]] = {
    "copy_to": (IDENTITY, SUM[0]),
    "reduce_from": (SUM, IDENTITY[0]),
    "gather_tokens": (GATHER, SCATTER[0]),
    "scatter_tokens": (SCATTER, GATHER[0]),
    "split_tokens": (SPLIT, GATHER[0]),
    "join_tokens": (GATHER, SPLIT[0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_conjugates(three: RankPool, name: str, dtype: torch.dtype) -> None:
    (forward, growth), backward = CASES[name]
    x, grad = inputs(6, 5, dtype), inputs(int(6 * growth), 5, dtype)
    out, dx = run(three, name, x, grad)
    for rank in range(WORLD):
        assert torch.equal(out[rank], forward(x)[rank])
        assert torch.equal(dx[rank], backward(grad)[rank])


def test_swap_columns_is_its_own_inverse_in_backward(three: RankPool) -> None:
    x, grad = inputs(6, 4), inputs(2, 12)
    out, dx = run(three, "swap_columns", x, grad)
    for rank in range(WORLD):
        assert torch.equal(out[rank], parts(columns_of(x))[rank])
        assert torch.equal(dx[rank], torch.cat(grad).chunk(WORLD, dim=1)[rank])


def _reduce_large(rank: int, elements: int) -> Tensor:
    group = Mesh(Layout(tp=WORLD)).tp
    return tensor.all_reduce(torch.full((elements,), float(rank + 1)), group)


@pytest.mark.parametrize("elements", [1, 100_000])
def test_all_reduce_is_alike_on_all_ranks(three: RankPool, elements: int) -> None:
    results = three.run(_reduce_large, elements)
    assert all(torch.equal(r, torch.full((elements,), 6.0)) for r in results)


def _noisy_sum(rank: int) -> Tensor:
    group = Mesh(Layout(tp=WORLD)).tp
    x = seeded_normal((3 * 64, 7), 1.0, rank, "x").bfloat16()
    return tensor.reduce_scatter(x, group)


def test_sums_of_bf16_are_made_in_fp32(three: RankPool) -> None:
    whole = sum(seeded_normal((3 * 64, 7), 1.0, r, "x").bfloat16().float() for r in range(WORLD))
    assert torch.equal(torch.cat(three.run(_noisy_sum)), whole.bfloat16())


def test_one_rank_passes_through() -> None:
    x, alone = torch.randn(4, 3), Group(None, 0, 1, (0,))
    for name in [*CASES, "swap_columns"]:
        assert getattr(tensor, name)(x, alone) is x


def test_shards_take_and_put() -> None:
    full = torch.arange(40).view(10, 4)
    info = shard((10, 4), {0: [(1, 3), (6, 9)], 1: [(2, 4)]})
    local = info.take(full)
    assert info.local_shape == local.shape == (5, 2)
    assert torch.equal(local, full[[1, 2, 6, 7, 8]][:, 2:])
    back = torch.zeros_like(full)
    info.put(local, back)
    assert torch.equal(back[[1, 2, 6, 7, 8]][:, 2:], local) and back.count_nonzero() == 10


def test_even_ranges_cover_and_differ_by_one() -> None:
    for length in (3, 7, 100):
        spans = [even_range(length, i, 3) for i in range(3)]
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
        sizes = [b - a for a, b in spans]
        assert max(sizes) - min(sizes) <= 1


def test_seeded_tensors_depend_on_seed_and_name_alone() -> None:
    a = seeded_normal((5, 5), 0.1, 7, "w")
    assert torch.equal(a, seeded_normal((5, 5), 0.1, 7, "w"))
    assert not torch.equal(a, seeded_normal((5, 5), 0.1, 8, "w"))
    assert not torch.equal(a, seeded_normal((5, 5), 0.1, 7, "v"))


def _policy(rank: int) -> int:
    return os.sched_getscheduler(0)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")
def test_ranks_share_cores_without_preempting_one_another(three: RankPool) -> None:
    assert three.run(_policy) == [os.SCHED_BATCH] * WORLD
