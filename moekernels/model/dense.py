"""The FFN of a layer without experts, behind a norm of its own."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.experts import ExpertsSpec
from moekernels.model.ffn import ffn_kept, ffn_owed, ffn_parameters, ffn_shapes, ffn_work
from moekernels.model.spec import WIDEST, Owed, Part, Place, Shape, Work, key, norm_kept


@dataclass(frozen=True)
class DenseSpec(ExpertsSpec):
    dense_layers: int = key(0, "first layers with a plain FFN instead of experts", low=0, high=4096)
    dense_d_ff: int = key(0, "hidden width of those layers' FFN", low=0, high=WIDEST)

    def check_dense(self, num_layers: int) -> None:
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


def shapes(spec: DenseSpec) -> dict[str, Shape]:
    return ffn_shapes(spec, spec.dense_d_ff)


def parameters(spec: DenseSpec, at: Place, active: bool = False) -> int:
    return ffn_parameters(spec, at, spec.dense_d_ff)


def kept(spec: DenseSpec, at: Place) -> float:
    return norm_kept(spec, at) + ffn_kept(spec, at, spec.dense_d_ff)


def owed(spec: DenseSpec, at: Place) -> Owed:
    return ffn_owed(spec, at, spec.dense_d_ff)


def work(spec: DenseSpec, at: Place) -> Work:
    return ffn_work(spec, at, spec.dense_d_ff)


PART = Part(parameters, kept, work, shapes, owed=owed)
