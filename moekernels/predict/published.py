"""Published figures of Hopper kernels (TFLOP/s), and what is known of the kernels behind them.

The free constants of `card` were fitted to CALIBRATION; HOLDOUT took no part. Each source ran on a
card of its own, under another power limit, so each has a clock of its own; what a cycle does is the
same for all. No kernel here but ours passes by the rows that a tile has not.

* square: github.com/pranjalssh/fast.cu and its kin, 8192^3, H100: kernels with the tile and the
  pairing named, the last with stores by TMA.
* sonic: SonicMoE (arXiv 2512.14080), figures 6 and 14, H100, its own and DeepGEMM's kernels.
* torch: `torch._grouped_mm` (CUTLASS, 128 x 256, clusters of two along M). H100: pytorch/ao pull
  request 2490, which prints where its groups end. H200: pytorch issue 163425, whose groups are
  unbalanced, no more is said: cut at random as in the former; and, to calibrate, one batch of
  products that took 15 s (pytorch pull request 156203).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from moekernels.predict.card import H100, H200, Card
from moekernels.predict.events import predict
from moekernels.predict.kernel import Kernel, Problem
from moekernels.predict.layer import Layer, Recipe, layer_tflops

CLOCKS = {"square": 1.57, "sonic": H100.clock_ghz, "torch": H100.clock_ghz}

_SQUARE = Problem((8192,), 8192, 8192, 8192)
_FIGURE_6 = Layer(24576, 1536, 256, 128, 8)
PLAIN = 2800.0  # instructions of an epilogue that stores by TMA what it packed

PEER = Kernel(pair="m", issue=PLAIN, skips=False)
NARROW = replace(PEER, tile_n=192, stages=5, epilogue="pingpong")

SONIC = Recipe(
    up=replace(PEER, gathered=True, issue=9700.0),
    down=PEER,
    narrow_down=NARROW,
    dact=replace(NARROW, tile_n=128, gathered=True, issue=11000.0),
    dgrad=PEER,
    narrow_dgrad=NARROW,
    wgrad=replace(PEER, gathered=True),
    permutes=(0, 0),
    others=(1e-4, 3e-4),  # routing, its sums and launches: fitted
    wgrad_bytes=(0.0, 2.0),
)


@dataclass(frozen=True)
class Point:
    """One published figure, and how the model says the same."""

    name: str
    source: str
    tflops: float
    problem: Problem | None = None
    kernel: Kernel | None = None
    layer: Layer | None = None
    way: str = ""  # of a layer: forward or backward
    card: Card = H100

    def predicted(self) -> float:
        clock = CLOCKS[self.source] if self.card is H100 else self.card.clock_ghz
        card = replace(self.card, clock_ghz=clock)
        if self.layer is not None:
            return layer_tflops(self.layer, SONIC, card)[self.way]
        assert self.problem is not None and self.kernel is not None  # a product, then
        return predict(self.problem, self.kernel, card).tflops


def _square() -> Iterator[Point]:
    for name, tflops, kernel in (
        ("192x192", 777, Kernel(192, 192, 4, issue=6300.0)),
        ("128x256, pairs", 799, replace(PEER, issue=5600.0)),
        ("128x256, pairs, TMA stores", 808, PEER),
    ):
        yield Point(name, "square", tflops, _SQUARE, kernel)


def _figure_6() -> Iterator[Point]:
    of = _FIGURE_6
    deep = replace(PEER, stages=3)
    for name, tflops, op, kernel in (
        ("DeepGEMM up", 629, "up", deep),
        ("DeepGEMM down", 413, "down", deep),
        ("DeepGEMM dH", 480, "dact", deep),
        ("SonicMoE up", 559, "up", SONIC.up),
        ("SonicMoE down", 485, "down", SONIC.narrow_down),
        ("SonicMoE dH", 328, "dact", SONIC.dact),
        ("SonicMoE dX", 618, "dgrad", NARROW),
    ):
        problem = of.problem(op)
        if "DeepGEMM" in name:
            problem = replace(problem, reads=0.0, writes=2.0)
        yield Point(name, "sonic", tflops, problem, kernel)


_FIGURE_14 = {
    (40960, 768): (((256, 128, 8), 340, 368), ((512, 64, 4), 400, 405), ((1024, 32, 2), 405, 437)),
    (24576, 1536): (((256, 128, 8), 367, 407), ((512, 64, 4), 435, 440), ((1024, 32, 2), 468, 468)),
    (32768, 4096): (
        ((256, 256, 16), 430, 460),
        ((512, 128, 8), 503, 512),
        ((1024, 64, 4), 553, 555),
        ((512, 256, 16), 518, 527),
        ((1024, 128, 8), 560, 568),
        ((2048, 64, 4), 597, 587),
    ),
}


def _figure_14() -> Iterator[Point]:
    for (tokens, hidden), rows in _FIGURE_14.items():
        for (ffn, experts, top_k), forward, backward in rows:
            layer = Layer(tokens, hidden, ffn, experts, top_k)
            for way, tflops in (("forward", forward), ("backward", backward)):
                yield Point(f"{layer} {way}", "sonic", tflops, layer=layer, way=way)


CUTLASS = replace(PEER, issue=5600.0)
_CUTS = {
    (8192, 5120, 525): "272 832 1744 2288 2768 3056 4160 4352 4544 4800 5056 5360 6432 7760 7872",
    (5120, 8192, 545): "464 1008 1664 2608 2912 3296 3584 3968 4960 5024 5232 5952 7440 7760 7984",
}


def _counts(cuts: list[int], rows: int) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in pairwise([0, *cuts, rows]))


def _batch() -> Point:
    groups, rows, width = 16, 128_000, 7168
    problem = Problem((rows,) * groups, groups * rows, width, width)
    return Point("16 x 128000 x 7168 x 7168, H200", "torch", 705, problem, CUTLASS, card=H200)


def _torch() -> Iterator[Point]:
    for (n, k, tflops), cuts in _CUTS.items():
        counts = _counts([int(cut) for cut in cuts.split()], 8192)
        name = f"8192 x {n} x {k}, 16 groups"
        yield Point(name, "torch", tflops, Problem(counts, 8192, n, k), CUTLASS)
    for rows, n, k, tflops in (
        (32768, 6144, 2048, 569),
        (32768, 2048, 6144, 561),
        (65536, 6144, 2048, 608),
        (65536, 2048, 6144, 595),
    ):
        drawn = sorted(Random(0).sample(range(1, rows // 16), 31))
        problem = Problem(_counts([16 * cut for cut in drawn], rows), rows, n, k)
        name = f"{rows} x {n} x {k}, 32 groups, H200"
        yield Point(name, "torch", tflops, problem, CUTLASS, card=H200)


CALIBRATION = (*_square(), *_figure_6(), *_figure_14(), _batch())
HOLDOUT = tuple(_torch())


def errors(points: tuple[Point, ...]) -> list[tuple[Point, float]]:
    """(point, predicted / published - 1)."""
    return [(point, point.predicted() / point.tflops - 1) for point in points]


def rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5
