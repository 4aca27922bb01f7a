"""grouped_gemm and experts as CUDA ops under the PTX emulator, beyond the contract's own cases:
tile edges, both tiles, alignments, rows that must not leak, hostile offsets, fp32 precision, late
copies, and bugs planted in the PTX that must be caught.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops, reference
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.contract import assert_close, assert_same, evaluate, hold, lift, spec_of
from python_tests.support.products import ffn, offsets_of, product
from python_tests.support.spec import randn, random_ids

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")

BF16, F32 = torch.bfloat16, torch.float32


def check(name: str, inputs: dict, **how) -> tuple:
    """A call on the emulated device against the reference; what it gave."""
    spec = spec_of(name)
    with emulated.emulated_cuda(**how) as device:
        ours = evaluate(spec.fn, spec, inputs)
    assert device.launches
    hold(spec, inputs, ours)
    return ours


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "counts",
    [(0, 130, 1, 0, 66), (131, 200, 0)],  # the small tile; the large one
    ids=["small", "large"],
)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "off"])
def test_tiles_and_alignments(counts, transposed, shift):
    check("grouped_gemm", product(BF16, 88, 72, *counts, transposed=transposed, shift=shift))


@pytest.mark.parametrize("width, out", [(1, 1), (33, 130), (0, 5)])
def test_odd_widths(width, out):
    with emulated.emulated_cuda():
        inputs = product(F32, width, out, 3, 0, 65, unused=2)
        y = ops.grouped_gemm(**inputs)
    torch.testing.assert_close(y, reference.grouped_gemm(**inputs))
    assert not y[-2:].any()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
def test_rows_do_not_leak(dtype):
    """Neighbours that are not numbers change no bit of an expert's rows; rows of no expert neither
    leak nor survive."""
    inputs = product(dtype, 40, 24, 5, 7, 6, unused=3)
    drows = randn(dtype, 21, 24, seed=2)
    wild = {**inputs, "rows": inputs["rows"].clone()}
    wild["rows"][:5] = float("nan")
    wild["rows"][12:15] = float("inf")
    wild["rows"][18:] = float("nan")
    wild_drows = drows.clone()
    wild_drows[18:] = float("inf")
    offsets = inputs["offsets"]
    with emulated.emulated_cuda():
        calm, y = ops.grouped_gemm(**inputs), ops.grouped_gemm(**wild)
        calm_dw = ops.grouped_gemm_wgrad(inputs["rows"], drows, offsets)
        dw = ops.grouped_gemm_wgrad(wild["rows"], wild_drows, offsets)
    assert torch.equal(y[5:12], calm[5:12]) and not y[18:].any()
    assert torch.equal(y[15:18], calm[15:18]) and y[:5].isnan().all()
    assert torch.equal(dw[1], calm_dw[1]) and dw[0].isnan().all()


@pytest.mark.parametrize("offsets", [[0, 50, 9, 80], [-5, 3, 2**40, 1], [7, 7, 7, 7]])
def test_hostile_offsets_stay_within_the_arrays(offsets):
    """Their values are not read on the host. Groups that overlap race for their rows, and rows of
    no group stay unwritten, but no kernel leaves its arrays."""
    rows, drows, w = randn(F32, 12, 8), randn(F32, 12, 4), randn(F32, 3, 4, 8)
    weights, hostile = torch.ones(12), torch.tensor(offsets)
    w1, w2 = randn(F32, 3, 8, 8), randn(F32, 3, 8, 4)
    style = ("swiglu", 1.702, 7.0, False, False, False)
    ffn = rows, weights, w1, w2, hostile, None, None, None, *style
    for call in (
        lambda: raw._grouped_gemm(rows, w, hostile, False),
        lambda: raw._grouped_gemm_wgrad(rows, drows, hostile, False, None, 0, False),
        lambda: raw._experts(*ffn, True),
        lambda: raw._experts_dact(*ffn, rows, rows, True, True),
        lambda: raw._experts_dbias(rows, weights, hostile, None, 0),
    ):
        with emulated.emulated_cuda(), suppress(ptx.GlobalRace, ptx.UninitializedRead):
            call()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(0, 40, 1), (140, 80, 0)], ids=["small", "large"])
@pytest.mark.parametrize("width", [72, 75], ids=["aligned", "odd"])
def test_wgrad_sets_and_accumulates(counts, width, transposed):
    rows, drows = randn(BF16, sum(counts), width), randn(BF16, sum(counts), 80, seed=2)
    offsets = offsets_of(*counts)
    shape = (3, width, 80) if transposed else (3, 80, width)
    begin = randn(F32, *shape, seed=3)
    with emulated.emulated_cuda():
        dw = ops.grouped_gemm_wgrad(rows, drows, offsets, transposed=transposed)
        total = begin.clone()
        ops.grouped_gemm_wgrad(rows, drows, offsets, transposed=transposed, out=total)
    empty = counts.index(0)
    assert not dw[empty].any() and torch.equal(total[empty], begin[empty])
    exact = reference.grouped_gemm_wgrad(
        rows.double(), drows.double(), offsets, transposed=transposed
    )
    plain = reference.grouped_gemm_wgrad(rows, drows, offsets, transposed=transposed)
    assert_close("dw", dw, plain, exact)
    torch.testing.assert_close(total.double(), begin + exact, rtol=1e-5, atol=1e-4)


def test_wgrad_leaves_out_unused_rows():
    """Rows without a token count as zero whatever they hold, on both sides; also by token_of."""
    token_of = torch.tensor([1, -1, 0, 2, 9, 1], dtype=torch.int32)
    used = (token_of >= 0) & (token_of < 3)
    offsets, x, drows = offsets_of(3, 3), randn(BF16, 3, 16), randn(BF16, 6, 8, seed=1)
    drows[~used] = float("nan")
    rows = torch.where(used[:, None], x[token_of.clamp(0, 2).long()], float("inf"))
    clean = torch.where(used[:, None], rows, 0), torch.where(used[:, None], drows, 0)
    expected = reference.grouped_gemm_wgrad(*clean, offsets)
    with emulated.emulated_cuda() as device:
        plain = raw._grouped_gemm_wgrad(rows, drows, offsets, False, token_of, 3, False)
        assert len(device.launches) == 1
        gathered = raw._grouped_gemm_wgrad(x, drows, offsets, False, token_of, 3, True)
        assert len(device.launches) == 3, "rows are permuted first"
    assert torch.equal(plain, gathered)
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interleaved": True, "transposed": True, "activation": "swiglu_oai"},
        {"activation": "relu2", "recompute": True},
    ],
    ids=["swiglu", "gpt_oss", "relu2"],
)
def test_experts_in_the_large_tile(options):
    """More than 64 rows an expert and widths above 64; F is no multiple of the tile."""
    check("experts", ffn(BF16, 72, 88, 150, 2, 1, **options))


@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_of_odd_widths(interleaved):
    """Neither H nor F allows vectors; F ends within a tile, and dweights has two parts."""
    check("experts", ffn(BF16, 21, 83, 20, 3, 2, interleaved=interleaved))


def test_unused_rows_give_zero_whatever_dy_holds():
    inputs = ffn(BF16, 16, 24, 9, 3, 2)
    unused = inputs["token_of"] < 0
    assert unused.any()
    dy = randn(BF16, len(unused), 16, seed=6)
    dy[unused] = float("nan")
    h = randn(BF16, len(unused), 48, seed=7)
    h[unused] = float("inf")
    names = ("x", "weights", "w1", "w2", "offsets", "token_of", "b1", "b2")
    args = [inputs[n] for n in names]
    style = ("swiglu", 1.702, 7.0, False, False, False)
    with emulated.emulated_cuda():
        dh, a, dweights = raw._experts_dact(*args, *style, dy, h, True, True)
    for out in (dh, a, dweights):
        assert not out[unused].any() and out.isfinite().all()


def kept_bytes(inputs: dict) -> int:
    """What autograd keeps beside the parameters, the routing and the weights."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("x", "w1", "w2", "weights")}
    free = [leaves["w1"], leaves["w2"], leaves["weights"]]
    free += [inputs[n] for n in ("offsets", "token_of", "row_of")]
    known, kept = {t.data_ptr() for t in free}, {}

    def pack(t):
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ops.experts(**{**inputs, **leaves})
    del out
    return sum(kept.values())


