"""`experts` in FP8: its products, and the gradients of their rows, of operands that are quantized
on the way; the weights' gradients of what was not.

Weights are quantized anew in every call, but for those within `weights_quantized_once`: their
transposed copies are made in the backward, so that nothing is kept between the two that is not kept
without FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives, _main_grad
from moekernels.ops._ffn import Ffn, Learnt, dbias_or_accumulate, wgrad_or_accumulate
from moekernels.ops._library import fake, raw

_quantize = raw._quantize.default
_grouped_gemm_fp8 = raw._grouped_gemm_fp8.default
_act = raw._experts_act.default
_dact = raw._experts_dact.default
_permute = raw._permute.default
_combine = raw._combine.default


@fake("_experts_act")
def _(h: Tensor, activation: str, alpha: float, limit: float, interleaved: bool):
    gates = 2 if activation in reference.GATED else 1
    return h.new_empty(h.shape[0], h.shape[1] // gates)


# Within `weights_quantized_once`: (weights, their values and scales) by where they lie and how they
# are read. Whoever is named here is alive, so that nothing else comes to lie there.
_once: dict[tuple, tuple[Tensor, tuple[Tensor, Tensor]]] | None = None


@contextmanager
def weights_quantized_once() -> Iterator[None]:
    """Within, weights are quantized in the first call that needs them so, and again where torch has
    seen them written to. For the passes of one optimizer step: two bytes a weight, until it
    ends."""
    global _once
    before, _once = _once, {}
    try:
        yield
    finally:
        _once = before


def _of_weights(w: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if _once is None or torch.compiler.is_compiling():
        return _quantize(w, True, transposed)
    # What one stream has made another would have to wait for.
    stream = torch.cuda.current_stream(w.device).cuda_stream if w.is_cuda else 0
    key = (w.data_ptr(), w._version, w.shape, w.dtype, transposed, stream)
    if key not in _once:
        _once[key] = w, _quantize(w, True, transposed)
    return _once[key][1]


def _product(
    rows: Tensor,
    w: Tensor,
    ffn: Ffn,
    transposed: bool,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    masked: bool = False,
) -> Tensor:
    """rows [R, I] x w [E, O, I] (transposed: [E, I, O]) -> weights (rows w + bias) [R, O]; masked:
    rows without a token are zero."""
    values, row_scales = _quantize(rows, False, False)
    w, w_scales = _of_weights(w, transposed)
    token_of = ffn.token_of if masked else None
    name = str(rows.dtype).removeprefix("torch.")
    given = (values, row_scales, w, w_scales, ffn.offsets, bias, weights, token_of)
    return _grouped_gemm_fp8(*given, ffn.x.shape[0], name)


def _h(ffn: Ffn, row_of: Tensor | None) -> Tensor:
    """h [R, G]."""
    rows = ffn.x if ffn.token_of is None else _permute(ffn.x, ffn.token_of, row_of)
    return _product(rows, ffn.w1, ffn, ffn.transposed, ffn.b1)


def _forward(ffn: Ffn, row_of: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [R, H] and h [R, G]."""
    h = _h(ffn, row_of)
    a = _act(h, ffn.activation, ffn.alpha, ffn.limit, ffn.interleaved)
    return _product(a, ffn.w2, ffn, ffn.transposed, ffn.b2, ffn.weights, True), h


class _ExpertsFp8(torch.autograd.Function):
    """Of the arguments of `_Experts`."""

    @staticmethod
    def forward(
        ctx, x, weights, w1, w2, b1, b2, offsets, token_of, row_of, style, main_grads, recompute
    ):
        ffn = Ffn._make((x, weights, w1, w2, offsets, token_of, b1, b2, *style, False))
        y, h = _forward(ffn, row_of)
        ctx.save_for_backward(*ffn[:8], row_of, h[:0].clone() if recompute else h)
        ctx.style, ctx.main_grads = style, main_grads
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        *tensors, row_of, h = ctx.saved_tensors
        if _derivatives.needs_plain():
            raise RuntimeError(
                "experts: in FP8 there are no gradients of gradients; give fp8=False"
            )
        ffn = Ffn._make((*tensors, *ctx.style, False))
        need, main_grads = Learnt(*ctx.needs_input_grad[:6]), Learnt()
        if ctx.main_grads is not None:
            inputs = (ffn.x, ffn.weights, ffn.w1, ffn.w2, ffn.b1, ffn.b2)
            main_grads = Learnt(*_main_grad.reached(ctx, ctx.main_grads, inputs))
        grads = _backward(ffn, row_of, h, dy.contiguous(), need, main_grads)
        return *grads, None, None, None, None, None, None


def _backward(
    ffn: Ffn, row_of: Tensor | None, h: Tensor, dy: Tensor, need: Learnt, main_grads: Learnt
) -> Learnt:
    """As that of `experts`."""
    offsets, token_of, transposed = ffn.offsets, ffn.token_of, ffn.transposed
    tokens = ffn.x.shape[0]
    dx = dweights = dw1 = dw2 = db1 = db2 = None
    if need.x or need.weights or need.w1 or need.w2 or need.b1:
        h = h if h.shape[0] else _h(ffn, row_of)
        da = _product(dy, ffn.w2, ffn, not transposed, masked=True)
        dh, weighted_a, dweights = _dact(*ffn, dy, h, need.w2, need.weights, da)
        del da, h
    if need.b2:
        db2 = dbias_or_accumulate(main_grads.b2, dy, ffn.weights, offsets, token_of, tokens)
    if need.w2:
        dw2 = wgrad_or_accumulate(
            main_grads.w2, weighted_a, dy, offsets, transposed, token_of, tokens
        )
        del weighted_a
    if need.x:
        dx = _product(dh, ffn.w1, ffn, not transposed)
        dx = dx if token_of is None else _combine(dx, row_of, None)
    if need.w1:
        gather = token_of is not None
        dw1 = wgrad_or_accumulate(
            main_grads.w1, ffn.x, dh, offsets, transposed, token_of, tokens, gather
        )
    if need.b1:
        db1 = dbias_or_accumulate(main_grads.b1, dh, None, offsets, token_of, tokens)
    return Learnt(dx, dweights if need.weights else None, dw1, dw2, db1, db2)


def experts_fp8(
    inputs: tuple[Tensor | None, ...],
    offsets: Tensor,
    token_of: Tensor | None,
    row_of: Tensor | None,
    style: tuple,
    main_grads: Any,
    recompute: bool,
    differentiates: bool,
) -> Tensor:
    """`experts` of what it has prepared: x, weights, w1, w2, b1, b2."""
    x, weights, w1, w2, b1, b2 = inputs
    assert x is not None and w1 is not None and w2 is not None
    if x.dtype == torch.float64:
        raise RuntimeError("experts: fp8 takes float32, bfloat16 or float16, got float64")
    if differentiates:
        args = (*inputs, offsets, token_of, row_of, style, main_grads, recompute)
        return _ExpertsFp8.apply(*args)
    given = (x, weights, w1, w2, offsets, token_of, b1, b2, *style, False)
    return _forward(Ffn._make(given), row_of)[0]
