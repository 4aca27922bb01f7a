"""Attention whose keys and values are made of a latent that all heads share (MLA).

Legend: T tokens, H hidden, h heads of this rank, hd width of a query's head, rd of it that turns,
hv of a value's head, rq and rk widths of the queries' and of the keys' and values' latent.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels.model.decoder import DecoderSpec
from moekernels.nn.attention import causal_attention
from moekernels.nn.home import Home
from moekernels.nn.linear import linear
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rotary import Packing, rotate
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo, shard
from moekernels.parallel.tensor import copy_to, gather_tokens, reduce_from, scatter_tokens

EPS = 1e-6  # of the latents' norms, whatever the others' is


class LatentAttention(nn.Module):
    """kv_a [rk + rd, H] and q_a [rq, H], the same on all ranks; kv_b [h*(hd-rd+hv), rk], q_b
    [h*hd, rq] (without a queries' latent q [h*hd, H]) and out [H, h*hv] by heads.

    The latents' gradients come from own heads: sums over tp, as are those of what made them.
    """

    q_a: nn.Parameter
    q_b: nn.Parameter
    q: nn.Parameter
    kv_a: nn.Parameter
    kv_b: nn.Parameter
    out: nn.Parameter

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
        mesh.layout.validate(num_heads=config.num_heads)
        self.tp, self.sequence_parallel = mesh.tp, home.sequence_parallel
        self.layer, self.scale = layer, config.qk_scale
        self.head_dim, self.turning = config.head_dim, config.rotary_dim
        self.v_dim, self.ranks = config.v_dim, (config.q_rank, config.kv_rank)
        self.shards: dict[str, ShardInfo] = {}
        part = config.num_heads // mesh.tp.size
        first = mesh.tp.rank * part

        def mine(width: int) -> list[tuple[int, int]]:
            return [(first * width, (first + part) * width)]

        def add(key: str, info: ShardInfo, std: float = config.init_std) -> None:
            self.shards[key] = info
            setattr(self, key, home.normal(info, std, f"{name}.{key}"))

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, EPS, home, partial=True)

        heads, hidden, hd = config.num_heads, config.d_model, config.head_dim
        whole = partial(shard, reduce_over="stage", copies="stage")
        self.q_a_norm = None
        if config.q_rank:
            add("q_a", whole((config.q_rank, hidden)))
            self.q_a_norm = norm(config.q_rank)
        add("q_b" if config.q_rank else "q",
            shard((heads * hd, config.q_rank or hidden), {0: mine(hd)}))  # fmt: skip
        add("kv_a", whole((config.kv_rank + self.turning, hidden)))
        self.kv_a_norm = norm(config.kv_rank)
        made = hd - self.turning + self.v_dim
        add("kv_b", shard((heads * made, config.kv_rank), {0: mine(made)}))
        add("out", shard((hidden, heads * self.v_dim), {1: mine(self.v_dim)}),
            config.init_std / (2 * config.num_layers) ** 0.5)  # fmt: skip

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T/tp, H] under sequence parallel, else [T, H] -> the same shape."""
        q_rank, kv_rank = self.ranks
        if q_rank and self.sequence_parallel:  # the latents of own tokens travel, not the tokens
            latents = gather_tokens(self._latents(x), self.tp)
        else:
            x = gather_tokens(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
            latents = self._latents(x)
        queries, kv, turned = latents.split([q_rank, kv_rank, self.turning], dim=1)
        q = linear(queries, self.q_b) if q_rank else linear(x, self.q)
        q = q.unflatten(1, (-1, self.head_dim))
        still = self.head_dim - self.turning
        q = torch.cat([q[..., :still], rotate(q[..., still:], packing)], dim=-1)
        made = linear(kv, self.kv_b).unflatten(1, (q.shape[1], -1))
        k, v = made.split([still, self.v_dim], dim=-1)
        turned = rotate(turned[:, None], packing).expand(-1, q.shape[1], -1)
        k = torch.cat([k, turned], dim=-1)
        if packing.cache is not None:
            y = packing.cache.attend(self.layer, q, k, v, None, 0, self.scale)
        else:  # the kernels want one width
            wide = max(self.head_dim, self.v_dim)
            q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
            y = causal_attention(q, k, v, packing, self.scale)[..., : self.v_dim]
        y = linear(y.flatten(1), self.out)
        return scatter_tokens(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)

    def _latents(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, rq + rk + rd], normed but for what turns."""
        kv, turned = linear(x, self.kv_a).split([self.ranks[1], self.turning], dim=1)
        parts = [self.kv_a_norm(kv), turned]
        if self.q_a_norm is not None:
            parts.insert(0, self.q_a_norm(linear(x, self.q_a)))
        return torch.cat(parts, dim=1)
