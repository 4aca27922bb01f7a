"""What the experts' FFN is given, and where its gradients go: shared by `experts`, `grouped_gemm`
and the FFN over an exchange."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekernels.ops import _deferred, _derivatives, _main_grad
from moekernels.ops._library import raw

_wgrad = raw._grouped_gemm_wgrad.default
_wgrads_ = raw._grouped_gemm_wgrads_.default
_dbias = raw._experts_dbias.default


class Ffn(NamedTuple):
    """What every kernel of the FFN takes first, in the order of the raw ops."""

    x: Tensor
    weights: Tensor | None
    w1: Tensor
    w2: Tensor
    offsets: Tensor
    token_of: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    activation: str
    alpha: float
    limit: float
    interleaved: bool
    transposed: bool
    tf32: bool

    @property
    def rows(self) -> int:
        return (self.x if self.token_of is None else self.token_of).shape[0]


class Learnt(NamedTuple):
    """Something of each argument that has a gradient: itself, its main gradient, its gradient,
    whether one is needed."""

    x: Any = None
    weights: Any = None
    w1: Any = None
    w2: Any = None
    b1: Any = None
    b2: Any = None


@_derivatives.constant_in_graphs
def _matmul_may_round() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32(x: Tensor) -> bool:
    """Whether products of `x` may round fp32 inputs to tf32: on CUDA, where torch's own may
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul`)."""
    return x.is_cuda and x.dtype == torch.float32 and _matmul_may_round()


class _Accumulate(NamedTuple):
    """A gradient to add to a main gradient: `_deferred.Joinable`."""

    main_grad: Tensor
    rows: Tensor
    drows: Tensor
    offsets: Tensor
    transposed: bool
    token_of: Tensor | None
    tokens: int
    gather: bool
    tf32: bool

    def __call__(self) -> None:
        _main_grad.wgrad_(*self)

    @property
    def buffer(self) -> int:
        return self.main_grad.data_ptr()

    @property
    def key(self) -> tuple:
        seen = self.token_of is not None
        return self.main_grad.shape, self.transposed, seen, self.gather, self.rows.dtype

    def join(self, others: Sequence[_Accumulate]) -> None:
        all_ = (self, *others)
        token_of = [one.token_of for one in all_ if one.token_of is not None]
        _wgrads_(
            self.main_grad,
            [one.rows for one in all_],
            [one.drows for one in all_],
            [one.offsets for one in all_],
            self.transposed,
            token_of,
            [one.tokens for one in all_],
            self.gather,
            self.tf32,
        )


def wgrad_or_accumulate(
    main_grad: Tensor | None,
    rows: Tensor,
    drows: Tensor,
    offsets: Tensor,
    transposed: bool,
    token_of: Tensor | None = None,
    tokens: int = 0,
    gather: bool = False,
) -> Tensor | None:
    """The gradient for w, or None where it is added to `main_grad`, now or later. With `gather`,
    rows are [T, I] seen through token_of."""
    if main_grad is None:
        return _wgrad(rows, drows, offsets, transposed, token_of, tokens, gather, tf32(rows))
    args = (rows, drows, offsets, transposed, token_of, tokens, gather, tf32(rows))
    if torch.compiler.is_compiling():
        _main_grad.wgrad_(main_grad, *args)
    else:
        _deferred.later(_Accumulate(main_grad, *args))  # type: ignore[arg-type]  # it can be called
    return None


def dbias_or_accumulate(main_grad, rows, weights, offsets, token_of, tokens) -> Tensor | None:
    if main_grad is None:
        return _dbias(rows, weights, offsets, token_of, tokens)
    args = (rows, weights, offsets, token_of, tokens)
    _deferred.later(partial(_main_grad.dbias_, main_grad, *args))
    return None
