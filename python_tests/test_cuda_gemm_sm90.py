"""The Hopper products (wgmma, TMA, an mbarrier ring) as CUDA ops under the PTX emulator: every
product and epilogue, hostile groups and neighbours, widths that are no multiples of a tile, other
orders of the warps, late copies, and bugs planted in the very kernel."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from moekernels import ops, reference
from moekernels.ops._library import raw
from moekernels.ops._spec import randn
from python_tests import emulated, ptx
from python_tests.test_contract import assert_close, assert_same, evaluate
from python_tests.test_cuda_emulated import hold, spec_of
from python_tests.test_cuda_gemm_emulated import ffn, offsets_of, product


def why_not() -> str | None:
    return emulated.why_not() or (
        None if "grouped_gemm_sm90" in emulated.stems() else "no kernels for sm_90a"
    )


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PRODUCT = "cuda4sm907product"
# (schedule, lazy): as issued, as late as may be, in other orders
MODES = [(None, True), (0, False), (1, True)]


def hopper(**how):
    return emulated.emulated_cuda(capability=90, **how)


def products(device) -> list[str]:
    """The epilogues of the Hopper products that were launched."""
    kinds = ("StoreRows", "StoreGradient", "StoreUp", "StoreDAct")
    launched = [name for name in device.launches if PRODUCT in name]
    return [next(kind for kind in kinds if kind in name) for name in launched]


def check(name: str, inputs: dict, expected: list[str], **how):
    """A call and its gradients against the reference; the products that it must have taken."""
    spec = spec_of(name)
    with hopper(**how) as device:
        ours = evaluate(spec.fn, spec, inputs)
    assert products(device) == expected
    hold(spec, inputs, ours)
    return ours


GEMM = ["StoreRows", "StoreRows", "StoreGradient"]  # forward, dgrad, wgrad
# up, down; dact, w2's gradient, x's, w1's
EXPERTS = ["StoreUp", "StoreRows", "StoreDAct", "StoreGradient", "StoreRows", "StoreGradient"]


# ---- grouped_gemm
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "counts, width, out",
    [
        ((130, 0, 1, 65), 88, 264),  # ragged, empty, one row; K and N past whole tiles
        ((0, 0, 140), 72, 72),  # all to one; the narrow tile
    ],
    ids=["ragged", "all_to_one"],
)
def test_grouped_gemm(counts, width, out, dtype, transposed):
    inputs = product(dtype, width, out, *counts, transposed=transposed)
    check("grouped_gemm", inputs, GEMM)


def test_whole_tiles_and_a_long_sum():
    check("grouped_gemm", product(BF16, 640, 256, 128, 256), GEMM)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_order_and_lateness_change_no_bit(schedule, lazy):
    inputs = product(BF16, 200, 136, 70, 0, 131)
    calm = check("grouped_gemm", inputs, GEMM)
    assert_same(calm, check("grouped_gemm", inputs, GEMM, schedule=schedule, lazy=lazy))


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
def test_rows_of_no_expert_are_zero_and_neighbours_do_not_leak(transposed):
    """What is not a number in other experts' rows, or past the last expert, changes no bit."""
    inputs = product(BF16, 40, 264, 5, 7, 130, unused=140, transposed=transposed)
    drows = randn(BF16, 282, 264, seed=2)
    wild, wild_drows = {**inputs, "rows": inputs["rows"].clone()}, drows.clone()
    wild["rows"][:5] = float("nan")
    wild["rows"][12:13] = float("inf")
    wild["rows"][142:] = float("nan")
    wild_drows[142:] = float("inf")
    offsets = inputs["offsets"]
    with hopper() as device:
        calm, y = ops.grouped_gemm(**inputs), ops.grouped_gemm(**wild)
        calm_dw = ops.grouped_gemm_wgrad(inputs["rows"], drows, offsets)
        dw = ops.grouped_gemm_wgrad(wild["rows"], wild_drows, offsets)
    assert len(products(device)) == 4
    assert torch.equal(y[5:12], calm[5:12]) and torch.equal(y[13:142], calm[13:142])
    assert y[:5].isnan().all() and not y[142:].any() and not calm[142:].any()
    assert torch.equal(dw[1], calm_dw[1]) and dw[0].isnan().all()


