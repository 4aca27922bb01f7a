"""grouped_gemm: the rows of each expert times that expert's weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives, _main_grad
from moekernels.ops._ffn import tf32, wgrad_or_accumulate
from moekernels.ops._library import fake, raw
from moekernels.ops._main_grad import main_grad_of
from moekernels.ops._op import op

__all__ = ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"]

T = TypeVar("T", Tensor, Tensor | None)
_grouped_gemm = raw._grouped_gemm.default
_grouped_gemm_fp8 = raw._grouped_gemm_fp8.default
_wgrad = raw._grouped_gemm_wgrad.default


@fake("_grouped_gemm")
def _(rows: Tensor, w: Tensor, offsets: Tensor, transposed: bool, tf32: bool = False) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[2 if transposed else 1])


@fake("_grouped_gemm_fp8")
def _(rows, row_scales, w, w_scales, offsets, bias, weights, token_of, tokens, dtype) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[1], dtype=getattr(torch, dtype))


@fake("_grouped_gemm_wgrad")
def _(rows, drows, offsets, transposed, token_of, tokens, gather, tf32=False) -> Tensor:
    m, n = (rows, drows) if transposed else (drows, rows)
    return rows.new_empty(offsets.shape[0] - 1, m.shape[1], n.shape[1])


@fake("_grouped_gemm_wgrad_")
def _(main_grad, rows, drows, offsets, transposed, token_of, tokens, gather, tf32=False) -> None:
    return None


@fake("_grouped_gemm_wgrads_")
def _(main_grad, rows, drows, offsets, transposed, token_of, tokens, gather, tf32=False) -> None:
    return None


def autocast(device: torch.device, *tensors: T) -> tuple[T, ...]:
    """The tensors in the dtype that autocast asks matrix products on `device` to run in;
    untouched without autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    return tensors


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, w, offsets, transposed: bool, main_grad) -> Tensor:
        ctx.save_for_backward(rows, w, offsets)
        ctx.transposed, ctx.main_grad = transposed, main_grad
        return _grouped_gemm(rows, w, offsets, transposed, tf32(rows))

    @staticmethod
    def backward(ctx, drows: Tensor):
        rows, w, offsets = ctx.saved_tensors
        need_rows, need_w = ctx.needs_input_grad[:2]
        _, main_grad = _main_grad.reached(ctx, (None, ctx.main_grad), (rows, w))
        dgrad = dw = None
        if _derivatives.needs_plain():  # by functions that are differentiable themselves
            if need_rows:
                w = w if ctx.main_grad is None else _main_grad.Collect.apply(w, ctx.main_grad)
                dgrad = grouped_gemm_dgrad(drows, w, offsets, transposed=ctx.transposed)
            if need_w:
                dw = grouped_gemm_wgrad(rows, drows, offsets, transposed=ctx.transposed)
                dw = _main_grad.add(main_grad, dw)
            return dgrad, dw, None, None, None
        drows = drows.contiguous()
        if need_rows:
            dgrad = _grouped_gemm(drows, w, offsets, not ctx.transposed, tf32(drows))
        if need_w:
            dw = wgrad_or_accumulate(main_grad, rows, drows, offsets, ctx.transposed)
        return dgrad, dw, None, None, None


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, drows, offsets, transposed: bool) -> Tensor:
        ctx.save_for_backward(rows, drows, offsets)
        ctx.transposed = transposed
        return _wgrad(rows, drows, offsets, transposed, None, 0, False, tf32(rows))

    @staticmethod
    def backward(ctx, ddw: Tensor):
        rows, drows, offsets = ctx.saved_tensors
        need_rows, need_drows = ctx.needs_input_grad[:2]
        grad_rows = grad_drows = None
        if need_rows:
            grad_rows = grouped_gemm_dgrad(drows, ddw, offsets, transposed=ctx.transposed)
        if need_drows:
            grad_drows = grouped_gemm_dgrad(rows, ddw, offsets, transposed=not ctx.transposed)
        return grad_rows, grad_drows, None, None


def _product(rows, w, offsets, transposed: bool, main_grad: Tensor | None = None) -> Tensor:
    rows, w = rows.contiguous(), w.contiguous()
    if torch.is_grad_enabled() and (rows.requires_grad or w.requires_grad):
        return _GroupedGemm.apply(rows, w, offsets, transposed, main_grad)
    return _grouped_gemm(rows, w, offsets, transposed, tf32(rows))


