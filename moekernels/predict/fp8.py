"""An MoE layer in FP8: its products at twice the rate, and the passes that they cost besides."""

from __future__ import annotations

from moekernels.predict.card import Card
from moekernels.predict.events import predict
from moekernels.predict.kernel import Kernel
from moekernels.predict.layer import Layer
from moekernels.predict.ours import DEFAULT, issue

# csrc/cuda/sm90/fp8.cuh: what a tile of 128 columns stores is what one of 16 bits does.
KERNEL = Kernel(tile_n=128, stages=6, fp8=True, issue=issue("down", 128))
QUANTIZE = 3  # bytes of an element: two are read, one is written


def passes(layer: Layer, calls: int) -> dict[str, float]:
    """Bytes that a layer moves beside its products, forward and backward; weights are quantized
    once in so many calls, the microbatches of a step."""
    rows, h, f = layer.rows, layer.H, layer.F
    weights = QUANTIZE * 3 * layer.E * h * f / calls
    there, home = 4.0 * rows * h, 2.0 * (rows + layer.T) * h  # permute and combine
    forward = there + QUANTIZE * rows * h + 6 * rows * f + QUANTIZE * rows * f + home
    # dy; da, h, dh and the weighted a; dh; x for its gradient of the weights
    backward = QUANTIZE * rows * h + 12 * rows * f + QUANTIZE * rows * 2 * f + home + there
    return {"forward": forward + weights, "backward": backward + weights}


def products(layer: Layer, card: Card) -> dict[str, float]:
    """TFLOP/s of the products that are in FP8."""
    sizes = {
        "up": (2 * layer.F, layer.H),
        "down": (layer.H, layer.F),
        "dact": (layer.F, layer.H),
        "dgrad": (layer.H, 2 * layer.F),
    }
    return {op: predict(layer.plain(n, k), KERNEL, card).tflops for op, (n, k) in sizes.items()}


def layer_tflops(layer: Layer, card: Card, calls: int = 8) -> dict[str, float]:
    """forward, backward: TFLOP/s of the whole layer, weights' gradients of 16 bits."""
    flops = 2.0 * layer.rows * layer.F * layer.H  # of one matrix
    rates, moved = products(layer, card), passes(layer, calls)
    seconds = {op: flops * (2 if op in ("up", "dgrad") else 1) / rates[op] / 1e12 for op in rates}
    gradients = sum(
        predict(layer.problem(op, DEFAULT.wgrad_bytes), DEFAULT.wgrad, card).seconds
        for op in ("wgrad1", "wgrad2")
    )
    forward = seconds["up"] + seconds["down"] + moved["forward"] / card.dram
    backward = seconds["dact"] + seconds["dgrad"] + gradients + moved["backward"] / card.dram
    return {"forward": 3 * flops / forward / 1e12, "backward": 6 * flops / backward / 1e12}