def test_saved_activations():
    """2TH + 4TKF bytes in 16 bits, x and h; with recompute x alone, less than a quarter."""
    tokens, hidden, width, top_k = 12, 16, 32, 2
    inputs = ffn(BF16, hidden, width, tokens, 4, top_k)
    routing = reference.route(random_ids(tokens, 4, top_k), 4)
    inputs |= {"token_of": routing.token_of, "row_of": routing.row_of, "offsets": routing.offsets}
    inputs |= {"weights": randn(F32, tokens * top_k), "b1": None, "b2": None}
    bound = 2 * tokens * hidden + 4 * tokens * top_k * width
    with emulated.emulated_cuda():
        assert kept_bytes(inputs) == bound
        assert kept_bytes({**inputs, "recompute": True}) <= bound / 4


def test_fp32_keeps_its_precision_unless_allowed_to_round():
    inputs = product(F32, 96, 40, 30, 0, 11)
    exact = reference.grouped_gemm(**lift(inputs))
    args = inputs["rows"], inputs["w"], inputs["offsets"], False
    with emulated.emulated_cuda():
        full, rounded = raw._grouped_gemm(*args), raw._grouped_gemm(*args, tf32=True)
    error = [(y.double() - exact).square().mean().sqrt().item() for y in (full, rounded)]
    scale = exact.square().mean().sqrt().item()
    assert error[0] < 1e-6 * scale < 1e-4 * scale < error[1] < 1e-3 * scale


