"""When the exchanges of a planned flush fly, for its trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from moekernels.model.dispatch import way_of
from moekernels.pipeline.build import in_pairs
from moekernels.pipeline.interleave import Border, Span
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Pieces
from moekernels.pipeline.trace import Event, PieceOf, pieces_of
from moekernels.plan.evaluate import Problem, ordered_sizes, play
from moekernels.plan.memory import place_of
from moekernels.plan.overlap import LayerTimes, alone, played
from moekernels.plan.pairs import exchanging
from moekernels.plan.strategy import Strategy


class Sent(NamedTuple):
    """An exchange; seconds since the flush began."""

    name: str
    start: float
    end: float
    size: int  # bytes
    waits: dict[str, float] = {}


Posts = dict[PieceOf, tuple[float, list[Span]]]
"""Of a piece of a mean microbatch: its seconds, and what it posts, from its begin on."""


def tracks(problem: Problem, s: Strategy) -> tuple[list[Event], dict[int, list[Sent]]]:
    """The flush's actions, and by stage its exchanges: in each pass where a mean microbatch has
    them."""
    sizes = ordered_sizes(problem, s)
    layers = [exchanging(problem, s, sizes, v) for v in range(s.depth)]
    pairs = in_pairs(s.schedule)
    pieces = [_pieces(of) for of in layers] if pairs and all(layers) else []
    events = play(problem, s, sizes, pieces)[0].events
    if s.layout.exchange == 1:
        return events, {}
    posts: Posts = {}
    for v, of in enumerate(layers):
        chunk, rank = divmod(v, s.layout.pp)
        for kind in (Kind.F, Kind.B, Kind.I):
            posts[PieceOf(rank, chunk, kind, False, 0)] = alone(of, kind)
        if pairs and of:
            posts |= _of_pair(rank, of)
    tokens = float(sizes.tokens.mean())
    hops = way_of(place_of(s, 1.0)).traffic(problem.model, place_of(s, 1.0))
    size = round(sum(hop.size for hop in hops) / 2 * tokens)
    numbers = [_numbers(problem, s, v) for v in range(s.depth)]
    flights: dict[int, list[Sent]] = defaultdict(list)
    for e, piece in pieces_of(events):
        takes, spans = posts.get(piece, (0.0, []))
        scale = (e.end - e.start) / takes if takes and not piece.cut else 1.0
        mine = numbers[s.layout.pp * e.chunk + e.stage]
        for border, start, end in spans:
            assert isinstance(border, Border)
            name = f"{border.name} {mine[border.layer]}"
            begin, over = e.start + scale * start, e.start + scale * end
            flights[e.stage].append(Sent(name, begin, over, size))
    return events, dict(flights)


def _numbers(problem: Problem, s: Strategy, v: int) -> list[int]:
    """Of the layers of a virtual stage that exchange rows."""
    first = 1 + sum(s.layers[:v])
    numbers = range(first, first + s.layers[v])
    return [number for number in numbers if number > problem.model.dense_layers]


def _lengths(pieces: Iterable[Span], forward: bool) -> list[float]:
    """Of one pass' pieces, each with the wait before it."""
    spans = list(pieces)
    ends = [0.0, *(span.end for span in spans)]
    takes = [after - before for before, after in pairwise(ends)]
    return [x for x, span in zip(takes, spans) if span.what.forward is forward]


def _pieces(layers: tuple[LayerTimes, ...]) -> Pieces:
    pieces, _ = played(layers)
    return _lengths(pieces, True), _lengths(pieces, False)


def _of_pair(rank: int, layers: tuple[LayerTimes, ...]) -> Posts:
    pieces, flights = played(layers)
    posts: Posts = {}
    gone = {span.what: span for span in flights}
    numbers = {True: 0, False: 0}
    begin = 0.0  # of a piece, with the wait before it
    for piece in pieces:
        what = piece.what
        assert not isinstance(what, Border)
        kind = Kind.F if what.forward else Kind.B
        spans = []
        if what.posts is not None:
            flight = gone[what.posts]
            spans = [Span(what.posts, flight.start - begin, flight.end - begin)]
        key = PieceOf(rank, 0, kind, True, numbers[what.forward])
        posts[key] = piece.end - begin, spans
        numbers[what.forward] += 1
        begin = piece.end
    return posts
