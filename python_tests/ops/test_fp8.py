"""Numbers in FP8 and their products: the bits that the reference says, and its bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops, reference
from python_tests.support.contract import same_bits
from python_tests.support.spec import randn

BF16, F32 = torch.bfloat16, torch.float32
E4M3 = torch.float8_e4m3fn
U = 2.0**-24


def spread(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    scale = 10.0 ** randn(torch.float64, *shape, seed=seed + 50)
    return (randn(torch.float64, *shape, seed=seed) * scale).to(dtype)


def test_every_e4m3_is_itself():
    """A block whose largest is 448 has a scale of one: all 254 numbers come back."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite = codes[codes.float().isfinite()].float()
    blocks = torch.full((2, 128), 448.0)
    blocks[:, 1:] = finite.view(2, 127)
    values, scales = ops.quantize(blocks)
    assert scales.tolist() == [[1.0], [1.0]]
    assert same_bits(values[:, 1:].contiguous().float(), blocks[:, 1:].contiguous())


@pytest.mark.parametrize("tiles", [False, True])
def test_quantization_is_within_its_bound(tiles):
    x = spread(F32, 3, 150, 300) if tiles else spread(F32, 70, 300)
    values, scales = ops.quantize(x, tiles=tiles)
    exact = reference.dequantize(values, scales, tiles=tiles)
    rows = 128 if tiles else 1
    each = scales.double().repeat_interleave(rows, -2).repeat_interleave(128, -1)
    each = each[..., : x.shape[-2], : x.shape[-1]]
    bound = torch.maximum(x.double().abs() / 16, each * 2.0**-10) * (1 + 2.0**-20)
    error = (exact - x.double()).abs()
    assert (error <= bound).all()
    assert (error > bound / 2).any()  # and the bound is no larger than it need be


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_throughout_its_block(bad, tiles):
    x = randn(F32, 2, 256)
    x[1, 130] = bad
    if tiles:
        values, scales = (t[0] for t in ops.quantize(x[None], tiles=True))
        wrong = torch.zeros(2, 256, dtype=torch.bool)
        wrong[:, 128:] = True
    else:
        values, scales = ops.quantize(x)
        wrong = torch.zeros(2, 256, dtype=torch.bool)
        wrong[1, 128:] = True
    assert torch.equal(reference.dequantize(values, scales, tiles=tiles).isnan(), wrong)
    w, w_scales = ops.quantize(randn(F32, 1, 3, 256, seed=1), tiles=True)
    if not tiles:
        how = {"row_scales": scales, "w_scales": w_scales, "dtype": F32}
        y = ops.grouped_gemm(values, w, torch.tensor([0, 2]), **how)
        assert y[0].isfinite().all() and y[1].isnan().all()


def product(rows: int, width: int, out: int, experts: int, dtype=F32, at=None):
    offsets = torch.tensor(at or [rows * e // experts for e in range(experts + 1)])
    values, row_scales = ops.quantize(spread(BF16, rows, width))
    w, w_scales = ops.quantize(spread(BF16, experts, out, width, seed=1), tiles=True)
    scales = {"row_scales": row_scales, "w_scales": w_scales, "dtype": dtype}
    return (values, w, offsets), scales


SHAPES = {
    "steps": (7, 160, 5, 2, None),
    "one_block": (9, 128, 33, 3, None),
    "short": (5, 3, 9, 1, None),
    "two_scales_of_columns": (37, 300, 290, 2, None),
    "tail_and_empty": (11, 140, 130, 3, [0, 4, 4, 9]),
    "nothing": (0, 128, 4, 2, None),
    "no_depth": (4, 0, 6, 2, None),
}


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_products_have_the_bits_of_the_reference(name, dtype):
    *shape, at = SHAPES[name]
    inputs, scales = product(*shape, dtype, at)
    ours, theirs = (f(*inputs, **scales) for f in (ops.grouped_gemm, reference.grouped_gemm))
    assert same_bits(ours, theirs)


def test_a_product_is_within_its_bound_and_summed_by_blocks():
    """Of the exact product of the same numbers; a sum without promotion is further away."""
    depth, blocks = 4096, 32
    (values, w, offsets), scales = product(6, depth, 20, 1)
    ours = ops.grouped_gemm(values, w, offsets, **scales).double()
    a = reference.dequantize(values, scales["row_scales"])
    b = reference.dequantize(w, scales["w_scales"], tiles=True)[0]
    most = (blocks + 5) * U / (1 - (blocks + 5) * U) * (a.abs() @ b.abs().T)
    assert ((ours - a @ b.T).abs() <= most).all()


def test_threads_give_the_same_bits():
    inputs, scales = product(500, 260, 300, 3)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(ops.grouped_gemm(*inputs, **scales))
    torch.set_num_threads(threads)
    assert same_bits(*results)


def test_what_is_refused():
    (values, w, offsets), scales = product(4, 128, 8, 2)
    transposed = "FP8 weights lie along the summed axis; give quantize"
    for change, text in (
        ({"w_scales": None}, "row_scales and w_scales are of FP8 rows and w; give both"),
        ({"transposed": True}, transposed),
        ({"dtype": torch.float64}, "dtype must be float32|bfloat16|float16, got 'float64'"),
        ({"row_scales": scales["row_scales"][:3]}, "row_scales must be float32 [R=4, I/128=1]"),
        ({"w_scales": scales["w_scales"][:, :0]}, "w_scales must be float32 [E=2, O/128=1, I/128"),
    ):
        with pytest.raises(RuntimeError) as caught:
            ops.grouped_gemm(values, w, offsets, **{**scales, **change})
        assert str(caught.value).startswith("grouped_gemm: " + text)
    with pytest.raises(RuntimeError, match="rows must be float8_e4m3fn .R, I., got bfloat16"):
        ops.grouped_gemm(values.bfloat16(), w, offsets, **scales)
    with pytest.raises(RuntimeError, match="rows must be float32.* got float8_e4m3fn"):
        ops.grouped_gemm(values, w, offsets)
    with pytest.raises(RuntimeError, match="dtype is of products in FP8"):
        ops.grouped_gemm(torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.tensor([0, 1]), dtype=F32)


def test_raw_op_is_as_it_says():
    (values, w, offsets), scales = product(6, 140, 10, 2, BF16)
    raw = torch.ops.moekernels._grouped_gemm_fp8.default
    bias, weights = randn(BF16, 2, 10, seed=3), randn(F32, 6, seed=4)
    token_of = torch.tensor([0, 1, -1, 2, 9, 3], dtype=torch.int32)
    ws = scales["row_scales"], w, scales["w_scales"], offsets
    args = (values, *ws, bias, weights, token_of, 5, "bfloat16")
    # "test_schema" does arithmetic on its arguments, which torch has not for e4m3.
    torch.library.opcheck(raw, args, test_utils=["test_faketensor"])
    y = raw(*args)
    plain = reference.grouped_gemm(values, w, offsets, **{**scales, "dtype": F32})
    of_row = torch.tensor([0, 0, 0, 1, 1, 1])
    wanted = (plain + bias.float()[of_row]) * weights[:, None]
    wanted[2] = wanted[4] = 0
    assert same_bits(y, wanted.bfloat16())
