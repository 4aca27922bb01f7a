"""What every attention has: heads, split over tp, and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.rotary import RotarySpec
from moekernels.model.spec import MOST, Place, key


@dataclass(frozen=True)
class HeadsSpec(RotarySpec):
    num_heads: int = key(16, "attention heads", low=1, flag="heads", high=MOST)
    num_kv_heads: int = key(
        0,
        "key/value heads (grouped-query attention); 0: as many as heads",
        low=0,
        flag="kv-heads",
        high=MOST,
    )
    head_dim: int = key(64, "width of a head, even", low=2, high=MOST)
    score_scale: float = key(
        0.0, "factor on the attention scores; 0: the root of head_dim's inverse", low=0, high=1e3
    )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def qk_scale(self) -> float:
        return self.score_scale or self.head_dim**-0.5

    @property
    def attention_width(self) -> int:
        """Of all heads: a token's attention to another takes four FLOPs an element."""
        return self.num_heads * self.head_dim


def result_kept(spec: HeadsSpec, at: Place, width: int) -> float:
    """The attended values, of `width` a head, and their log-sum-exp."""
    copies = 2 if at.device == "cpu" and at.runs > 1 else 1  # each run's output, and all joined
    return at.tokens * (spec.num_heads / at.layout.tp) * (copies * width * at.width + at.wide)


def traffic(spec: HeadsSpec, at: Place) -> float:
    """Bytes of a token's queries, keys, values and results."""
    tp = at.layout.tp
    q, k, hd = spec.num_heads / tp, spec.kv_heads / tp, spec.head_dim
    return (10 * spec.d_model + (3 * q + 4 * k) * hd * tp) * at.width / tp
