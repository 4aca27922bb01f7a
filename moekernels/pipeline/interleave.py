"""The pieces of a forward and a backward that take turns, and their order.

A pass computes from one wait to the next. Where layers exchange rows, that cuts it into pieces:

    forward     attention, gate, post rows | wait, experts, post results | wait, next layer ...
    backward    ..., post gradients | weights | wait, experts, post theirs | wait, attention ...

so that what one piece posts travels while a piece of the other pass computes. Weights' gradients
are those of the layer behind: they run where attention alone, which is short, would hide rows.
Runtime, simulator, check and trace all ask `interleave`; it knows names, no tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

OPEN_EXCHANGES = 2  # posted and not yet waited for, at most, at any moment of a pair

# The borders of a layer, by which its exchange says where a pass stands.
OUT, BACK, GRAD_OUT, WEIGHTS, GRAD_BACK = (
    "dispatch",
    "combine",
    "combine's gradient",
    "weights",
    "dispatch's gradient",
)


class Border(NamedTuple):
    """Where a pass is about to wait for an exchange, or to compute what nothing waits for."""

    name: str
    layer: int

    @property
    def forward(self) -> bool:
        return self.name in (OUT, BACK)

    @property
    def waits(self) -> bool:
        return self.name != WEIGHTS

    def __str__(self) -> str:
        return f"{self.name} of layer {self.layer}"


class Piece(NamedTuple):
    """Of a pass, from one border to the next; `begins` is None for its first piece. `posts`: the
    exchange that it gives away and does not wait for."""

    forward: bool
    begins: Border | None
    posts: Border | None


Passes = tuple[tuple[Piece, ...], tuple[Piece, ...]]


def passes(layers: Sequence[int]) -> Passes:
    """The forward and the backward of a chunk whose `layers` exchange rows, in pieces."""
    forward = [Border(name, layer) for layer in layers for name in (OUT, BACK)]
    backward = [
        Border(name, layer) for layer in reversed(layers) for name in (WEIGHTS, GRAD_OUT, GRAD_BACK)
    ]
    return _pieces(True, forward), _pieces(False, backward)


def _pieces(forward: bool, borders: list[Border]) -> tuple[Piece, ...]:
    made = []
    for begins, ends in zip([None, *borders], [*borders, None]):
        if ends is not None and not ends.waits:  # what is waited for next was posted here
            ends = Border(GRAD_OUT, ends.layer)
        elif begins is not None and not begins.waits:
            ends = None
        made.append(Piece(forward, begins, ends))
    return tuple(made)


def interleave(forward: Iterable[Piece], backward: Iterable[Piece]) -> tuple[Piece, ...]:
    """The order in which the pieces run: in turn, the backward's first, each weights' piece right
    behind the one before it."""
    order: list[Piece] = []
    sides = [deque(backward), deque(forward)]
    while any(sides):
        for side in sides:
            if side:
                order.append(side.popleft())
            while side and side[0].begins is not None and not side[0].begins.waits:
                order.append(side.popleft())
    return tuple(order)


class Span(NamedTuple):
    """`what` from `start` to `end`, seconds since the pair began."""

    what: Piece | Border
    start: float
    end: float


def play(
    order: Iterable[Piece], takes: Callable[[Piece], float], flies: Callable[[Border], float]
) -> tuple[list[Span], list[Span]]:
    """The pieces, one after the other, each once what it waits for is there, and the exchanges,
    over a link that carries one at a time."""
    pieces, flights = [], []
    core = link = 0.0
    here: dict[Border, float] = {}
    for piece in order:
        start = max(core, here.get(piece.begins, 0.0)) if piece.begins else core
        core = start + takes(piece)
        pieces.append(Span(piece, start, core))
        if piece.posts is not None:
            gone = max(link, core)
            link = here[piece.posts] = gone + flies(piece.posts)
            flights.append(Span(piece.posts, gone, link))
    return pieces, flights


def open_exchanges(order: Iterable[Piece]) -> int:
    """The most exchanges that are posted and not yet waited for; ValueError where one is waited
    for that was not, or not in the order of posts, which all ranks share."""
    posted: deque[Border] = deque()
    most = 0
    for piece in order:
        if piece.begins is not None and piece.begins.waits:
            if not posted or posted.popleft() != piece.begins:
                raise ValueError(f"{piece.begins} is waited for before it, or one before, is due")
        if piece.posts is not None:
            posted.append(piece.posts)
            most = max(most, len(posted))
    if posted:
        raise ValueError(f"{posted[0]} is never waited for")
    return most
