"""The kernels of this project as the model sees them: every variant of every product."""

from __future__ import annotations

from dataclasses import replace

from moekernels.predict.card import Card
from moekernels.predict.events import Predicted, predict
from moekernels.predict.kernel import Kernel
from moekernels.predict.layer import Layer, Recipe

# Instructions of a warp for 8 elements of SwiGLU, from the machine code (test_sass.py holds them).
UP_PER_CHUNK, DACT_PER_CHUNK = 102, 175
WARPS = 8
# Of a warp besides: what stages a tile, and the whole of an epilogue that only stores, adds, or
# hands its sums to L2.
UP_STAGE, DACT_STAGE, ROWS, ADD, SUMS = 200, 400, 450, 1250, 490


def issue(op: str, tile_n: int = 256, bulk_sums: bool = False) -> float:
    """Instructions that the warps of a block issue for the epilogue of a tile of 128 rows."""
    chunks = 16 * tile_n / 8 / 32  # of a lane, of C
    of_warp = {
        "up": chunks / 2 * UP_PER_CHUNK + UP_STAGE,  # a gate and an up column make one element
        "dact": chunks * DACT_PER_CHUNK + DACT_STAGE,
        "wgrad": (SUMS if bulk_sums else ADD) * tile_n / 256,
    }.get(op, ROWS * tile_n / 256)
    return WARPS * of_warp


def kernel_of(op: str, **how) -> Kernel:
    """The kernel of an op; `how`: the fields that a variant changes."""
    op = op.rstrip("12")
    return Kernel(issue=issue(op, how.get("tile_n", 256), how.get("bulk_sums", False)), **how)


DEFAULT = Recipe(
    up=kernel_of("up"),
    down=kernel_of("down"),
    dact=kernel_of("dact"),
    dgrad=kernel_of("dgrad"),
    wgrad=kernel_of("wgrad", bulk_sums=True),
)
# Where x is seen through tokens: two products gather its rows, which nothing moves before.
GATHERING = replace(
    DEFAULT,
    up=kernel_of("up", gathered=True),
    of_x=kernel_of("wgrad", bulk_sums=True, gathered=True),
    permutes=(0, 1),
)
# Where the gradients of weights of several microbatches are computed together.
SEGMENTS = 4  # of a launch at most: kMostSegments in csrc/cuda/sm90/entry.cuh
MANY = {"bulk_sums": True, "segments": SEGMENTS}
JOINED = replace(DEFAULT, wgrad=kernel_of("wgrad", **MANY))
GATHER_BELOW = 4096  # columns that a row meets: kGatherBelow in csrc/cuda/gathered_sm90.cu


PAIRS = ("", "n", "m")
HIDDEN = tuple({"epilogue": "hidden", "stages": 3, "pair": pair} for pair in PAIRS)
PINGPONG = tuple(
    {"epilogue": "pingpong", "tile_n": 128, "stages": 6, "pair": pair} for pair in PAIRS
)
SUMS_IN_TURN = tuple({"bulk_sums": True, "band": 4, **way} for way in PINGPONG)
NARROW = {"tile_n": 128, "stages": 6}


def by_table(op: str, layer: Layer) -> Kernel:
    """What csrc/include/moekernels/gemm_tuned.h gives a product of a gated layer."""
    rows, short = layer.rows // layer.E, layer.H <= 2048
    if op == "dact" and short and rows >= 512 and layer.F >= 256:
        return kernel_of(op, **PINGPONG[1])
    if op == "up" and short and rows >= 2048 and layer.F >= 4096:
        return kernel_of(op, **HIDDEN[1])
    return DEFAULT.kernel(op, layer)


def recipe_of(layer: Layer) -> Recipe:
    """What a layer on one card takes where no setting asks for something else."""
    dact = by_table("dact", layer)
    if 2 * layer.F < GATHER_BELOW:
        return replace(GATHERING, dact=dact)
    return replace(DEFAULT, dact=dact, up=by_table("up", layer))


def product(op: str, layer: Layer, card: Card, kernel: Kernel | None = None) -> Predicted:
    """One of `layer.OPS` by one of our kernels, gradients added to fp32."""
    return predict(layer.problem(op), kernel or by_table(op, layer), card)


# What is built, by op; the first of each is what the table gives where it says nothing else.
VARIANTS: dict[str, tuple[dict, ...]] = {
    "up": ({}, {"gathered": True}, *HIDDEN),
    "down": ({}, NARROW, *HIDDEN),
    "dact": ({}, *PINGPONG),
    "dgrad": ({}, NARROW, *HIDDEN),
    "wgrad": (
        {"bulk_sums": True},
        {"bulk_sums": True, "gathered": True},
        {},
        MANY,
        *SUMS_IN_TURN,
    ),
}


def fastest(layer: Layer, card: Card) -> Recipe:
    """Of each product what is built and predicted to be the fastest; who gathers is as it is."""

    def of(op: str) -> Kernel:
        ways = (
            how for how in VARIANTS[op.rstrip("12")] if not how.keys() & {"gathered", "segments"}
        )
        kernels = [kernel_of(op, **how) for how in ways]
        return max(kernels, key=lambda kernel: product(op, layer, card, kernel).tflops)

    recipe = replace(
        recipe_of(layer), down=of("down"), dact=of("dact"), dgrad=of("dgrad"), wgrad=of("wgrad2")
    )
    return recipe if recipe.up.gathered else replace(recipe, up=of("up"), of_x=of("wgrad1"))
