"""The routed experts: d_model -> (lift to I) -> F -> I (-> lowered to d_model), grouped by expert.

The lift exists only where the input width I differs from d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.dispatch import routed_rows, way_of
from moekernels.model.router import RouterSpec
from moekernels.model.spec import WIDEST, Owed, Part, Place, Shape, Work, key

# Activation -> whether it multiplies an up-projection by a gate (three matrices, not two).
ACTIVATIONS = {
    "swiglu": True,
    "geglu": True,
    "reglu": True,
    "swiglu_oai": True,
    "swiglu_clamped": True,
    "relu2": False,
    "silu": False,
    "gelu": False,
}


@dataclass(frozen=True)
class ExpertsSpec(RouterSpec):
    expert_d_in: int = key(
        0,
        "width inside an expert before its FFN; 0: d_model. Where it differs, the expert lifts "
        "and lowers",
        low=0,
        high=WIDEST,
    )
    expert_d_ff: int = key(2048, "hidden width of an expert's FFN", low=1, high=WIDEST)
    gated: bool = key(True, "gated FFN (three matrices) or plain (two)")
    activation: str = key(
        "swiglu",
        "activation of the experts",
        choices=ACTIVATIONS,
    )
    activation_limit: float = key(
        7.0, "where swiglu_oai and swiglu_clamped clamp gate and up", above=0, high=1e6
    )
    activation_alpha: float = key(
        1.702, "factor on the gate within swiglu_oai's sigmoid", above=0, high=1e6
    )
    expert_bias: bool = key(False, "biases of the experts' products")
    recompute_experts: bool = key(
        False, "experts keep no pre-activation and compute it again in backward"
    )
    fp8_experts: bool = key(
        False,
        "the routed experts' two products and the gradients of their rows in FP8 (e4m3, a scale "
        "for each block of 128), their weights' gradients and all else as without",
    )

    @property
    def d_in(self) -> int:
        """I: width of what an expert's FFN reads and writes."""
        return self.expert_d_in or self.d_model

    @property
    def lifted(self) -> bool:
        return self.d_in != self.d_model

    @property
    def up_rows(self) -> int:
        """Rows of w1 a unit of F: gate and up, or up alone."""
        return 2 if self.gated else 1


def shapes(spec: ExpertsSpec) -> dict[str, Shape]:
    experts, d_in, f = spec.num_experts, spec.d_in, spec.expert_d_ff
    found: dict[str, Shape] = {
        "w1": (experts, spec.up_rows * f, d_in),
        "w2": (experts, d_in, f),
    }
    if spec.expert_bias:
        found["b1"] = (experts, spec.up_rows * f)
        found["b2"] = (experts, d_in)
    if spec.lifted:
        found["w_in"] = (experts, d_in, spec.d_model)
        found["w_out"] = (experts, spec.d_model, d_in)
    return found


def one_expert(spec: ExpertsSpec, etp: int = 1) -> int:
    """Parameters of an expert, or of its etp shard; the lift is whole on each."""
    ffn = (spec.up_rows + 1) * spec.d_in * (spec.expert_d_ff // etp)
    if spec.expert_bias:  # the second product's is whole on each shard, and one of them adds it
        ffn += spec.up_rows * (spec.expert_d_ff // etp) + spec.d_in
    return ffn + (2 * spec.d_model * spec.d_in if spec.lifted else 0)


def whole_share(spec: ExpertsSpec, etp: int) -> float:
    """Which part of an expert's parameters is whole on each of its etp shards."""
    whole = 2 * spec.d_model * spec.d_in if spec.lifted else 0
    return (whole + (spec.d_in if spec.expert_bias else 0)) / one_expert(spec, etp)


def parameters(spec: ExpertsSpec, at: Place, active: bool = False) -> int:
    number = spec.top_k if active else spec.num_experts // at.layout.ep
    return number * one_expert(spec, at.layout.etp)


def kept(spec: ExpertsSpec, at: Place) -> float:
    way, b = way_of(at), at.width
    rows = way.rows(spec, at)
    up = spec.up_rows * spec.expert_d_ff / at.layout.etp
    size = 0.0 if spec.recompute_experts else rows * up * b
    size += (spec.num_experts // at.layout.ep + 1) * 8  # offsets
    if not spec.lifted:
        return size + way.arriving(spec, at)
    size += rows * spec.d_model * b if way.view else way.arriving(spec, at)  # what is lifted
    return size + 2 * rows * spec.d_in * b  # the lifted rows, and the results to be lowered


def owed(spec: ExpertsSpec, at: Place) -> Owed:
    way, f, b = way_of(at), spec.expert_d_ff / at.layout.etp, at.width
    rows = way.rows(spec, at)
    results = rows * (spec.up_rows * f + f + spec.d_in) * b
    if not spec.lifted:
        return Owed(way.arriving(spec, at), results)
    lift = rows * spec.d_model * b if way.view else way.arriving(spec, at)
    lifted = rows * spec.d_in * b
    return Owed(lift + 2 * lifted, results + lifted + rows * spec.d_model * b)


def working(spec: ExpertsSpec, at: Place) -> float:
    """Held by the backward besides: gradients of the output, of h, and the weighted activations or
    the gradient of the input; the rows to be lowered are gone by then. Where weights' gradients
    are put off, all of these, until the input's gradient is on its way; h is gone by then."""
    way, f, hidden = way_of(at), spec.expert_d_ff / at.layout.etp, spec.d_model
    rows, up = way.rows(spec, at), spec.up_rows * f
    fp8 = up * rows if spec.fp8_experts else 0.0  # the widest operand, a byte an element
    if not way.defers:
        size = spec.d_in + up + max(f, spec.d_in) - (spec.d_in if spec.lifted else 0)
        return rows * at.width * size + fp8
    held = spec.d_in + up + f + (hidden + spec.d_in if spec.lifted else 0)
    within = held + (0 if spec.lifted else spec.d_in)
    back = held + 3 * hidden - (0 if spec.recompute_experts else up)  # a gradient, sent, received
    return rows * at.width * max(within, back) + fp8


def work(spec: ExpertsSpec, at: Place) -> Work:
    f = spec.expert_d_ff / at.layout.etp
    up, b, hidden = spec.up_rows * f, at.width, spec.d_model
    weights = (up + f) * spec.d_in + (2 * hidden * spec.d_in if spec.lifted else 0)
    a_row = 6 * hidden + 2 * (up + f) + (4 * spec.d_in if spec.lifted else 0)
    return Work(
        grouped=2.0 * weights,
        experts=spec.num_experts / at.layout.ep,
        traffic=routed_rows(spec, at) / at.tokens * b * a_row,
    )


PART = Part(
    parameters, kept, work, shapes, copies=lambda layout: (layout.edp, layout.exchange), owed=owed
)
