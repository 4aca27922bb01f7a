"""What the launches of a layer cost beside their work: in turn, where each begins once the one
ahead has ended, and in a chain, where its blocks are there by then; routing by four or by one.

Assumed, not fitted: few publish it. A launch of little work takes 3 us in turn (a route of four, 12
us), and of every launch a chain hides 1 us, which is what llama.cpp's pull request 22522 gains of a
token (5-6 % of 12.6 ms in some 600 launches).
"""

from __future__ import annotations

from moekernels.predict.card import Card
from moekernels.predict.layer import Layer, layer_tflops
from moekernels.predict.ours import recipe_of

SMALL_S, HIDDEN_S = 3e-6, 1e-6
# Of routing by one launch, in cycles: 32 choices of a warp, twice; the counters' sums.
ROUTE_BLOCKS, ROUTE_WARPS, ROUTE_SLOTS = 8, 32, 65536
MATCHED, SUMMED = 700, 3500
WAYS = ((False, False), (True, False), (True, True))  # (chain, route_at_once)


def route_seconds(layer: Layer, card: Card, at_once: bool) -> float:
    """Of the launch or launches that route a layer's choices."""
    if not at_once or layer.rows > ROUTE_SLOTS:
        return 4 * SMALL_S
    blocks = min(ROUTE_BLOCKS, -(-layer.rows // (ROUTE_WARPS * 64)))
    turns = -(-layer.rows // (blocks * ROUTE_WARPS * 32))
    return SMALL_S + (2 * turns * MATCHED + SUMMED) / (card.clock_ghz * 1e9)


def passes(layer: Layer, card: Card, chain: bool, route_at_once: bool) -> dict[str, float]:
    """Seconds of a layer's forward, routing included, and of its backward."""
    recipe = recipe_of(layer)
    rates = layer_tflops(layer, recipe, card)
    flops = 6e-12 * layer.rows * layer.F * layer.H
    before, behind = recipe.permutes
    routed = route_seconds(layer, card, route_at_once)
    one = route_at_once and layer.rows <= ROUTE_SLOTS
    # Beside the products: combine, rows that are moved, the gradients of the routing weights.
    forward = flops / rates["forward"] + routed + (before + 1) * SMALL_S
    backward = 2 * flops / rates["backward"] + (behind + 2) * SMALL_S
    if chain:
        forward -= (one + before + 3) * HIDDEN_S
        backward -= (behind + 6) * HIDDEN_S
    return {"forward": forward, "backward": backward}


def gains(layer: Layer, card: Card, chain: bool, route_at_once: bool) -> dict[str, float]:
    """Of a forward and a backward, over launches in turn: 0.02 is 2 % faster."""
    found = passes(layer, card, chain, route_at_once)
    turn = passes(layer, card, False, False)
    return {way: turn[way] / found[way] - 1 for way in found}
