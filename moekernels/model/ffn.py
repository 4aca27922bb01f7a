"""An FFN that every token visits, split by columns and rows over tp: one expert without weights to
`ops.experts`. A shared expert is one, and the whole of a layer without experts."""

from __future__ import annotations

from moekernels.model.experts import ExpertsSpec
from moekernels.model.spec import Owed, Place, Shape, Work


def ffn_shapes(spec: ExpertsSpec, d_ff: int) -> dict[str, Shape]:
    return {"w1": (1, spec.up_rows * d_ff, spec.d_model), "w2": (1, spec.d_model, d_ff)}


def ffn_parameters(spec: ExpertsSpec, at: Place, d_ff: int) -> int:
    return (spec.up_rows + 1) * spec.d_model * (d_ff // at.layout.tp)


def ffn_kept(spec: ExpertsSpec, at: Place, d_ff: int) -> float:
    """The gathered input, the pre-activations and two offsets."""
    h = 0.0 if spec.recompute_experts else spec.up_rows * d_ff / at.layout.tp
    return at.tokens * (spec.d_model + h) * at.width + 16


def ffn_working(spec: ExpertsSpec, at: Place, d_ff: int) -> float:
    """Held by its backward besides: gradients of the output, of h, and the activations or the
    gradient of the input."""
    f = d_ff / at.layout.tp
    inner = spec.d_model + spec.up_rows * f + max(f, spec.d_model)
    return at.tokens * at.width * inner


def ffn_owed(spec: ExpertsSpec, at: Place, d_ff: int) -> Owed:
    f, tokens = d_ff / at.layout.tp, at.tokens * at.width
    return Owed(tokens * spec.d_model, tokens * (spec.up_rows * f + f + spec.d_model))


def ffn_work(spec: ExpertsSpec, at: Place, d_ff: int) -> Work:
    f = d_ff / at.layout.tp
    inner = (spec.up_rows + 1) * f
    return Work(
        dense=2.0 * inner * spec.d_model,
        traffic=at.width * (4 * spec.d_model / at.layout.tp + 2 * inner),
    )
