"""The FFN of a layer without experts, behind a norm of its own."""

from __future__ import annotations

from moekernels.model.ffn import FeedForwardSpec, ffn_kept, ffn_parameters, ffn_work
from moekernels.model.spec import Place, Work, norm_kept


def parameters(spec: FeedForwardSpec, at: Place, active: bool = False) -> int:
    return ffn_parameters(spec, at, spec.dense_d_ff)


def kept(spec: FeedForwardSpec, at: Place) -> float:
    return norm_kept(spec, at) + ffn_kept(spec, at, spec.dense_d_ff)


def work(spec: FeedForwardSpec, at: Place) -> Work:
    return ffn_work(spec, at, spec.dense_d_ff)
