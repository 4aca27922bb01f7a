"""The Hopper products (wgmma, TMA, an mbarrier ring) as CUDA ops under the PTX emulator: every
product and epilogue, hostile groups and neighbours, widths that are no multiples of a tile, other
orders of the warps, late copies, and bugs planted in the very kernel. All but the bugs runs on a
GPU of sm_90 as well."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops, reference
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.contract import assert_close, assert_same, evaluate, hold, spec_of
from python_tests.support.hopper import back, here, hopper, products, where  # noqa: F401
from python_tests.support.products import ffn, offsets_of, product
from python_tests.support.spec import randn, random_ids

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (schedule, lazy): as issued, as late as may be, in other orders
MODES = [(None, True), (0, False), (1, True)]


def check(name: str, inputs: dict, expected: list[str], **how):
    """A call and its gradients against the reference; the products that it must have taken."""
    spec = spec_of(name)
    with hopper(**how) as device:
        ours = back(evaluate(spec.fn, spec, here(inputs)))
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
    inputs, wild, drows, wild_drows = here(inputs, wild, drows, wild_drows)
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
        inputs, total = here(rows, drows, offsets), here(begin.clone())
        dw = back(ops.grouped_gemm_wgrad(*inputs, transposed=transposed))
        ops.grouped_gemm_wgrad(*inputs, transposed=transposed, out=total)
        total = back(total)
    assert products(device) == ["StoreGradient", "AddGradient"]
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
        inputs = here(rows, drows, offsets, token_of)
        dw = back(raw._grouped_gemm_wgrad(*inputs[:3], False, inputs[3], 3, False))
    assert products(device) == ["StoreGradient"]
    torch.testing.assert_close(dw, reference.grouped_gemm_wgrad(*clean, offsets))


def test_many_experts_take_the_room_of_stages():
    """More experts than a block has threads, most of them empty; the ring is shorter."""
    counts = [0] * 420
    counts[3], counts[400], counts[419] = 2, 5, 1
    check("grouped_gemm", product(BF16, 16, 24, *counts), GEMM)


@pytest.mark.parametrize(
    "experts, rows, width, out",
    [(0, 9, 16, 24), (3, 0, 16, 24), (3, 9, 0, 24), (3, 9, 16, 0), (0, 0, 16, 24)],
    ids=["no_experts", "no_rows", "no_depth", "no_columns", "nothing"],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
def test_nothing_to_multiply(experts, rows, width, out, transposed):
    """No extent of zero reaches a tensor map; rows of no expert and empty sums are zero."""
    counts = [rows] + [0] * (experts - 1) if experts else []
    inputs = product(BF16, width, out, *counts, transposed=transposed)
    inputs["rows"] = randn(BF16, rows, width)
    check("grouped_gemm", inputs, [])
    drows, (m, n) = randn(BF16, rows, out, seed=2), (width, out) if transposed else (out, width)
    begin = randn(F32, experts, m, n, seed=3)
    with hopper() as device:
        total = here(begin.clone())
        arguments = here(inputs["rows"], drows, inputs["offsets"])
        ops.grouped_gemm_wgrad(*arguments, transposed=transposed, out=total)
        assert products(device) == [] and torch.equal(back(total), begin)


@pytest.mark.parametrize(
    "hidden, width, tokens, experts",
    [(0, 16, 5, 2), (16, 0, 5, 2), (16, 16, 0, 2), (16, 16, 5, 0)],
    ids=["no_hidden", "no_ffn", "no_tokens", "no_experts"],
)
def test_nothing_to_multiply_in_experts(hidden, width, tokens, experts):
    if experts:
        routing = reference.route(random_ids(tokens, experts, 1), experts)
        offsets = routing.offsets
    else:
        offsets = torch.zeros(1, dtype=torch.int64)
    inputs = {
        "x": randn(BF16, tokens, hidden),
        "weights": randn(F32, tokens, seed=3),
        "w1": randn(BF16, experts, 2 * width, hidden, seed=1),
        "w2": randn(BF16, experts, hidden, width, seed=2),
        "offsets": offsets,
    }
    check("experts", inputs, [])


def test_what_tma_cannot_take_goes_to_mma():
    for inputs in (product(BF16, 88, 72, 9, 5, shift=1), product(BF16, 33, 130, 9, 5)):
        with hopper() as device:
            y = back(ops.grouped_gemm(**here(inputs)))
        assert not products(device)
        torch.testing.assert_close(y, reference.grouped_gemm(**inputs), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("offsets", [[0, 50, 9, 80], [-5, 3, 2**40, 1], [7, 7, 7, 7]])
def test_hostile_offsets_stay_within_the_arrays(offsets):
    rows, drows, w = randn(BF16, 12, 8), randn(BF16, 12, 16), randn(BF16, 3, 16, 8)
    rows, drows, w, hostile = here(rows, drows, w, torch.tensor(offsets))
    for call in (
        lambda: raw._grouped_gemm(rows, w, hostile, False),
        lambda: raw._grouped_gemm_wgrad(rows, drows, hostile, False, None, 0, False),
    ):
        with hopper() as device, suppress(ptx.GlobalRace, ptx.UninitializedRead):
            call()
        assert len(products(device)) == 1


# ---- experts
@pytest.mark.parametrize("kind", reference.GATED)
def test_gated(kind):
    check("experts", ffn(BF16, 72, 136, 13, 3, 2, activation=kind, limit=0.8), EXPERTS)


@pytest.mark.parametrize("kind", reference.UNGATED)
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
def planted(monkeypatch, where):  # noqa: F811
    """Replaces two products by the same kernels with a bug."""
    if where == "gpu":
        pytest.skip("the emulator is what has to find it")

    def plant(bug: str):
        emulated.products_as(monkeypatch, bug=bug)

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
