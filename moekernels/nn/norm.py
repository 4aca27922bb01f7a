"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from moekernels import ops, reference
from moekernels.nn.home import Home
from moekernels.ops import _derivatives
from moekernels.parallel.mesh import Group
from moekernels.parallel.shard import shard
from moekernels.parallel.tensor import copy_to, reduce_from


class _HeadsNorm(torch.autograd.Function):
    """`ops.rms_norm` of what lies between others, queries beside keys and values: read as it lies,
    and so kept without a copy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        if _derivatives.needs_plain():
            needed = ctx.needs_input_grad[:2]
            plain = partial(reference.rms_norm, eps=ctx.eps)
            return *_derivatives.vjp(plain, (x, weight), needed, (grad,)), None
        if x.dtype not in (torch.float32, torch.float64):
            grad, wide = grad.float(), x.float()
        else:
            wide = x
        hat = wide * rstd
        product = grad * hat
        dweight = product.sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        mean = (product @ weight.to(product.dtype)).unsqueeze_(-1).div_(x.shape[-1])
        dx = (grad * weight).sub_(hat.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), dweight, None


class RMSNorm(nn.Module):
    """x [..., H] -> x / rms(x) * weight, computed in fp32 at least.

    The weight is the same on every rank of a stage. `partial` says that each tp rank sees a part
    only of what it is applied to (own tokens, own heads), so that its gradient is a sum over tp.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        home: Home,
        *,
        partial: bool,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = home.filled((width,), 1.0)
        self.shards = {
            "weight": shard((width,), reduce_over="stage" if partial else "dp", copies="stage")
        }

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() or _derivatives.transformed():
            return ops.rms_norm(x.flatten(0, -2), self.weight, self.eps).view(x.shape)
        return _HeadsNorm.apply(x, self.weight, self.eps)

    def behind(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x and added [T, H] -> the norm of their sum, and the sum."""
        return ops.add_rms_norm(x, added, self.weight, self.eps)


class WideRMSNorm(nn.Module):
    """x [T, heads, hd] of this rank's heads -> x / rms over all heads of a token * weight: the mean
    square is one of the whole tp group."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        eps: float,
        tp: Group,
        home: Home,
    ) -> None:
        super().__init__()
        self.eps, self.tp, self.width = eps, tp, heads * head_dim
        part = self.width // tp.size
        mine = (tp.rank * part, (tp.rank + 1) * part)
        self.weight = home.filled((part,), 1.0)
        self.shards = {"weight": shard((self.width,), {0: [mine]})}

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        squares = wide.square().sum((1, 2), keepdim=True)
        # Each rank uses the sum: its gradient is a sum over the ranks, too.
        mean = copy_to(reduce_from(squares, self.tp), self.tp) / self.width
        hat = (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)
        return hat * self.weight.view(x.shape[1:])
