"""Causal self-attention over packed sequences, split by heads.

Legend: T tokens, H hidden, hd head dimension, hq/hk query and key-value heads of this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels.model.decoder import DecoderSpec
from moekernels.nn import half
from moekernels.nn.home import Home
from moekernels.nn.linear import linear
from moekernels.nn.masked import masked_attention
from moekernels.nn.norm import RMSNorm, WideRMSNorm
from moekernels.nn.rotary import Packing, rotate
from moekernels.ops.attention import How, attention
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo, shard
from moekernels.parallel.tensor import copy_to, gather_tokens, reduce_from, scatter_tokens


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float | None = None,
    *,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, hq, hd], k and v [T, hk, hd] -> [T, hq, hd]; a token sees itself and what precedes it
    in its segment, within the window if there is one. scale: None: the root of hd's inverse."""
    if window or sinks is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return masked_attention(q, k, v, sinks, packing.runs, window, scale)
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        bounds = torch.tensor(packing.cu_seqlens, dtype=torch.int32, device=q.device)
        longest = max((tokens for _, tokens in packing.runs), default=0)
        return varlen_attn(  # type: ignore[return-value]  # a tuple only where it is asked for more
            q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0),
            scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    sizes = [segments * tokens for segments, tokens in packing.runs]
    outputs = []
    for (segments, tokens), *parts in zip(
        packing.runs, q.split(sizes), k.split(sizes), v.split(sizes)
    ):
        q1, k1, v1 = (p.unflatten(0, (segments, tokens)).transpose(1, 2) for p in parts)
        out = F.scaled_dot_product_attention(
            q1, k1, v1, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Attention(nn.Module):
    """Column-parallel q, k, v in one product, attention over this rank's heads, row-parallel o."""

    qkv_bias: nn.Parameter | None
    out_bias: nn.Parameter | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layer: int,
        home: Home,
        *,
        name: str,
    ) -> None:
        super().__init__()
        mesh.layout.validate(num_heads=config.num_heads, num_kv_heads=config.kv_heads)
        self.tp, self.sequence_parallel = mesh.tp, home.sequence_parallel
        hd, hidden = config.head_dim, config.d_model
        heads, kv_heads = config.num_heads, config.kv_heads
        self.head_dim, self.scale, self.layer = hd, config.qk_scale, layer
        self.window = config.window_of(layer)
        self.heads, self.kv_heads = heads // mesh.tp.size, kv_heads // mesh.tp.size

        def mine(first: int, count: int, width: int = hd) -> tuple[int, int]:
            part = count // mesh.tp.size * width
            return first * width + mesh.tp.rank * part, first * width + (mesh.tp.rank + 1) * part

        rows = [mine(0, heads), mine(heads, kv_heads), mine(heads + kv_heads, kv_heads)]
        each = (heads * hd, kv_heads * hd, kv_heads * hd)
        qkv = shard((sum(each), hidden), {0: rows}, stacked=each)
        out = shard((hidden, heads * hd), {1: [mine(0, heads)]})
        self.shards = {"qkv": qkv, "out": out}
        std = config.init_std
        self.qkv = home.normal(qkv, std, f"{name}.qkv")
        std = config.init_std / (2 * config.num_layers) ** 0.5
        self.out = home.normal(out, std, f"{name}.out")

        def vector(key: str, info: ShardInfo) -> None:
            self.shards[key] = info
            setattr(self, key, home.filled(info.local_shape, 0.0))

        self.qkv_bias = self.out_bias = self.sinks = None
        if config.qkv_bias:
            vector("qkv_bias", shard(qkv.full_shape[:1], {0: rows}))
        if config.out_bias:  # added to whole results: to own tokens, or by all ranks alike
            over = "stage" if home.sequence_parallel else "dp"
            vector("out_bias", shard((hidden,), reduce_over=over, copies="stage"))
        if config.sinks:
            vector("sinks", shard((heads,), {0: [mine(0, heads, 1)]}))
        self.q_norm: RMSNorm | WideRMSNorm | None = None
        self.k_norm: RMSNorm | WideRMSNorm | None = None
        if config.qk_norm:  # over each head, the same weights for all: gradients are sums over tp
            self.q_norm = RMSNorm(hd, config.norm_eps, home, partial=True)
            self.k_norm = RMSNorm(hd, config.norm_eps, home, partial=True)
        if config.qk_norm_wide:
            self.q_norm = WideRMSNorm(heads, hd, config.norm_eps, mesh.tp, home)
            self.k_norm = WideRMSNorm(kv_heads, hd, config.norm_eps, mesh.tp, home)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T/tp, H] under sequence parallel, else [T, H] -> the same shape."""
        x = gather_tokens(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
        heads = linear(x, self.qkv, self.qkv_bias).unflatten(1, (-1, self.head_dim))
        attend = self._at_once if self._fits(heads, packing) else self._apart
        y = linear(attend(heads, packing).flatten(1), self.out)
        y = scatter_tokens(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)
        return y if self.out_bias is None else y + self.out_bias

    def behind(self, norm: RMSNorm, x: Tensor, packing: Packing) -> Tensor:
        """`self(norm(x), packing)`, in one autograd function where nothing else stands between."""
        if self.qkv_bias is None and self._fits(x, packing):
            weights, eps = self._norms()
            given = half.Weights(norm.weight, self.qkv, self.out, *weights)
            if half.fits(x, given):
                how = How(self.heads, self.kv_heads, self.scale, eps)
                way = (packing, how, norm.eps, self.tp, self.sequence_parallel, self.head_dim)
                y = half.half(x, given, half.Way(*way))
                return y if self.out_bias is None else y + self.out_bias
        return self(norm(x), packing)

    def _fits(self, heads: Tensor, packing: Packing) -> bool:
        """Whether all that stands between the projection and plain attention has one kernel."""
        between = packing.pairs or packing.cache is not None or type(self.q_norm) is WideRMSNorm
        return not (between or self.window or self.sinks is not None or not heads.is_cpu)

    def _norms(self) -> tuple[tuple[Tensor | None, Tensor | None], float]:
        """The weights of queries' and keys' norms, and what they add to the mean of squares."""
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            return (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        return (None, None), 0.0

    def _at_once(self, heads: Tensor, packing: Packing) -> Tensor:
        weights, eps = self._norms()
        how = How(self.heads, self.kv_heads, self.scale, eps)
        return attention(heads, *weights, *packing.angles, packing.bounds, how)

    def _apart(self, heads: Tensor, packing: Packing) -> Tensor:
        """heads [T, hq + 2 hk, hd] -> [T, hq, hd], one after the other."""
        turning = self.heads + self.kv_heads
        if self.q_norm is None or self.k_norm is None:
            turned, v = heads.split([turning, self.kv_heads], dim=1)
            q, k = rotate(turned, packing).split([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(self.q_norm(q), packing), rotate(self.k_norm(k), packing)
        if packing.cache is not None:
            return packing.cache.attend(self.layer, q, k, v, self.sinks, self.window, self.scale)
        return causal_attention(q, k, v, packing, self.scale, window=self.window, sinks=self.sinks)