@pytest.mark.parametrize("m, n, transposed", [(136, 264, False), (72, 40, True)])
def test_wgrad_sets_and_accumulates(m, n, transposed):
    counts = (0, 40, 129, 1)
    width, out = (m, n) if transposed else (n, m)
    rows, drows = randn(BF16, 170, width), randn(BF16, 170, out, seed=2)
    offsets = offsets_of(*counts)
    begin = randn(F32, 4, m, n, seed=3)
    with hopper() as device:
        dw = ops.grouped_gemm_wgrad(rows, drows, offsets, transposed=transposed)
        total = begin.clone()
        ops.grouped_gemm_wgrad(rows, drows, offsets, transposed=transposed, out=total)
    assert products(device) == ["StoreGradient"] * 2
    assert not dw[0].any() and torch.equal(total[0], begin[0])
    how = {"transposed": transposed}
    exact = reference.grouped_gemm_wgrad(rows.double(), drows.double(), offsets, **how)
    assert_close("dw", dw, reference.grouped_gemm_wgrad(rows, drows, offsets, **how), exact)
    torch.testing.assert_close(total.double(), begin + exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("schedule, lazy", [(None, False), *MODES])
def test_wgrad_leaves_out_unused_rows(schedule, lazy):
    """Rows without a token count as zero whatever they hold, on both sides."""
    token_of = (torch.arange(150, dtype=torch.int32) * 7) % 5 - 1  # -1 to 3, of 3 tokens
    used = (token_of >= 0) & (token_of < 3)
    offsets, rows, drows = offsets_of(70, 0, 80), randn(BF16, 150, 16), randn(BF16, 150, 24, seed=1)
    clean = torch.where(used[:, None], rows, 0), torch.where(used[:, None], drows, 0)
    rows[~used], drows[~used] = float("inf"), float("nan")
    with hopper(schedule=schedule, lazy=lazy) as device:
        dw = raw._grouped_gemm_wgrad(rows, drows, offsets, False, token_of, 3, False)
    assert products(device) == ["StoreGradient"]
    torch.testing.assert_close(dw, reference.grouped_gemm_wgrad(*clean, offsets))


def test_many_experts_take_the_room_of_stages():
    """More experts than a block has threads, most of them empty; the ring is shorter."""
    counts = [0] * 420
    counts[3], counts[400], counts[419] = 2, 5, 1
    check("grouped_gemm", product(BF16, 16, 24, *counts), GEMM)


def test_what_tma_cannot_take_goes_to_mma():
    for inputs in (product(BF16, 88, 72, 9, 5, shift=1), product(BF16, 33, 130, 9, 5)):
        with hopper() as device:
            y = ops.grouped_gemm(**inputs)
        assert device.launches and not products(device)
        torch.testing.assert_close(y, reference.grouped_gemm(**inputs), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("offsets", [[0, 50, 9, 80], [-5, 3, 2**40, 1], [7, 7, 7, 7]])
def test_hostile_offsets_stay_within_the_arrays(offsets):
    rows, drows, w = randn(BF16, 12, 8), randn(BF16, 12, 16), randn(BF16, 3, 16, 8)
    hostile = torch.tensor(offsets)
    for call in (
        lambda: raw._grouped_gemm(rows, w, hostile, False),
        lambda: raw._grouped_gemm_wgrad(rows, drows, hostile, False, None, 0, False),
    ):
        with hopper() as device, suppress(ptx.GlobalRace, ptx.UninitializedRead):
            call()
        assert len(products(device)) == 1


# ---- experts
@pytest.mark.parametrize("kind", ["swiglu", "geglu", "reglu", "swiglu_oai", "swiglu_clamped"])
def test_gated(kind):
    check("experts", ffn(BF16, 72, 136, 13, 3, 2, activation=kind, limit=0.8), EXPERTS)


@pytest.mark.parametrize("kind", ["relu2", "silu", "gelu"])
def test_ungated(kind):
    check("experts", ffn(BF16, 72, 264, 13, 3, 2, activation=kind), EXPERTS)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {"interleaved": True},
        {"transposed": True},
        {"interleaved": True, "transposed": True, "activation": "swiglu_oai"},
        {"b1": None, "b2": None},
    ],
    ids=lambda o: "_".join(o),
)
def test_layouts(options, dtype):
    check("experts", ffn(dtype, 136, 72, 90, 2, 2, **options), EXPERTS)


def test_recompute():
    again = EXPERTS[:2] + ["StoreUp"] + EXPERTS[2:]
    check("experts", ffn(BF16, 72, 136, 13, 3, 2, recompute=True), again)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_experts_in_any_order(schedule, lazy):
    inputs = ffn(BF16, 136, 264, 80, 3, 2)
    calm = check("experts", inputs, EXPERTS)
    assert_same(calm, check("experts", inputs, EXPERTS, schedule=schedule, lazy=lazy))


# ---- planted
@pytest.fixture
def planted(monkeypatch):
    """Replaces two products by the same kernels with a bug."""

    def plant(bug: str):
        emulated.products_as(monkeypatch, f"MOEKERNELS_PLANTED={bug}")

    return plant


def forward(**how):
    inputs = product(BF16, 640, 72, 100)
    with hopper(**how):
        return inputs, ops.grouped_gemm(**inputs)


def gradient(**how):
    with hopper(**how):
        ops.grouped_gemm_wgrad(randn(BF16, 70, 16), randn(BF16, 70, 24), offsets_of(70))


@pytest.mark.parametrize(
    "bug, call, errors, words",
    [
        ("freed_early", forward, ptx.AsyncHazard, "wgmma"),
        ("wrong_stride", forward, ptx.DescriptorError, "overlap"),
        ("no_last_wait", forward, ptx.AsyncHazard, "wgmma"),
        ("wrong_bytes", forward, ptx.Deadlock, "16 bytes that no copy brings"),
        ("no_tail_fence", gradient, ptx.ProxyFenceMissing, "wgmma"),
    ],
)
def test_planted_bugs_are_caught(planted, bug, call, errors, words):
    planted(bug)
    for how in ({}, {"schedule": 0}, {"schedule": 1, "lazy": True}):
        with pytest.raises(errors, match=words):
            call(**how)


def test_the_planted_kernels_are_right_without_a_bug(planted):
    planted("none")
    inputs, y = forward()
    torch.testing.assert_close(y, reference.grouped_gemm(**inputs), rtol=2**-7, atol=1e-2)
    gradient()
