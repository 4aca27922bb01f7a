"""What is special to permute and combine: conversions of every half, and indices that lie."""

from __future__ import annotations

import pytest
import torch

from moekernels import ops, reference
from moekernels.ops._library import raw

HALVES = [torch.float16, torch.bfloat16]
LIES = torch.tensor([-1, -2, 7, 8, 2**31 - 1, -(2**31), 0, 6, 3], dtype=torch.int32)


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_values_of_every_half_survive(dtype):
    """Widening and rounding back is the identity on all 65536 patterns."""
    rows = every_half(dtype).view(256, 256)
    index = torch.arange(256, dtype=torch.int32)
    out = ops.combine(rows, index.view(-1, 1), index)
    number = ~rows.isnan()
    assert torch.equal(out[number], rows[number])
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weight", [1 / 3, 1.0009, 2.0**-9, 2.0**-14, 3e4, -7.7])
def test_values_are_rounded_to_nearest_even(dtype, weight):
    """Subnormal, overflowing and halfway products round as torch rounds them."""
    rows = every_half(dtype).view(256, 256)
    index = torch.arange(256, dtype=torch.int32)
    weights = torch.full((256, 1), weight)
    out = ops.combine(rows, index.view(-1, 1), index, weights)
    expected = (rows.float() * weights).to(dtype)
    number = ~expected.isnan()
    assert torch.equal(out[number], expected[number])
    assert out[~number].isnan().all()


def without_lies(index: torch.Tensor, length: int) -> torch.Tensor:
    return torch.where((index >= 0) & (index < length), index, -1)


def test_permute_takes_rows_outside_as_unused():
    x = torch.randn(7, 5)
    row_of = torch.zeros(7, 1, dtype=torch.int32)
    expected = reference.permute(x, without_lies(LIES, 7), row_of)
    assert torch.equal(ops.permute(x, LIES, row_of), expected)


def test_combine_takes_rows_outside_as_dropped():
    rows, row_of = torch.randn(7, 5), LIES.view(3, 3)
    token_of = torch.zeros(7, dtype=torch.int32)
    weights = torch.randn(3, 3)
    honest = without_lies(row_of, 7)
    for w in (None, weights):
        out = ops.combine(rows, row_of, token_of, w)
        torch.testing.assert_close(out, reference.combine(rows, honest, token_of, w))


def test_weighted_backward_with_indices_that_disagree():
    """row_of and token_of that are not inverse: nothing is written outside, or twice."""
    rows, weights, dout = torch.randn(9, 5), torch.randn(3, 3), torch.randn(3, 5)
    row_of = LIES.view(3, 3)
    token_of = torch.tensor([2, 0, 2, 1, 5, -1, 2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    drows, dweights = raw._combine_backward(dout, rows, row_of, token_of, weights)
    expected = torch.zeros(9, 5)
    for t, k in [(2, 0), (2, 1)]:  # rows 0 and 6 name token 2, which names them
        expected[row_of[t, k]] = weights[t, k] * dout[t]
    torch.testing.assert_close(drows, expected)
    picked = rows[row_of.clamp(0, 8).long()]
    inside = (row_of >= 0) & (row_of < 9)
    torch.testing.assert_close(dweights, torch.where(inside, (picked * dout[:, None]).sum(-1), 0))


def test_pack_takes_slots_outside_as_unused():
    x, weights = torch.randn(4, 5), torch.randn(4, 2)
    honest = without_lies(LIES, 8)
    expected = reference.pack(x, weights, honest, 2)
    assert torch.equal(ops.pack(x, weights, LIES, 2), expected)


def test_permute_and_combine_are_differentiable_twice():
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]])
    routing = reference.route(ids, 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    index = (routing.token_of, routing.row_of)
    assert torch.autograd.gradgradcheck(lambda x: ops.permute(x, *index), x)
    assert torch.autograd.gradgradcheck(lambda r: ops.combine(r, *index[::-1]), rows)


def test_combine_keeps_its_sum_in_fp32():
    """bf16 rows whose running sum would not move in bf16."""
    rows = torch.tensor([[256.0]] + [[1.0]] * 8, dtype=torch.bfloat16)
    out = ops.combine(rows, torch.arange(9, dtype=torch.int32)[None], torch.zeros(9).int())
    assert out.item() == 264


def test_autocast_leaves_weights_and_sums_alone():
    rows, index = torch.randn(4, 3), torch.arange(4, dtype=torch.int32)
    weights = torch.randn(4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.combine(rows, index.view(-1, 1), index, weights)
        gate = ops.gate(rows.bfloat16(), 2)
    assert out.dtype == torch.float32 and torch.equal(out, rows * weights)
    assert gate.weights.dtype == gate.score_sum.dtype == torch.float32
