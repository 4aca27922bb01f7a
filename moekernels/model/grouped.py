"""Grouped-query attention, with norms, biases, windows and sinks as published models have them.

Legend: q, k query and key-value heads of a rank, hd width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moekernels.errors import UsageError
from moekernels.model.heads import HeadsSpec, result_kept, traffic
from moekernels.model.spec import LONGEST, Owed, Part, Place, Shape, Work, key, norm_kept


@dataclass(frozen=True)
class GroupedSpec(HeadsSpec):
    qk_norm: bool = key(True, "RMSNorm on queries and keys, per head")
    qk_norm_wide: bool = key(False, "RMSNorm on queries and keys over all heads at once, instead")
    qkv_bias: bool = key(False, "biases of queries, keys and values")
    out_bias: bool = key(False, "a bias of the attention's output")
    window: int = key(0, "tokens that a token sees, itself included; 0: all", low=0, high=LONGEST)
    window_period: int = key(
        0, "every so-many-th layer sees all tokens all the same; 0: none does", low=0, high=4096
    )
    sinks: bool = key(False, "a learned score a head that takes a part of the attention")

    @property
    def masked(self) -> float:
        """The part of the layers whose attention makes whole matrices of scores."""
        if self.sinks or not self.window:
            return float(self.sinks)
        return 1.0 - (1.0 / self.window_period if self.window_period else 0.0)

    def window_of(self, layer: int) -> int:
        """Tokens that a token of layer number `layer`, from 1, sees; 0: all."""
        return 0 if self.window_period and layer % self.window_period == 0 else self.window


def check(spec: GroupedSpec) -> None:
    if spec.qk_norm and spec.qk_norm_wide:
        raise UsageError("model: qk_norm and qk_norm_wide; give one of them")
    if spec.window_period and not spec.window:
        raise UsageError(f"model: window_period {spec.window_period} needs a window")


def shapes(spec: GroupedSpec) -> dict[str, Shape]:
    heads, kv, hd = spec.num_heads, spec.kv_heads, spec.head_dim
    rows = (heads + 2 * kv) * hd
    found: dict[str, Shape] = {"qkv": (rows, spec.d_model), "out": (spec.d_model, heads * hd)}
    if spec.qkv_bias:
        found["qkv_bias"] = (rows,)
    if spec.out_bias:
        found["out_bias"] = (spec.d_model,)
    if spec.sinks:
        found["sinks"] = (heads,)
    if spec.qk_norm or spec.qk_norm_wide:
        widths = (hd, hd) if spec.qk_norm else (heads * hd, kv * hd)
        found |= {f"{x}_norm.weight": (width,) for x, width in zip("qk", widths)}
    return found


def parameters(spec: GroupedSpec, at: Place, active: bool = False) -> int:
    tp, hd, hidden = at.layout.tp, spec.head_dim, spec.d_model
    q, k = spec.num_heads // tp, spec.kv_heads // tp
    count = hidden * hd * (2 * q + 2 * k)
    count += 2 * hd if spec.qk_norm else hd * (q + k) if spec.qk_norm_wide else 0
    count += hd * (q + 2 * k) if spec.qkv_bias else 0
    return count + (hidden if spec.out_bias else 0) + (q if spec.sinks else 0)


def has_kernel(spec: GroupedSpec, at: Place) -> bool:
    """Whether one kernel goes from the projections to the result."""
    between = spec.qk_norm_wide or spec.rope_pairs or spec.window or spec.sinks
    return at.device == "cpu" and not between


def kept(spec: GroupedSpec, at: Place) -> float:
    b, hd, tp = at.width, spec.head_dim, at.layout.tp
    q, k = spec.num_heads / tp, spec.kv_heads / tp
    size = norm_kept(spec, at)
    size += at.tokens * spec.d_model * b  # the projections' gathered input
    if has_kernel(spec, at):
        return size + at.tokens * hd * b * (q + 2 * k) + result_kept(spec, replace(at, runs=1), hd)
    # v shares its storage with q and k of before the rotation; these two are kept again behind it
    size += at.tokens * hd * b * ((q + 2 * k) + (q + k))
    if spec.qk_norm:  # the norms' inputs share the projections' storage
        size += at.tokens * (q + k) * at.wide
    if spec.qk_norm_wide:  # and what they were divided by, and what they are before the weights
        size += at.tokens * ((q + k) * hd * (b + (at.wide if b < at.wide else 0)) + 4 * at.wide)
    return size + result_kept(spec, at, hd)


def owed(spec: GroupedSpec, at: Place) -> Owed:
    b, tp, hd = at.width, at.layout.tp, spec.head_dim
    q, k = spec.num_heads / tp, spec.kv_heads / tp
    inputs, results = spec.d_model + q * hd, (q + 2 * k) * hd + spec.d_model
    return Owed(at.tokens * b * inputs, at.tokens * b * results)


def work(spec: GroupedSpec, at: Place) -> Work:
    tp = at.layout.tp
    q, k, hd = spec.num_heads / tp, spec.kv_heads / tp, spec.head_dim
    return Work(
        dense=2.0 * spec.d_model * 2 * (q + k) * hd,
        pairs=(1.0 + spec.masked) * q * (hd + hd),  # causal: half of the pairs, or all of them
        traffic=traffic(spec, at),
        scores=spec.masked * PASSES * q * at.wide,
    )


def passing(spec: GroupedSpec, at: Place) -> float:
    """Of a backward with masks, in its last product: the result's gradient; in fp32 at least the
    scores and their gradients, those of values and of queries, and of keys for each query's head,
    beside the queries in the product's order."""
    if not spec.masked:
        return 0.0
    hd, q, k = spec.head_dim, spec.num_heads / at.layout.tp, spec.kv_heads / at.layout.tp
    size = 2 * at.squares * q * at.wide + at.tokens * q * hd * at.width
    size += at.tokens * (q * (3 * hd + 1) + k * hd) * at.wide
    if at.width < at.wide:
        size += at.tokens * hd * (3 * q + 2 * k) * at.wide
    return size


PASSES = 14  # of a forward over a matrix of scores: masked, normalised, applied

PART = Part(parameters, kept, work, shapes, check=check, owed=owed, passing=passing)
