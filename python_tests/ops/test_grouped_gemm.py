"""grouped_gemm and experts where the engines change over: rows, columns, depths at tiles' edges."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekernels import ops, reference
from moekernels.ops._library import raw

ROWS = (
    1,
    2,
    12,
    13,
    14,
    15,
    16,
    17,
    20,
    21,
    24,
    25,
    33,
    47,
    48,
    49,
    64,
    65,
    80,
    81,
    96,
    97,
    112,
    127,
    128,
    129,
    200,
)
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-53}


def offsets_of(counts) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, depth: int) -> None:
    """|got - want| against the size of the summed products: rounding of sum and result."""
    # Sums run in fp32 (fp64 for fp64) whatever the dtype; the result is rounded once to its own.
    sum_eps = 2**-53 if got.dtype == torch.float64 else 2**-24
    tiny = 2**-25 if got.dtype == torch.float16 else 1e-30  # half a subnormal
    bound = (depth + 2) * sum_eps * size + 2 * EPS[got.dtype] * want.abs() + tiny
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "width,out",
    [(64, 96), (72, 7), (160, 33), (67, 35), (1, 5), (1100, 18), (300, 1100), (672, 40)],
)
def test_every_row_count(dtype: torch.dtype, transposed: bool, width: int, out: int):
    torch.manual_seed(0)
    offsets = offsets_of(ROWS)
    rows, experts = int(offsets[-1]), len(ROWS)
    x, drows = draw(dtype, rows, width), draw(dtype, rows, out)
    w = draw(dtype, experts, *((width, out) if transposed else (out, width)))

    def check(fn, oracle, depth, *inputs, **options):
        got = fn(*inputs, offsets, transposed=transposed, **options)
        want = oracle(*[t.double() for t in inputs], offsets, transposed=transposed)
        size = oracle(*[t.double().abs() for t in inputs], offsets, transposed=transposed)
        assert_close(got, want, size, depth)

    check(ops.grouped_gemm, reference.grouped_gemm, width, x, w)
    check(ops.grouped_gemm_dgrad, reference.grouped_gemm_dgrad, out, drows, w)
    check(ops.grouped_gemm_wgrad, reference.grouped_gemm_wgrad, max(ROWS), x, drows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [14, 20, 24])
def test_unused_rows_among_few(dtype: torch.dtype, rows: int):
    """Rows of no token read as zeros: the others get the bits that they get among themselves."""
    torch.manual_seed(0)
    x, w1, w2 = draw(dtype, 30, 24), draw(dtype, 1, 64, 24), draw(dtype, 1, 24, 32)
    offsets, weights = offsets_of([rows]), torch.ones(rows)
    token_of = torch.randperm(30)[:rows].int()
    whole = ops.experts(x, weights, w1, w2, offsets, token_of=token_of)
    unused = torch.tensor([0, 5, rows - 1])
    token_of[unused] = -1
    got = ops.experts(x, weights, w1, w2, offsets, token_of=token_of)
    whole[unused] = 0
    assert torch.equal(got, whole)


def test_main_grad_takes_the_gradient():
    torch.manual_seed(0)
    offsets = offsets_of([3, 0, 5])
    x = torch.randn(8, 6)
    w = torch.nn.Parameter(torch.randn(3, 4, 6))
    ops.grouped_gemm(x, w, offsets).square().sum().backward()
    want, w.grad = w.grad, None
    w.main_grad = torch.ones_like(w)
    ops.grouped_gemm(x, w, offsets).square().sum().backward()
    assert w.grad is None
    torch.testing.assert_close(w.main_grad, want + 1, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_main_grads(dtype: torch.dtype):
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (17, 2), dtype=torch.int32)
    routing = ops.route(ids, 4)
    x, weights = torch.randn(17, 16).to(dtype), torch.rand(34)
    shapes = {"w1": (4, 24, 16), "w2": (4, 16, 12), "b1": (4, 24), "b2": (4, 16)}
    params = {k: torch.nn.Parameter(torch.randn(*s).to(dtype) * 0.3) for k, s in shapes.items()}

    def run() -> None:
        y = ops.experts(
            x,
            weights,
            params["w1"],
            params["w2"],
            routing.offsets,
            token_of=routing.token_of,
            row_of=routing.row_of,
            b1=params["b1"],
            b2=params["b2"],
        )
        y.float().square().sum().backward()

    run()
    want = {k: p.grad.float() for k, p in params.items()}
    for p in params.values():
        p.grad, p.main_grad = None, torch.zeros(p.shape)
    run()
    for k, p in params.items():
        assert p.grad is None
        # The main gradient is not rounded to the parameter's dtype.
        tolerance = 2 * EPS[dtype] * want[k].abs() + 1e-5 * want[k].abs().max()
        assert ((p.main_grad - want[k]).abs() <= tolerance).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_of_many_columns(transposed: bool, interleaved: bool):
    """Blocks of C wider than the epilogue's chunks, in every phase, their last one narrower."""
    torch.manual_seed(0)
    offsets = offsets_of([70, 0, 5, 200])
    hidden, ffn = 1100, 1300
    inputs = [
        torch.randn(275, hidden),
        torch.rand(275),
        torch.randn(4, 2 * ffn, hidden) * hidden**-0.5,
        torch.randn(4, hidden, ffn) * ffn**-0.5,
    ]
    if transposed:
        inputs[2:] = [w.transpose(1, 2).contiguous() for w in inputs[2:]]
    dy = torch.randn(275, hidden)
    outputs = []
    for fn, dtype in ((ops.experts, torch.float32), (reference.experts, torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        y = fn(*leaves, offsets, transposed=transposed, interleaved=interleaved)
        y.backward(dy.to(dtype))
        outputs.append([y.detach(), *[t.grad for t in leaves]])
    for got, want in zip(*outputs):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_recompute_gives_the_same_bits():
    torch.manual_seed(0)
    offsets = offsets_of([40, 0, 70])
    x, weights = torch.randn(110, 48), torch.rand(110)
    w1, w2 = torch.randn(3, 80, 48), torch.randn(3, 48, 40)
    grads = []
    for recompute in (False, True):
        inputs = [t.clone().requires_grad_() for t in (x, weights, w1, w2)]
        ops.experts(*inputs, offsets, recompute=recompute).square().sum().backward()
        grads.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype):
    torch.manual_seed(0)
    offsets = offsets_of([300, 0, 17, 1, 90])
    x, w1, w2 = draw(dtype, 408, 96), draw(dtype, 5, 512, 96), draw(dtype, 5, 96, 256)
    weights = torch.rand(408)

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        inputs = [t.clone().requires_grad_() for t in (x, weights, w1, w2)]
        y = ops.experts(*inputs, offsets)
        y.float().square().sum().backward()
        return [y, *[t.grad for t in inputs]]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(2)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_lower_isa_levels(isa: str):
    """The levels below this machine's best: the row counts again, in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "row_count and (64-96 or 67-35)",
    ]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MOEKERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("seen", ["rows", "used rows", "gathered"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_several_microbatches_at_once(dtype, seen, transposed):
    """The bits of as many calls: of few rows each, of none, of more than are packed at a time."""
    torch.manual_seed(0)
    counts = [(3, 0, 8), (0, 0, 0), (14, 700, 1), (1, 530, 0)]
    m, n = 47, 300
    rows, drows, offsets, token_of, tokens = [], [], [], [], []
    for each in counts:
        offsets.append(offsets_of(each))
        size = sum(each)
        many = 5 if seen == "gathered" else size
        rows.append(draw(dtype, many, n))
        drows.append(draw(dtype, size, m))
        tokens.append(many)
        if seen != "rows":
            token_of.append(torch.randint(-1, many, (size,), dtype=torch.int32))
    shape = (3, n, m) if transposed else (3, m, n)
    grad = torch.promote_types(dtype, torch.float32)
    apart = torch.randn(shape, dtype=torch.float64).to(grad)
    joined, gather = apart.clone(), seen == "gathered"
    for i in range(len(counts)):
        tokens_seen = token_of[i] if token_of else None
        raw._grouped_gemm_wgrad_(
            apart, rows[i], drows[i], offsets[i], transposed, tokens_seen, tokens[i], gather
        )
    raw._grouped_gemm_wgrads_(joined, rows, drows, offsets, transposed, token_of, tokens, gather)
    assert torch.equal(joined, apart)


def test_several_microbatches_are_held_to_what_one_is():
    main_grad, x = torch.zeros(1, 2, 3), torch.ones(4, 3)
    drows, offsets = torch.ones(4, 2), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="of as many microbatches, got 2, 1, 2, 2 and 0"):
        raw._grouped_gemm_wgrads_(
            main_grad, [x, x], [drows], [offsets] * 2, False, [], [4, 4], False
        )
    with pytest.raises(
        RuntimeError, match="offsets must ascend from 0 to at most R=4, got 0 ... 5"
    ):
        beyond = torch.tensor([0, 5])
        raw._grouped_gemm_wgrads_(
            main_grad, [x, x], [drows] * 2, [offsets, beyond], False, [], [4, 4], False
        )
    with pytest.raises(RuntimeError, match="out must be"):
        raw._grouped_gemm_wgrads_(main_grad[:, :1], [x], [drows], [offsets], False, [], [4], False)
    assert not main_grad.any()
