"""Grouped-query attention with rotary positions, split by heads over tp."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.spec import MOST, Place, Width, Work, key, norm_kept


@dataclass(frozen=True)
class AttentionSpec(Width):
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
    rope_theta: float = key(10000.0, "base of the rotary embedding", low=1, high=1e15)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


def parameters(spec: AttentionSpec, at: Place, active: bool = False) -> int:
    heads = (2 * spec.num_heads + 2 * spec.kv_heads) // at.layout.tp
    return spec.d_model * spec.head_dim * heads + (2 * spec.head_dim if spec.qk_norm else 0)


def kept(spec: AttentionSpec, at: Place) -> float:
    b, hd = at.width, spec.head_dim
    q, k = spec.num_heads / at.layout.tp, spec.kv_heads / at.layout.tp
    size = norm_kept(spec, at) + at.tokens * spec.d_model * b  # the projections' gathered input
    # v shares its storage with q and k of before the rotation; these two are kept again behind it
    size += at.tokens * hd * b * ((q + 2 * k) + (q + k))
    if spec.qk_norm:  # the norms' inputs share the projections' storage
        size += at.tokens * (q + k) * at.wide
    copies = 2 if at.device == "cpu" and at.runs > 1 else 1  # each run's output, and all joined
    return size + at.tokens * q * (copies * hd * b + at.wide)  # and its log-sum-exp


def work(spec: AttentionSpec, at: Place) -> Work:
    tp = at.layout.tp
    q, k, hd = spec.num_heads / tp, spec.kv_heads / tp, spec.head_dim
    return Work(
        dense=2.0 * spec.d_model * 2 * (q + k) * hd,
        pairs=2.0 * q * hd,
        traffic=(10 * spec.d_model + (3 * q + 4 * k) * hd * tp) * at.width / tp,
    )
