"""A small model and cluster to plan for."""

from __future__ import annotations

from dataclasses import replace

from moekernels.model.decoder import DecoderSpec
from moekernels.plan.evaluate import Problem
from moekernels.plan.strategy import Batch, Cluster


def problem(memory: float = 0.4e9, gpus: int = 4, **hardware) -> Problem:
    model = DecoderSpec(
        vocab_size=4096,
        d_model=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        num_experts=8,
        top_k=2,
        expert_d_ff=1024,
        qk_norm=False,
    )
    cluster = Cluster(gpus, 8, 400e12, memory, 1.8e12, 450e9, 50e9, reserve=0.0)
    lengths = tuple(range(100, 2020, 120))
    return Problem(model, Batch(lengths), replace(cluster, **hardware))