@pytest.mark.parametrize("how", [{"lazy": True}, {"schedule": 3}, {"schedule": 4, "lazy": True}])
def test_late_copies_and_other_orders_change_no_bit(how):
    inputs = ffn(BF16, 136, 40, 12, 3, 2)
    spec = spec_of("experts")
    results = []
    for kwargs in ({}, how):
        with emulated.emulated_cuda(**kwargs):
            results.append(evaluate(spec.fn, spec, inputs))
    assert_same(*results)


PLANTED = {
    # A product of five stages needs each of these.
    "wait": ("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    "barrier": ("bar.sync \t0;", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    before, after = PLANTED[bug]
    text = emulated.source("grouped_gemm")
    assert before in text
    broken, sound = ptx.Module(text.replace(before, after)), emulated.module
    monkeypatch.setattr(emulated, "module", lambda s: broken if s == "grouped_gemm" else sound(s))
    inputs = product(BF16, 160, 16, 20, 9)
    with emulated.emulated_cuda(lazy=True), pytest.raises(ptx.PtxError):
        ops.grouped_gemm(**inputs)


def test_float64_is_refused():
    x, w1, w2 = (torch.zeros(s).double() for s in ((2, 3), (1, 8, 3), (1, 3, 4)))
    words = "is float64, which the CPU alone computes; give float32, bfloat16 or float16 on CUDA"
    with emulated.emulated_cuda() as device:
        for op, name, call in (
            ("grouped_gemm", "rows", lambda: ops.grouped_gemm(x, w1, offsets_of(2))),
            (
                "grouped_gemm_wgrad",
                "drows",
                lambda: ops.grouped_gemm_wgrad(x, x, offsets_of(2)),
            ),
            ("experts", "x", lambda: ops.experts(x, None, w1, w2, offsets_of(2))),
        ):
            with pytest.raises(RuntimeError) as error:
                call()
            assert str(error.value) == f"{op}: {name} {words}"
    assert not device.launches
