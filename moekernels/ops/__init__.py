"""The ops, as public differentiable functions."""

from moekernels.ops.all_to_all import pack, regroup, ungroup
from moekernels.ops.combine import combine
from moekernels.ops.experts import experts
from moekernels.ops.gate import GateOutput, gate, load_balancing_loss
from moekernels.ops.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from moekernels.ops.permute import permute, permute_weights
from moekernels.ops.route import route
from moekernels.reference import Routing

__all__ = [
    "GateOutput",
    "Routing",
    "combine",
    "experts",
    "gate",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "load_balancing_loss",
    "pack",
    "permute",
    "permute_weights",
    "regroup",
    "route",
    "ungroup",
]
