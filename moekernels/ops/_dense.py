"""dense: products of whole matrices on the CPU, by the kernels of `grouped_gemm`, as of one expert.

Not differentiable: for functions that are, and would call torch's products.
Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._library import fake, raw

# Multiplications up to which a product is ours: on a Zen 5 it took 0.47 to 0.74 of the time of
# torch's at 0.5 to 8 million of them.
SMALL = 1 << 24

_product = raw._dense.default


@fake("_dense")
def _(x: Tensor, w: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1 if transposed else 0])


def _small(x: Tensor, w: Tensor) -> bool:
    fits = x.is_cpu and x.dtype in (torch.float32, torch.float64)
    return fits and x.shape[0] * w.numel() <= SMALL


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [T, I], w [O, I] -> [T, O]."""
    return _product(x.contiguous(), w.contiguous(), False) if _small(x, w) else x.mm(w.t())


def dgrad(dy: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """Its gradient for x: dy [T, O], w [O, I] -> [T, I], in `out` if that is given."""
    if not _small(dy, w):
        return torch.mm(dy, w, out=out)
    dx = _product(dy.contiguous(), w.contiguous(), True)
    return dx if out is None else out.copy_(dx)


def add_wgrad(main_grad: Tensor, x: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
    """Adds its gradient for w, in w's dtype, to main_grad [O, I]: x [T, I], dy [T, O]. Torch's
    product is as fast here: it packs nothing of few outputs and inputs."""
    if main_grad.dtype == x.dtype == dtype:
        main_grad.addmm_(dy.t(), x)
    else:
        main_grad.add_(dy.t().mm(x).to(dtype))
