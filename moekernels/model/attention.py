"""Attention with rotary positions, split by heads over tp: grouped-query, or with keys and values
made of a latent that all heads share (MLA).

Legend: hq, hk query and key-value heads, hd, hv width of a query's (a key's) and of a value's
head, rq, rk width of the queries' and of the keys' and values' latent, rd elements that turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.rotary import RotarySpec
from moekernels.model.spec import LONGEST, MOST, Place, Work, key, norm_kept


@dataclass(frozen=True)
class AttentionSpec(RotarySpec):
    num_heads: int = key(16, "attention heads", low=1, flag="heads", high=MOST)
    num_kv_heads: int = key(
        0,
        "key/value heads (grouped-query attention); 0: as many as heads",
        low=0,
        flag="kv-heads",
        high=MOST,
    )
    head_dim: int = key(64, "width of a head, even", low=2, high=MOST)
    qk_norm: bool = key(True, "RMSNorm on queries and keys, per head")
    qk_norm_wide: bool = key(False, "RMSNorm on queries and keys over all heads at once, instead")
    qkv_bias: bool = key(False, "biases of queries, keys and values")
    out_bias: bool = key(False, "a bias of the attention's output")
    score_scale: float = key(
        0.0, "factor on the attention scores; 0: the root of head_dim's inverse", low=0, high=1e3
    )
    window: int = key(0, "tokens that a token sees, itself included; 0: all", low=0, high=LONGEST)
    window_period: int = key(
        0, "every so-many-th layer sees all tokens all the same; 0: none does", low=0, high=4096
    )
    sinks: bool = key(False, "a learned score a head that takes a part of the attention")
    kv_rank: int = key(
        0,
        "width of the latent that keys and values are made of (MLA); 0: no latent",
        low=0,
        high=MOST,
    )
    q_rank: int = key(0, "width of the queries' latent; 0: none", low=0, high=MOST)
    value_dim: int = key(0, "width of a value's head (MLA); 0: head_dim", low=0, high=MOST)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def qk_scale(self) -> float:
        return self.score_scale or self.head_dim**-0.5

    @property
    def v_dim(self) -> int:
        return self.value_dim or self.head_dim

    def window_of(self, layer: int) -> int:
        """Tokens that a token of layer number `layer`, from 1, sees; 0: all."""
        return 0 if self.window_period and layer % self.window_period == 0 else self.window

    def check_attention(self) -> None:
        self.check_rotary(self.head_dim)
        if self.qk_norm and self.qk_norm_wide:
            raise UsageError("model: qk_norm and qk_norm_wide; give one of them")
        if self.window_period and not self.window:
            raise UsageError(f"model: window_period {self.window_period} needs a window")
        if self.kv_rank:
            for name in ("qk_norm", "qk_norm_wide", "qkv_bias", "out_bias", "sinks", "window"):
                if getattr(self, name):
                    raise UsageError(f"model: {name} with kv_rank: the latent's attention has none")
            if self.kv_heads != self.num_heads:
                raise UsageError(
                    f"model: num_kv_heads {self.kv_heads} with kv_rank; use {self.num_heads}"
                )
            if not self.rotary_dim:
                raise UsageError("model: kv_rank needs rotary_dim, the part of a head that turns")
        elif self.q_rank or self.value_dim:
            name = "q_rank" if self.q_rank else "value_dim"
            raise UsageError(f"model: {name} {getattr(self, name)} needs kv_rank")


def parameters(spec: AttentionSpec, at: Place, active: bool = False) -> int:
    tp, hd, hidden = at.layout.tp, spec.head_dim, spec.d_model
    q, k = spec.num_heads // tp, spec.kv_heads // tp
    if spec.kv_rank:
        rank, turning = spec.kv_rank, spec.rotary_dim
        shared = (rank + turning) * hidden + rank  # the same on all ranks
        queries = q * hd * (spec.q_rank or hidden)
        if spec.q_rank:
            shared += spec.q_rank * (hidden + 1)
        return shared + queries + q * (hd - turning + spec.v_dim) * rank + q * spec.v_dim * hidden
    count = hidden * hd * (2 * q + 2 * k)
    count += 2 * hd if spec.qk_norm else hd * (q + k) if spec.qk_norm_wide else 0
    count += hd * (q + 2 * k) if spec.qkv_bias else 0
    return count + (hidden if spec.out_bias else 0) + (q if spec.sinks else 0)


def kept(spec: AttentionSpec, at: Place) -> float:
    b, hd, tp = at.width, spec.head_dim, at.layout.tp
    q, k = spec.num_heads / tp, spec.kv_heads / tp
    size = norm_kept(spec, at)
    copies = 2 if at.device == "cpu" and at.runs > 1 else 1  # each run's output, and all joined
    if spec.kv_rank:
        latents, gathered = spec.kv_rank + spec.q_rank, 0 if spec.q_rank else spec.d_model
        wide = max(hd, spec.v_dim)  # values are as wide as queries to the kernel
        normed = latents + spec.rotary_dim
        size += at.residual * (normed * b + at.wide * (2 if spec.q_rank else 1))
        size += at.tokens * (normed + gathered) * b
        size += at.residual * spec.d_model * b if spec.q_rank else 0.0
        size += at.tokens * b * q * (2 * hd + wide)  # queries, keys and values
        size += at.tokens * b * (q * spec.v_dim if wide > spec.v_dim else 0.0)
        return size + at.tokens * q * (copies * wide * b + at.wide)
    size += at.tokens * spec.d_model * b  # the projections' gathered input
    # v shares its storage with q and k of before the rotation; these two are kept again behind it
    size += at.tokens * hd * b * ((q + 2 * k) + (q + k))
    if spec.qk_norm:  # the norms' inputs share the projections' storage
        size += at.tokens * (q + k) * at.wide
    if spec.qk_norm_wide:  # and what they were divided by, and what they are before the weights
        size += at.tokens * ((q + k) * hd * (b + (at.wide if b < at.wide else 0)) + 4 * at.wide)
    return size + at.tokens * q * (copies * hd * b + at.wide)  # and its log-sum-exp


def work(spec: AttentionSpec, at: Place) -> Work:
    tp = at.layout.tp
    q, k, hd = spec.num_heads / tp, spec.kv_heads / tp, spec.head_dim
    dense = 2.0 * (parameters(spec, at) - (spec.d_model if spec.out_bias else 0))
    return Work(
        dense=dense if spec.kv_rank else 2.0 * spec.d_model * 2 * (q + k) * hd,
        pairs=1.0 * q * (hd + spec.v_dim),
        traffic=(10 * spec.d_model + (3 * q + 4 * k) * hd * tp) * at.width / tp,
    )
