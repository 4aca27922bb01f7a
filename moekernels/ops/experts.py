"""experts: the whole expert FFN over routed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives, _main_grad
from moekernels.ops._experts_fp8 import experts_fp8
from moekernels.ops._ffn import Ffn, Learnt, dbias_or_accumulate, tf32, wgrad_or_accumulate
from moekernels.ops._library import fake, raw
from moekernels.ops._main_grad import main_grad_of
from moekernels.ops._op import op, require_tensor, wide
from moekernels.ops.grouped_gemm import autocast

__all__ = ["experts"]

_experts = raw._experts.default
_dact = raw._experts_dact.default
_grouped_gemm = raw._grouped_gemm.default
_combine = raw._combine.default


@fake("_experts", bundle=Ffn)
def _(ffn: Ffn, keep_h: bool, row_of: Tensor | None = None):
    x, width = ffn.x, ffn.w1.shape[2 if ffn.transposed else 1]
    return x.new_empty(ffn.rows, x.shape[1]), x.new_empty(ffn.rows if keep_h else 0, width)


@fake("_experts_dact", bundle=Ffn)
def _(ffn: Ffn, dy, h: Tensor, want_weighted_a: bool, want_dweights: bool, da=None):
    x, rows, out = ffn.x, dy.shape[0], 2 if ffn.transposed else 1
    return (
        x.new_empty(rows, ffn.w1.shape[out]),
        x.new_empty(rows if want_weighted_a else 0, ffn.w2.shape[3 - out]),
        x.new_empty(rows if want_dweights else 0, dtype=wide(x.dtype)),
    )


@fake("_experts_dbias")
def _(rows, weights, offsets, token_of, tokens):
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1])


@fake("_experts_dbias_")
def _(main_grad, rows, weights, offsets, token_of, tokens):
    return None


_NONE = Learnt()


class _Experts(torch.autograd.Function):
    """Of the arguments in `Learnt` and others. On tiny inputs Python takes longer than the kernels,
    so what is called here is given by place."""

    @staticmethod
    def forward(
        ctx, x, weights, w1, w2, b1, b2, offsets, token_of, row_of, style, main_grads, recompute
    ):
        ffn = (x, weights, w1, w2, offsets, token_of, b1, b2, *style, tf32(x))
        y, h = _experts(*ffn, not recompute, row_of)
        ctx.save_for_backward(*ffn[:8], row_of, h)
        ctx.style, ctx.main_grads = style, main_grads
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        *tensors, row_of, h = ctx.saved_tensors
        ffn = Ffn._make((*tensors, *ctx.style, tf32(tensors[0])))
        need, main_grads = Learnt(*ctx.needs_input_grad[:6]), _NONE
        if ctx.main_grads is not None:
            main_grads = Learnt(*_main_grad.reached(ctx, ctx.main_grads, _learnt_of(ffn)))
        if _derivatives.needs_plain():
            found = _plain_backward(ctx, ffn, row_of, need, dy)
            grads = Learnt(*map(_main_grad.add, main_grads, found))
        else:
            grads = _backward(ffn, row_of, h, dy.contiguous(), need, main_grads)
        return *grads, None, None, None, None, None, None


def _learnt_of(ffn: Ffn) -> Learnt:
    return Learnt(ffn.x, ffn.weights, ffn.w1, ffn.w2, ffn.b1, ffn.b2)


def _backward(
    ffn: Ffn, row_of: Tensor | None, h: Tensor, dy: Tensor, need: Learnt, main_grads: Learnt
) -> Learnt:
    """The gradients that `need` asks for."""
    offsets, token_of, transposed = ffn.offsets, ffn.token_of, ffn.transposed
    tokens = ffn.x.shape[0]
    dx = dweights = dw1 = dw2 = db1 = db2 = None
    if need.x or need.weights or need.w1 or need.w2 or need.b1:
        dh, weighted_a, dweights = _dact(*ffn, dy, h, need.w2, need.weights)
    if need.b2:
        db2 = dbias_or_accumulate(main_grads.b2, dy, ffn.weights, offsets, token_of, tokens)
    if need.w2:
        dw2 = wgrad_or_accumulate(
            main_grads.w2, weighted_a, dy, offsets, transposed, token_of, tokens
        )
        del weighted_a
    if need.x:
        dx = _grouped_gemm(dh, ffn.w1, offsets, not transposed, ffn.tf32)
        dx = dx if token_of is None else _combine(dx, row_of, None)
    if need.w1:
        gather = token_of is not None
        dw1 = wgrad_or_accumulate(
            main_grads.w1, ffn.x, dh, offsets, transposed, token_of, tokens, gather
        )
    if need.b1:
        db1 = dbias_or_accumulate(main_grads.b1, dh, None, offsets, token_of, tokens)
    return Learnt(dx, dweights if need.weights else None, dw1, dw2, db1, db2)


def _plain_backward(ctx, ffn: Ffn, row_of: Tensor | None, need: Learnt, dy: Tensor) -> Learnt:
    """All gradients, in plain torch."""
    inputs, names = _learnt_of(ffn), Learnt._fields
    others = {n: v for n, v in ffn._asdict().items() if n not in (*names, "tf32")}

    def plain(*inputs: Tensor | None) -> Tensor:
        learnt: dict[str, Any] = dict(zip(names, inputs))
        return reference.experts(**learnt, **others, row_of=row_of)

    def alias(i: int, t: Tensor) -> Tensor:
        main_grad = None if ctx.main_grads is None else ctx.main_grads[i]
        return t.view_as(t) if main_grad is None else _main_grad.Collect.apply(t, main_grad)

    return Learnt(*_derivatives.vjp(plain, inputs, need, (dy,), alias))


def _plain(*, fp8: bool = False, **arguments: Any) -> Tensor:
    if fp8:
        raise RuntimeError(
            "experts: in FP8 it has no forward-mode derivative and takes part in no torch.func "
            "transform; give fp8=False"
        )
    return reference.experts(**arguments)


@op(_plain)
def experts(
    x: Tensor,
    weights: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    row_of: Tensor | None = None,
    activation: str = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    recompute: bool = False,
    fp8: bool = False,
) -> Tensor:
    """Runs every expert's FFN on its rows and applies the routing weights.

        h = x w1 + b1,  a = act(h),  out = weights * (a w2 + b2)

    Args:
        x: [R, H] rows in expert order, fp32, bf16, fp16 or fp64; or [T, H] tokens, seen through
            `token_of`.
        weights: [R] fp32 (fp64 for fp64), the routing weight of each row (`permute_weights`);
            None: all one.
        w1: [E, 2F, H], gate and up; ungated activations [E, F, H]. With `transposed` [E, H, 2F].
        w2: [E, H, F]; with `transposed` [E, F, H].
        offsets: [E+1] int64, where each expert's rows begin.
        token_of: [R] int32, the token of each row; rows whose token is outside [0, T) give zeros.
        row_of: [T, K] int32, the rows of each token; needed with `token_of` for x's gradient.
        activation: swiglu, geglu, reglu, swiglu_oai (clamped by `limit`, sigmoid of `alpha` gate,
            up + 1), swiglu_clamped (by `limit`); ungated: relu2, silu, gelu.
        b1: [E, 2F], the bias of w1, or None.
        b2: [E, H], the bias of w2, or None.
        interleaved: gate and up alternate in w1 and b1, rather than one after the other.
        recompute: keep not even h for the backward, and compute it again there.
        fp8: both products, and the gradients of x and a, of FP8 operands (`quantize`: rows by
            blocks of 1 x 128, weights of 128 x 128); all else, and the weights' gradients, of x's
            dtype, which is not fp64.

    Returns:
        [R, H] weighted rows in x's dtype, for `combine` to sum. Rows past offsets[E] are zero.

    Raises:
        TypeError: an argument that is no tensor or number where it must be one.
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        Keeps x and h [R, 2F] for the backward, no expert output: the weights' gradient is <da,
        a>. Sums in fp32 (fp64 for fp64); fp32 inputs on CUDA as in `grouped_gemm`. With `token_of`
        on CUDA the rows are permuted into scratch, and again in the backward, rather than kept; on
        Hopper products of fewer than 4096 columns gather them instead, with the same bits. A
        parameter with an attribute `main_grad` (fp32, its shape) has its gradient added there by a
        backward that reaches it, and none returned. Gradients of gradients are made in plain
        torch. Under autocast all but `weights` are cast. Deterministic, whatever the threads. With
        fp8 gradients pass through rounding as if there were none, and have none themselves; weights
        are quantized in every call (in the trainer, once an optimizer step).

    Examples:
        >>> rows, weights = torch.ones(3, 2), torch.tensor([1.0, 1.0, 0.5])
        >>> w1, w2 = torch.ones(2, 4, 2), torch.ones(2, 2, 4)  # E = 2, H = 2, F = 4
        >>> offsets = torch.tensor([0, 1, 3])  # one row for the first expert, two for the second
        >>> ops.experts(rows, weights, w1, w2, offsets, activation="relu2").tolist()
        [[16.0, 16.0], [16.0, 16.0], [8.0, 8.0]]
    """
    if row_of is not None:
        require_tensor(row_of)
    main_grads = [main_grad_of(p) for p in (w1, w2, b1, b2)]
    x, w1, w2 = autocast(x.device, x, w1, w2)
    if b1 is not None or b2 is not None:
        b1, b2 = autocast(x.device, b1, b2)
    if weights is not None and weights.dtype != torch.float64 and x.dtype != torch.float64:
        weights = weights.float()
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    weights, b1, b2 = (t if t is None else t.contiguous() for t in (weights, b1, b2))
    inputs = (x, weights, w1, w2, b1, b2)
    style = (activation, alpha, limit, interleaved, transposed)
    differentiates = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in inputs
    )
    kept = differentiates and any(g is not None for g in main_grads)
    collected = Learnt(None, None, *main_grads) if kept else None
    if differentiates and token_of is not None and row_of is None and x.requires_grad:
        raise RuntimeError("experts: x seen through token_of needs row_of for its gradient")
    if fp8:
        where = (offsets, token_of, row_of)
        return experts_fp8(inputs, *where, style, collected, recompute, differentiates)
    if differentiates:
        return _Experts.apply(*inputs, offsets, token_of, row_of, style, collected, recompute)
    ffn = (x, weights, w1, w2, offsets, token_of, b1, b2, *style, tf32(x))
    return _experts(*ffn, False, row_of)[0]
