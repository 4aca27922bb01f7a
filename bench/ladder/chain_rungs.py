"""Rung 14, of launches that follow one another closely: a layer in a chain of launches has
the bits of one whose launches run in turn, and one launch routes as four do."""

from __future__ import annotations

import torch

from ladder.diagnose import same
from ladder.kit import Kit, rung
from ladder.product_rungs import normal
from ladder.whole_rungs import TINY, _layer, _layer_inputs, _quickly_same
from moekernels import ops, reference

SMALL = ((512, 2048, 4096, 64, 2), (2048, 2048, 768, 128, 8), (4096, 2048, 1024, 64, 8))
REPEATS = 50  # on a card, where what is touched too early shows by chance


@rung(14, "simt", look="csrc/cuda/route_sm90.cu: the cluster's barrier, the counters' sums")
def route_at_once(kit: Kit) -> dict:
    """One cluster routes up to 65536 choices."""
    sizes = ((4096, 128, 8), (8192, 64, 8), (3, 1024, 2)) if kit.hardware else ((70, 5, 2),)
    for tokens, experts, top_k in sizes:
        ids = normal(torch.float32, tokens, experts).topk(top_k).indices.int()
        ids[0, 0] = -1  # dropped
        for capacity in (None, tokens // 2 or 1):
            wanted = reference.route(ids, experts, capacity=capacity, alignment=8)
            placed = kit.place({"ids": ids})["ids"]
            with kit.ops():
                kit.settings(route_at_once=True)
                try:
                    route = kit.wrong("route", ops.route)
                    found = route(placed, experts, capacity=capacity, alignment=8)
                finally:
                    kit.settings()
            for name, a, b in zip(wanted._fields, found, wanted):
                same(f"{tokens} tokens, {experts} experts, {name}", a.cpu(), b)
    return {"sizes": len(sizes)}


@rung(
    14,
    "headline",
    "route_at_once",
    look="sm90/chained.cuh: who waits, and csrc/cuda/moves_sm90.cu",
    limit=40,
)
def chained(kit: Kit) -> dict:
    """Small layers, forward and backward, in a chain: the bits of launches in turn, each time."""
    shapes, layer = SMALL if kit.hardware else TINY, kit.wrong("layer", _layer)
    for shape in shapes:
        inputs = _layer_inputs(kit, shape)
        with kit.ops():
            wanted = layer(**inputs, top_k=shape[-1])
        kit.settings(chain=True, route_at_once=True)
        try:
            for _ in range(REPEATS if kit.hardware else 1):
                with kit.ops():
                    found = layer(**inputs, top_k=shape[-1])
                for name, a, b in zip(("y", "dx", "dw1", "dw2"), found, wanted):
                    _quickly_same(f"{shape}: {name}", a, b)
        finally:
            kit.settings()
    return {"layers": len(shapes)}
