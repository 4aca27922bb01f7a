"""How much of an exchange is waited for, by playing its parts, or a pair's pieces, under a clock.

The link carries one message at a time and the core computes one part at a time. In parts, rows of
the first must be there before anything is computed: what `parallel.chunks` does. In pairs, pieces
run as `pipeline.interleave` has them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from moekernels.pipeline.interleave import (
    BACK,
    GRAD_BACK,
    GRAD_OUT,
    OUT,
    Border,
    Piece,
    Span,
    interleave,
    passes,
    play,
)
from moekernels.pipeline.schedule import Kind

if TYPE_CHECKING:
    from moekernels.plan.cost import LayerCost


def exposed(parts: int, flight: float, compute: float, afterwards: float = 0.0) -> float:
    """Seconds beyond computing, for rows that take `flight` there and as long back.

    compute: of all parts between the two. afterwards: work that needs none of the rows, and runs
    while the last come home.
    """
    each, work = flight / parts, compute / parts
    link = core = 0.0
    there = []
    for _ in range(parts):  # all are posted at once
        link += each
        there.append(link)
    for ready in there:
        core = max(core, ready) + work
        link = max(link, core) + each  # its results
    return max(link, core + afterwards) - compute - afterwards


class LayerTimes(NamedTuple):
    """Seconds of a layer that exchanges rows, for one microbatch: before its rows are posted and
    in its experts, forward and, without the weights' gradients, backward; these; and how long an
    exchange flies."""

    ahead: float
    experts: float
    experts_back: float
    behind: float
    weights: float
    flight: float
    flight_back: float


def of_layer(layer: LayerCost, again: bool, sizes: tuple[float, float]) -> LayerTimes:
    """`sizes` as an `Affine` has them. Computed again, a layer also waits once more."""
    forward, through = layer.forward, layer.through
    experts, back = forward["experts"](*sizes), through["experts"](*sizes)
    return LayerTimes(
        layer.compute("forward")(*sizes) - experts,
        experts,
        back + (layer.total.again(*sizes) if again else 0.0),
        layer.compute("through")(*sizes) - back,
        layer.total.weights(*sizes),
        forward["expert exchange"](*sizes) / 2,
        through["expert exchange"](*sizes) / 2,
    )


@lru_cache(maxsize=4096)
def exposed_in_pair(layers: tuple[LayerTimes, ...]) -> float:
    """Seconds that a pair of passes through `layers` waits for rows."""
    pieces, _ = played(layers)
    return pieces[-1].end - sum(span.end - span.start for span in pieces)


def played(layers: tuple[LayerTimes, ...]) -> tuple[list[Span], list[Span]]:
    """The pieces of such a pair, and its exchanges."""

    def takes(piece: Piece) -> float:
        begins, posts = piece.begins, piece.posts
        if piece.forward:
            if begins is not None and begins.name == OUT:
                return layers[begins.layer].experts
            return layers[posts.layer].ahead if posts is not None else 0.0
        if begins is None:
            return 0.0
        if not begins.waits:  # of the layer behind
            return layers[begins.layer + 1].weights if begins.layer + 1 < len(layers) else 0.0
        if begins.name == GRAD_OUT:
            return layers[begins.layer].experts_back
        return layers[begins.layer].behind + (layers[0].weights if begins.layer == 0 else 0.0)

    def flies(border: Border) -> float:
        return layers[border.layer].flight if border.forward else layers[border.layer].flight_back

    return play(interleave(*passes(range(len(layers)))), takes, flies)


def alone(layers: tuple[LayerTimes, ...], kind: Kind) -> tuple[float, list[Span]]:
    """Seconds of a forward, a backward, or one without the weights' gradients, through `layers`,
    and its exchanges: each is waited for at once, but for the last of a backward's layer, under
    which the weights' gradients run."""
    now, flights = 0.0, []

    def fly(name: str, layer: int, takes: float) -> float:
        flights.append(Span(Border(name, layer), now, now + takes))
        return now + takes

    for number, layer in enumerate(layers) if kind is Kind.F else ():
        now += layer.ahead
        now = fly(OUT, number, layer.flight) + layer.experts
        now = fly(BACK, number, layer.flight)
    for number, layer in reversed(list(enumerate(layers))) if kind.frees else ():
        weights = layer.weights if kind is Kind.B else 0.0
        now = fly(GRAD_OUT, number, layer.flight_back) + layer.experts_back
        now = max(now + weights, fly(GRAD_BACK, number, layer.flight_back)) + layer.behind
    return now, flights
