"""The shared expert: an FFN beside the routed experts, which every token visits."""

from __future__ import annotations

from moekernels.model.ffn import FeedForwardSpec, ffn_kept, ffn_parameters, ffn_work
from moekernels.model.spec import Place, Work


def parameters(spec: FeedForwardSpec, at: Place, active: bool = False) -> int:
    gate = spec.d_model if spec.shared_gate else 0
    return ffn_parameters(spec, at, spec.shared_d_ff) + gate


def kept(spec: FeedForwardSpec, at: Place) -> float:
    size = ffn_kept(spec, at, spec.shared_d_ff)
    gathered = at.layout.tp > 1 and at.sequence_parallel
    if not gathered and (at.width == at.wide or at.layout.stage_ranks == 1):
        size -= at.tokens * spec.d_model * at.width  # the router's or the experts' own input
    if spec.shared_gate:  # the result and its factor
        size += at.residual * (spec.d_model + 1) * at.width
    return size


def work(spec: FeedForwardSpec, at: Place) -> Work:
    return ffn_work(spec, at, spec.shared_d_ff)
