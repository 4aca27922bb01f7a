"""Weight gradients that L2 adds to fp32 sums (bulk reductions, csrc/cuda/sm90/add.cuh): the bits of
the kernel whose threads load, add and store, in any order of the warps, and planted bugs."""

from __future__ import annotations

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.hopper import back, here, hopper, products, set_products, where  # noqa: F401
from python_tests.support.products import offsets_of
from python_tests.support.spec import randn

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODES = [(None, False), (None, True), (0, False), (1, True)]


@pytest.fixture(autouse=True)
def defaults(where):  # noqa: F811
    yield
    set_products()


def added(counts, m: int, n: int, bulk: bool, dtype=BF16, calls=1, grid=0, **how) -> torch.Tensor:
    """A total [E, m, n] after `calls` gradients of the same rows were added to it."""
    offsets, rows = offsets_of(*counts), sum(counts)
    a, b = randn(dtype, rows, m, seed=2), randn(dtype, rows, n)
    total = here(randn(F32, len(counts), m, n, seed=3))
    set_products(bulk_sums=bulk, grid=grid)
    with hopper(**how) as device:
        for _ in range(calls):
            ops.grouped_gemm_wgrad(*here(b, a, offsets), out=total)
        assert products(device) == ["AddGradient" if bulk else "StoreGradient"] * calls
    return back(total)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "counts, m, n",
    [
        ((0, 40, 129, 1), 136, 264),  # empty, ragged, one row; M and N past whole tiles
        ((5, 0), 8, 8),  # less than a box
        ((70,), 24, 48),  # an odd number of boxes a warp
        ((64, 0, 128), 128, 512),  # whole tiles
    ],
    ids=["ragged", "tiny", "odd", "whole"],
)
def test_the_bits_of_load_add_and_store(counts, m, n, dtype):
    threads = added(counts, m, n, False, dtype)
    assert torch.equal(added(counts, m, n, True, dtype), threads)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_any_order_and_many_tiles_a_block(schedule, lazy):
    """Boxes of a tile wait for those of the last; two calls add twice."""
    counts, m, n = (70, 1), 264, 296
    threads = added(counts, m, n, False, calls=2)
    how = {"schedule": schedule, "lazy": lazy, "grid": 1}
    assert torch.equal(added(counts, m, n, True, calls=2, **how), threads)


def test_unused_rows_are_left_out():
    token_of = (torch.arange(90, dtype=torch.int32) * 7) % 5 - 1  # -1 to 3, of 3 tokens
    a, b, offsets = randn(BF16, 90, 16), randn(BF16, 90, 24, seed=1), offsets_of(50, 40)
    b[~((token_of >= 0) & (token_of < 3))] = float("nan")
    totals = []
    for bulk in (False, True):
        set_products(bulk_sums=bulk)
        total = here(torch.ones(2, 24, 16))
        with hopper():
            placed = here(a, b, offsets, token_of)
            raw._grouped_gemm_wgrad_(total, *placed[:3], False, placed[3], 3, False)
        totals.append(back(total))
    assert totals[0].isfinite().all() and torch.equal(*totals)


# ---- planted
@pytest.mark.parametrize(
    "bug, errors",
    [
        ("box_overwritten", ptx.AsyncHazard),
        ("last_box_overwritten", ptx.AsyncHazard),
        ("no_add_fence", ptx.ProxyFenceMissing),
        ("left_early", ptx.AsyncHazard),
    ],
)
def test_planted_bugs_are_caught(monkeypatch, where, bug, errors):  # noqa: F811
    if where == "gpu":
        pytest.skip("the emulator is what has to find it")
    emulated.products_as(monkeypatch, bug=bug)
    for how in ({}, {"schedule": 0}, {"schedule": 1, "lazy": True}):
        with pytest.raises(errors):
            added((70, 70), 16, 72, True, grid=1, **how)


def test_the_planted_kernel_is_right_without_a_bug(monkeypatch, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("emulated alone")
    threads = added((70, 70), 16, 72, False)
    emulated.products_as(monkeypatch)
    assert torch.equal(added((70, 70), 16, 72, True), threads)
