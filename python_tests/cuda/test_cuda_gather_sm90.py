"""Hopper products that gather x's rows as they load them (csrc/cuda/sm90/gather.cuh): the bits of
permuted rows, in any order of the warps, and planted bugs."""

from __future__ import annotations

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.contract import assert_same, evaluate, hold, spec_of
from python_tests.support.hopper import back, here, hopper, products, set_products, where  # noqa: F401
from python_tests.support.products import ffn, offsets_of
from python_tests.support.spec import randn

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODES = [(None, True), (0, False), (1, True)]
EXPERTS = ["StoreUp", "StoreRows", "StoreDAct", "StoreGradient", "StoreRows", "StoreGradient"]


@pytest.fixture(autouse=True)
def defaults(where):  # noqa: F811
    yield
    set_products()


def experts(inputs: dict, gather: bool, **how):
    """The FFN's results and gradients; whether rows were permuted is as `gather` says."""
    set_products(gather=gather)
    with hopper(**how) as device:
        result = back(evaluate(ops.experts, spec_of("experts"), here(inputs)))
        assert [name for name in products(device) if name != "StoreUp"][:5] == EXPERTS[1:]
        if where_launched := getattr(device, "launches", None):
            permutes = sum("permute_rows" in name for name in where_launched)
            gathers = sum("product_gathered" in name for name in where_launched)
            again = bool(inputs.get("recompute"))
            assert (permutes, gathers) == ((0, 2 + again) if gather else (2 + again, 0))
    return result


@pytest.mark.parametrize(
    "dtype, options",
    [
        (BF16, {}),
        (F16, {"transposed": True, "interleaved": True}),
        (BF16, {"recompute": True, "activation": "relu2"}),
    ],
    ids=["plain", "transposed_interleaved", "recompute_relu2"],
)
def test_the_bits_of_permuted_rows(dtype, options):
    """H and 2 F past whole tiles; unused rows, empty experts and experts of one row."""
    inputs = ffn(dtype, 136, 72, 70, 5, 2, **options)
    assert_same(experts(inputs, False), ours := experts(inputs, True))
    hold(spec_of("experts"), inputs, ours)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_any_order_and_a_long_sum(schedule, lazy):
    """More steps than stages."""
    token_of = torch.arange(400, dtype=torch.int32) % 9 - 1
    x, drows, offsets = randn(BF16, 7, 24), randn(BF16, 400, 16, seed=2), offsets_of(390, 10)
    set_products(gather=True, stages=2)
    with hopper(schedule=schedule, lazy=lazy):
        dw = raw._grouped_gemm_wgrad(*here(x, drows, offsets), False, here(token_of), 7, True)
    set_products(gather=False)
    with hopper():
        calm = raw._grouped_gemm_wgrad(*here(x, drows, offsets), False, here(token_of), 7, True)
    assert torch.equal(back(dw), back(calm))


GROUPS = {"ragged": (0, 40, 129, 1), "one_row": (1,), "whole": (128, 64)}


@pytest.mark.parametrize("counts", GROUPS.values(), ids=list(GROUPS))
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
def test_gradients_set_and_added(counts, transposed):
    """x on either side; tokens in any order, some of them none, and what is not a number in rows
    that nobody has."""
    rows, tokens, width, out = sum(counts), 50, 136, 264
    token_of = (torch.arange(rows, dtype=torch.int32) * 37) % (tokens + 4) - 2
    x, drows = randn(BF16, tokens, width), randn(BF16, rows, out, seed=2)
    drows[(token_of < 0) | (token_of >= tokens)] = float("nan")
    shape = (width, out) if transposed else (out, width)
    begin, found = randn(F32, len(counts), *shape, seed=3), []
    for gather in (False, True):
        set_products(gather=gather)
        with hopper() as device:
            x_, drows_, offsets, token_of_ = here(x, drows, offsets_of(*counts), token_of)
            total = here(begin.clone())
            rest = (transposed, token_of_, tokens, True)
            dw = back(raw._grouped_gemm_wgrad(x_, drows_, offsets, *rest))
            raw._grouped_gemm_wgrad_(total, x_, drows_, offsets, *rest)
            assert products(device) == ["StoreGradient", "AddGradient"]
            found.append((dw, back(total)))
    assert found[0][0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_misaligned_tokens_are_permuted(where):  # noqa: F811
    """Rows of no whole 16 bytes have no copies of 16: mma.sync takes permuted rows."""
    inputs = ffn(BF16, 33, 40, 9, 2, 2)
    set_products(gather=True)
    with hopper() as device:
        evaluate(ops.experts, spec_of("experts"), here(inputs))
        assert not products(device)


# ---- planted
@pytest.mark.parametrize(
    "bug, errors",
    [
        ("no_gather_fence", ptx.ProxyFenceMissing),
        ("one_arrival_short", ptx.PtxError),
        ("stage_not_waited_for", (ptx.AsyncHazard, ptx.SharedRace, ptx.MBarrierError)),
        ("arrived_early", ptx.PtxError),
    ],
)
def test_planted_bugs_are_caught(monkeypatch, where, bug, errors):  # noqa: F811
    if where == "gpu":
        pytest.skip("the emulator is what has to find it")
    emulated.products_as(monkeypatch, bug=bug)
    for how in ({}, {"schedule": 0}, {"schedule": 1, "lazy": True}):
        with pytest.raises(errors):
            gathered_gradient(**how)


def gathered_gradient(gather=True, **how) -> torch.Tensor:
    token_of = torch.arange(400, dtype=torch.int32) % 7
    set_products(gather=gather)
    with hopper(**how):
        x, drows = randn(BF16, 7, 24), randn(BF16, 400, 16, seed=2)
        return raw._grouped_gemm_wgrad(x, drows, offsets_of(400), False, token_of, 7, True)


def test_the_planted_kernel_is_right_without_a_bug(monkeypatch, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("emulated alone")
    plain = gathered_gradient(False)
    emulated.products_as(monkeypatch)
    assert torch.equal(gathered_gradient(), plain)
