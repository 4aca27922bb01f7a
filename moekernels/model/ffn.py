"""Feed-forward parts that every token visits, split by columns and rows over tp: the shared expert
beside the routed ones, and the whole FFN of the first layers where those have no experts.

Both are one FFN to the kernels: `ops.experts` with one expert and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.experts import ExpertsSpec
from moekernels.model.spec import WIDEST, Place, Work, key


@dataclass(frozen=True)
class FeedForwardSpec(ExpertsSpec):
    shared_d_ff: int = key(
        0,
        "hidden width of the shared expert, which every token visits; 0: none",
        low=0,
        high=WIDEST,
    )
    shared_gate: bool = key(False, "a sigmoid of the token scales the shared expert's result")
    dense_layers: int = key(0, "first layers with a plain FFN instead of experts", low=0, high=4096)
    dense_d_ff: int = key(0, "hidden width of those layers' FFN", low=0, high=WIDEST)

    def check_feed_forward(self, num_layers: int) -> None:
        if not 0 <= self.dense_layers < num_layers:
            raise UsageError(
                f"model: dense_layers {self.dense_layers} leaves no layer with experts; use less "
                f"than num_layers, {num_layers}"
            )
        if (self.dense_layers > 0) != (self.dense_d_ff > 0):
            raise UsageError(
                f"model: dense_layers {self.dense_layers} with dense_d_ff {self.dense_d_ff}; give "
                "both or neither"
            )
        if self.shared_gate and not self.shared_d_ff:
            raise UsageError("model: shared_gate needs shared_d_ff above 0")


def ffn_parameters(spec: FeedForwardSpec, at: Place, d_ff: int) -> int:
    return (spec.up_rows + 1) * spec.d_model * (d_ff // at.layout.tp)


def ffn_kept(spec: FeedForwardSpec, at: Place, d_ff: int) -> float:
    """The gathered input, the pre-activations and two offsets."""
    h = 0.0 if spec.recompute_experts else spec.up_rows * d_ff / at.layout.tp
    return at.tokens * (spec.d_model + h) * at.width + 16


def ffn_working(spec: FeedForwardSpec, at: Place, d_ff: int) -> float:
    """Held by its backward besides: gradients of the output, of h, and the activations or the
    gradient of the input."""
    f = d_ff / at.layout.tp
    inner = spec.d_model + spec.up_rows * f + max(f, spec.d_model)
    return at.tokens * at.width * inner


def ffn_work(spec: FeedForwardSpec, at: Place, d_ff: int) -> Work:
    f = d_ff / at.layout.tp
    inner = (spec.up_rows + 1) * f
    return Work(
        dense=2.0 * inner * spec.d_model,
        traffic=at.width * (4 * spec.d_model / at.layout.tp + 2 * inner),
    )
