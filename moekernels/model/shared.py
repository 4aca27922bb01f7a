"""The shared expert: an FFN beside the routed experts, which every token visits."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.experts import ExpertsSpec
from moekernels.model.ffn import ffn_kept, ffn_owed, ffn_parameters, ffn_shapes, ffn_work
from moekernels.model.spec import WIDEST, Owed, Part, Place, Shape, Work, key


@dataclass(frozen=True)
class SharedSpec(ExpertsSpec):
    shared_d_ff: int = key(
        0,
        "hidden width of the shared expert, which every token visits; 0: none",
        low=0,
        high=WIDEST,
    )
    shared_gate: bool = key(False, "a sigmoid of the token scales the shared expert's result")


def check(spec: SharedSpec) -> None:
    if spec.shared_gate and not spec.shared_d_ff:
        raise UsageError("model: shared_gate needs shared_d_ff above 0")


def shapes(spec: SharedSpec) -> dict[str, Shape]:
    gate: dict[str, Shape] = {"gate": (1, spec.d_model)} if spec.shared_gate else {}
    return ffn_shapes(spec, spec.shared_d_ff) | gate


def parameters(spec: SharedSpec, at: Place, active: bool = False) -> int:
    gate = spec.d_model if spec.shared_gate else 0
    return ffn_parameters(spec, at, spec.shared_d_ff) + gate


def kept(spec: SharedSpec, at: Place) -> float:
    size = ffn_kept(spec, at, spec.shared_d_ff)
    gathered = at.layout.tp > 1 and at.sequence_parallel
    if not gathered and (at.width == at.wide or at.layout.stage_ranks == 1):
        size -= at.tokens * spec.d_model * at.width  # the router's or the experts' own input
    if spec.shared_gate:  # the result and its factor
        size += at.residual * (spec.d_model + 1) * at.width
    return size


def owed(spec: SharedSpec, at: Place) -> Owed:
    """Its input may be the router's or the experts' own; the gate's is."""
    gate = Owed(0.0, at.residual * at.width) if spec.shared_gate else Owed()
    return ffn_owed(spec, at, spec.shared_d_ff) + gate


def work(spec: SharedSpec, at: Place) -> Work:
    return ffn_work(spec, at, spec.shared_d_ff)


PART = Part(
    parameters,
    kept,
    work,
    shapes,
    asked=lambda spec: spec.shared_d_ff > 0,
    check=check,
    owed=owed,
    example={"shared_d_ff": 16, "shared_gate": True},
)
