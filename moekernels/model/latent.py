"""Attention whose keys and values are made of a latent that all heads share (MLA).

Legend: q heads of a rank, hd, hv width of a query's (a key's) and of a value's head, rq, rk width
of the queries' and of the keys' and values' latent, rd elements that turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekernels.errors import UsageError
from moekernels.model.heads import HeadsSpec, result_kept, traffic
from moekernels.model.spec import MOST, Owed, Part, Place, Shape, Work, key, norm_kept

if TYPE_CHECKING:
    from moekernels.model.attention import AttentionSpec


@dataclass(frozen=True)
class LatentSpec(HeadsSpec):
    kv_rank: int = key(
        0,
        "width of the latent that keys and values are made of (MLA); 0: no latent",
        low=0,
        high=MOST,
    )
    q_rank: int = key(0, "width of the queries' latent; 0: none", low=0, high=MOST)
    value_dim: int = key(0, "width of a value's head (MLA); 0: head_dim", low=0, high=MOST)

    @property
    def v_dim(self) -> int:
        return self.value_dim or self.head_dim


def check(spec: AttentionSpec) -> None:
    if not spec.kv_rank:
        for name in ("q_rank", "value_dim"):
            if getattr(spec, name):
                raise UsageError(f"model: {name} {getattr(spec, name)} needs kv_rank")
        return
    for name in ("qk_norm", "qk_norm_wide", "qkv_bias", "out_bias", "sinks", "window"):
        if getattr(spec, name):
            raise UsageError(f"model: {name} with kv_rank: the latent's attention has none")
    if spec.kv_heads != spec.num_heads:
        raise UsageError(f"model: num_kv_heads {spec.kv_heads} with kv_rank; use {spec.num_heads}")
    if not spec.rotary_dim:
        raise UsageError("model: kv_rank needs rotary_dim, the part of a head that turns")


def shapes(spec: LatentSpec) -> dict[str, Shape]:
    heads, hd, rank, hidden = spec.num_heads, spec.head_dim, spec.kv_rank, spec.d_model
    made = hd - spec.rotary_dim + spec.v_dim
    found: dict[str, Shape] = {}
    if spec.q_rank:
        found["q_a"] = (spec.q_rank, hidden)
        found["q_b"] = (heads * hd, spec.q_rank)
    else:
        found["q"] = (heads * hd, hidden)
    found |= {
        "kv_a": (rank + spec.rotary_dim, hidden),
        "kv_b": (heads * made, rank),
        "out": (hidden, heads * spec.v_dim),
    }
    if spec.q_rank:
        found["q_a_norm.weight"] = (spec.q_rank,)
    return {**found, "kv_a_norm.weight": (rank,)}


def parameters(spec: LatentSpec, at: Place, active: bool = False) -> int:
    q, hd, hidden = spec.num_heads // at.layout.tp, spec.head_dim, spec.d_model
    rank, turning = spec.kv_rank, spec.rotary_dim
    shared = (rank + turning) * hidden + rank  # the same on all ranks
    queries = q * hd * (spec.q_rank or hidden)
    if spec.q_rank:
        shared += spec.q_rank * (hidden + 1)
    return shared + queries + q * (hd - turning + spec.v_dim) * rank + q * spec.v_dim * hidden


def kept(spec: LatentSpec, at: Place) -> float:
    b, hd, q = at.width, spec.head_dim, spec.num_heads / at.layout.tp
    size = norm_kept(spec, at)
    latents, gathered = spec.kv_rank + spec.q_rank, 0 if spec.q_rank else spec.d_model
    wide = max(hd, spec.v_dim)  # values are as wide as queries to the kernel
    normed = latents + spec.rotary_dim
    size += at.residual * (normed * b + at.wide * (2 if spec.q_rank else 1))
    size += at.tokens * (normed + gathered) * b
    size += at.residual * spec.d_model * b if spec.q_rank else 0.0
    size += at.tokens * b * q * (2 * hd + wide)  # queries, keys and values
    size += at.tokens * b * (q * spec.v_dim if wide > spec.v_dim else 0.0)
    return size + result_kept(spec, at, wide)


def owed(spec: LatentSpec, at: Place) -> Owed:
    b, q, hidden = at.width, spec.num_heads / at.layout.tp, spec.d_model
    latents = spec.q_rank + spec.kv_rank + spec.rotary_dim
    made = at.residual if spec.q_rank else at.tokens  # tokens whose latents are made here
    heads = q * (2 * spec.head_dim - spec.rotary_dim + spec.v_dim)  # of queries, and keys, values
    return Owed(
        (made * hidden + at.tokens * (latents + q * spec.v_dim)) * b,
        (made * latents + at.tokens * (heads + hidden)) * b,
    )


def work(spec: LatentSpec, at: Place) -> Work:
    heads = spec.num_heads / at.layout.tp
    return Work(
        dense=2.0 * parameters(spec, at),
        pairs=1.0 * heads * (spec.head_dim + spec.v_dim),
        traffic=traffic(spec, at),
    )


PART = Part(
    parameters,
    kept,
    work,
    shapes,
    asked=lambda spec: spec.kv_rank > 0,
    check=check,
    owed=owed,
    example={
        "kv_rank": 12,
        "q_rank": 8,
        "value_dim": 6,
        "rotary_dim": 2,
        "num_kv_heads": 0,
        "qk_norm": False,
    },
)