def _fp8(
    rows: Tensor,
    w: Tensor,
    offsets: Tensor,
    transposed: bool,
    row_scales: Tensor | None,
    w_scales: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if row_scales is None or w_scales is None:
        raise RuntimeError("grouped_gemm: row_scales and w_scales are of FP8 rows and w; give both")
    if transposed:
        raise RuntimeError(
            "grouped_gemm: FP8 weights lie along the summed axis; give "
            "quantize(w, tiles=True, transposed=True) rather than transposed=True"
        )
    all_ = (rows, row_scales, w, w_scales)
    why = "it is of rounded numbers; ops.experts(fp8=True) has the gradients"
    _derivatives.refuse_gradients("grouped_gemm in FP8", why, *all_)
    name = str(torch.bfloat16 if dtype is None else dtype).removeprefix("torch.")
    given = (t.contiguous() for t in all_)
    return _grouped_gemm_fp8(*given, offsets, None, None, None, 0, name)


@op(reference.grouped_gemm)
def grouped_gemm(
    rows: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    transposed: bool = False,
    row_scales: Tensor | None = None,
    w_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies each expert's rows by its weights.

        out[offsets[e]:offsets[e+1]] = rows[offsets[e]:offsets[e+1]] @ w[e].T

    Args:
        rows: [R, I] fp32, bf16, fp16 or fp64, in expert order (`permute`); or FP8 of `quantize`.
        w: [E, O, I] in rows' dtype; with `transposed` [E, I, O], and the product is rows @ w[e].
        offsets: [E+1] int64, where each expert's rows begin (`Routing.offsets`).
        row_scales: with FP8, [R, ceil(I/128)] fp32 of `quantize(rows)`.
        w_scales: with FP8, [E, ceil(O/128), ceil(I/128)] fp32 of `quantize(w, tiles=True)`.
        dtype: with FP8, the result's: fp32, bf16 (None) or fp16.

    Returns:
        [R, O] in rows' dtype. Rows past offsets[E] are zero.

    Raises:
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        Differentiable any number of times. Sums in fp32 (fp64 for fp64). On CUDA fp32 inputs are
        rounded to tf32 only where torch's own products round them
        (`torch.set_float32_matmul_precision`). If `w` is a parameter with an fp32 attribute
        `main_grad` of its shape, a backward that reaches w adds its gradient to that and returns
        none for w. Under autocast both run in autocast's dtype. Deterministic: the same input
        gives the same bits on any number of threads. An expert without rows costs nothing.

        In FP8 (e4m3) nothing is differentiable and w is never transposed. Each 128 of I are summed
        apart and promoted, times both scales, to fp32 sums: within (B + 5) 2^-24 sum |a b| of the
        exact product of the dequantized numbers, B = ceil(I/128), before the result is rounded.
        Source: DeepSeek-V3 2024, section 3.3.

    Examples:
        >>> w = torch.tensor([[[1.0, 1.0]], [[10.0, 10.0]]])  # two experts, from 2 to 1
        >>> ops.grouped_gemm(torch.ones(3, 2), w, torch.tensor([0, 1, 3])).tolist()
        [[2.0], [20.0], [20.0]]
        >>> rows, row_scales = ops.quantize(torch.ones(3, 2))
        >>> w, w_scales = ops.quantize(w, tiles=True)
        >>> scales = {"row_scales": row_scales, "w_scales": w_scales}
        >>> ops.grouped_gemm(rows, w, torch.tensor([0, 1, 3]), **scales).tolist()
        [[2.0], [20.0], [20.0]]
    """
    if row_scales is not None or w_scales is not None:
        return _fp8(rows, w, offsets, transposed, row_scales, w_scales, dtype)
    if dtype is not None:
        raise RuntimeError("grouped_gemm: dtype is of products in FP8; others give rows' dtype")
    main_grad = main_grad_of(w)
    rows, w = autocast(rows.device, rows, w)
    return _product(rows, w, offsets, transposed, main_grad)


@op(reference.grouped_gemm_dgrad)
def grouped_gemm_dgrad(
    drows: Tensor, w: Tensor, offsets: Tensor, *, transposed: bool = False
) -> Tensor:
    """The gradient of `grouped_gemm` for its rows: drows [R, O], w [E, O, I] (transposed: [E, I,
    O]) -> [R, I].

    Apart from `grouped_gemm_wgrad`, for schedules that run the two at different times.

    Examples:
        >>> w = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]])
        >>> ops.grouped_gemm_dgrad(torch.ones(3, 1), w, torch.tensor([0, 1, 3])).tolist()
        [[1.0, 2.0], [10.0, 20.0], [10.0, 20.0]]
    """
    return _product(drows, w, offsets, not transposed)


@op(reference.grouped_gemm_wgrad)
def grouped_gemm_wgrad(
    rows: Tensor,
    drows: Tensor,
    offsets: Tensor,
    *,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of `grouped_gemm` for w: rows [R, I], drows [R, O] -> [E, O, I] (transposed:
    [E, I, O]).

    With `out` [E, O, I] fp32 (fp64 for fp64), the main gradient, it is added to that, which is
    returned; experts without rows then cost nothing. Without, it is differentiable itself.

    Examples:
        >>> rows, drows = torch.ones(3, 2), torch.ones(3, 1)
        >>> ops.grouped_gemm_wgrad(rows, drows, torch.tensor([0, 1, 3])).tolist()
        [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    rows, drows = rows.contiguous(), drows.contiguous()
    if out is not None:
        _derivatives.refuse_gradients("grouped_gemm_wgrad", "it adds to out", rows, drows)
        _main_grad.wgrad_(out, rows, drows, offsets, transposed, None, 0, False, tf32(rows))
        return out
    if torch.is_grad_enabled() and (rows.requires_grad or drows.requires_grad):
        return _Wgrad.apply(rows, drows, offsets, transposed)
    return _wgrad(rows, drows, offsets, transposed, None, 0, False, tf32(rows))
