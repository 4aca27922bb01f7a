"""Causal self-attention over packed sequences, split by heads.

Legend: T tokens, H hidden, hd head dimension, hq/hk query and key-value heads of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels.model.decoder import DecoderSpec
from moekernels.nn.norm import RMSNorm
from moekernels.ops import _derivatives
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import seeded_normal, shard
from moekernels.parallel.tensor import copy_to, gather_tokens, reduce_from, scatter_tokens


@dataclass(frozen=True, eq=False)
class Packing:
    """What attention needs to know of a micro-batch, made once for all layers."""

    cos: Tensor  # [T, 1, hd/2] fp32 at least
    sin: Tensor
    runs: list[
        tuple[int, int]
    ]  # (segments, tokens of each): neighbours of equal length go through together
    cu_seqlens: list[int]

    @staticmethod
    def make(
        positions: Tensor, cu_seqlens: list[int], head_dim: int, theta: float, dtype: torch.dtype
    ) -> Packing:
        """positions [T], cu_seqlens on the host."""
        power = (
            torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
        )
        angle = positions[:, None].double() * theta**-power
        wide = torch.promote_types(dtype, torch.float32)
        runs: list[tuple[int, int]] = []
        for begin, end in zip(cu_seqlens, cu_seqlens[1:]):
            if end == begin:
                continue
            if runs and runs[-1][1] == end - begin:
                runs[-1] = (runs[-1][0] + 1, end - begin)
            else:
                runs.append((1, end - begin))
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        return Packing(cos[:, None], sin[:, None], runs, cu_seqlens)


class _Rotate(torch.autograd.Function):
    """Rotary positions; the backward is the rotation by the opposite angle, so x is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.angles
        if _derivatives.needs_plain():
            return _plainly_rotated(grad, cos, -sin), None, None
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, hd]: the pair (i, i + hd/2) turns by the angle of its position."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out[..., :half] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., half:] = (b * cos).addcmul_(a, sin)
    return out


def _plainly_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, for derivatives that write nothing in place."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotate(x: Tensor, packing: Packing) -> Tensor:
    if _derivatives.transformed():
        return _plainly_rotated(x, packing.cos, packing.sin)
    return _Rotate.apply(x, packing.cos, packing.sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """q [T, hq, hd], k and v [T, hk, hd] -> [T, hq, hd]; a token sees itself and what precedes it
    in its segment."""
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        bounds = torch.tensor(packing.cu_seqlens, dtype=torch.int32, device=q.device)
        longest = max((tokens for _, tokens in packing.runs), default=0)
        return varlen_attn(
            q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    sizes = [segments * tokens for segments, tokens in packing.runs]
    outputs = []
    for (segments, tokens), *parts in zip(
        packing.runs, q.split(sizes), k.split(sizes), v.split(sizes)
    ):
        heads = [p.unflatten(0, (segments, tokens)).transpose(1, 2) for p in parts]
        out = F.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Attention(nn.Module):
    """Column-parallel q, k, v in one product, attention over this rank's heads, row-parallel
    output."""

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        seed: int,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        mesh.layout.validate(num_heads=config.num_heads, num_kv_heads=config.kv_heads)
        self.tp, self.sequence_parallel = mesh.tp, sequence_parallel
        hd, hidden = config.head_dim, config.d_model
        heads, kv_heads = config.num_heads, config.kv_heads
        self.head_dim = hd
        self.heads, self.kv_heads = heads // mesh.tp.size, kv_heads // mesh.tp.size

        def mine(first: int, count: int) -> tuple[int, int]:
            part = count // mesh.tp.size * hd
            return first * hd + mesh.tp.rank * part, first * hd + (mesh.tp.rank + 1) * part

        qkv = shard(
            ((heads + 2 * kv_heads) * hd, hidden),
            {0: [mine(0, heads), mine(heads, kv_heads), mine(heads + kv_heads, kv_heads)]},
        )
        out = shard((hidden, heads * hd), {1: [mine(0, heads)]})
        self.shards = {"qkv": qkv, "out": out}
        std = config.init_std
        self.qkv = nn.Parameter(
            qkv.take(seeded_normal(qkv.full_shape, std, seed, f"{name}.qkv")).to(device, dtype)
        )
        std = config.init_std / (2 * config.num_layers) ** 0.5
        self.out = nn.Parameter(
            out.take(seeded_normal(out.full_shape, std, seed, f"{name}.out")).to(device, dtype)
        )
        self.q_norm = self.k_norm = None
        if (
            config.qk_norm
        ):  # over each head, with the same weights for all: their gradients are sums over tp
            self.q_norm = RMSNorm(hd, config.norm_eps, partial=True, dtype=dtype, device=device)
            self.k_norm = RMSNorm(hd, config.norm_eps, partial=True, dtype=dtype, device=device)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T/tp, H] under sequence parallel, else [T, H] -> the same shape."""
        x = gather_tokens(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
        heads = F.linear(x, self.qkv).unflatten(1, (-1, self.head_dim))
        turning = self.heads + self.kv_heads
        if self.q_norm is None:
            turned, v = heads.split([turning, self.kv_heads], dim=1)
            q, k = rotate(turned, packing).split([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(self.q_norm(q), packing), rotate(self.k_norm(k), packing)
        y = F.linear(causal_attention(q, k, v, packing).flatten(1), self.out)
        return scatter_tokens(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)
