"""Copies of hot experts in a plan: where they pay, how even they make ranks, what they take.

Legend: L layers, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from moekernels.balance import placement, replicas
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout

Loads = tuple[tuple[float, ...], ...]  # [L, E] rows of each expert, to any scale


@lru_cache(maxsize=256)
def hottest(loads: Loads, ranks: int) -> float:
    """Rows of the hottest expert of all layers over the mean of `ranks` ranks."""
    return max(max(layer) * ranks / sum(layer) for layer in loads)


@lru_cache(maxsize=256)
def busiest(loads: Loads, layout: Layout, spare: int) -> float:
    """Rows of the busiest rank over their mean with `spare` slots a rank, in the mean over layers;
    a rank holds neighbouring experts."""
    total, units = 0.0, replicas.units_of(layout.exchange)
    for layer in loads:
        rows = torch.tensor(layer, dtype=torch.float64)
        slot_of = placement.unmoved(1, len(layer))[0]
        copies = replicas.better(rows, slot_of, layout.ep, spare, units, ())
        evened = replicas.rank_loads(rows, slot_of, layout.ep, copies, units)
        total += (evened.max() / evened.mean()).item()
    return total / len(loads)


def why_not(model: DecoderSpec, layout: Layout, way: str, spare: int, loads: Loads) -> str:
    """Why a strategy has no use for copies; empty where it may have."""
    if layout.ep <= model.top_k:
        return f"placement suffices at ep {layout.ep}, which top-k {model.top_k} reaches"
    if way == "all_gather":
        return f"under {way} a rank computes its own experts alone"
    if spare > model.num_experts - model.num_experts // layout.ep:
        return f"at ep {layout.ep} the other ranks have fewer experts"
    if loads and hottest(loads, layout.ep) <= 1 + replicas.LEAST:
        share = hottest(loads, layout.ep)
        return (
            f"placement suffices at ep {layout.ep}: the hottest expert alone has {share:.2f} of a "
            f"rank's mean rows"
        )
    return ""


def spare_parameters(model: DecoderSpec, ep: int, count: int, own: int) -> int:
    """Of `count` spare slots in each layer of a rank that has `own` parameters of experts."""
    return count * own * ep // model.num_experts
