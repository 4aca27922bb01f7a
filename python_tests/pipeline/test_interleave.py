"""What one piece of a pair posts flies while a piece of the other pass computes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from moekernels.pipeline.interleave import (
    GRAD_OUT,
    OPEN_EXCHANGES,
    OUT,
    WEIGHTS,
    Piece,
    interleave,
    open_exchanges,
    passes,
    play,
)


def said(piece: Piece) -> str:
    return f"{'F' if piece.forward else 'B'}: {piece.begins or 'begin'} -> {piece.posts or '.'}"


def test_the_order_of_one_layer():
    assert [said(piece) for piece in interleave(*passes([3]))] == [
        "B: begin -> combine's gradient of layer 3",
        "B: weights of layer 3 -> .",
        "F: begin -> dispatch of layer 3",
        "B: combine's gradient of layer 3 -> dispatch's gradient of layer 3",
        "F: dispatch of layer 3 -> combine of layer 3",
        "B: dispatch's gradient of layer 3 -> .",
        "F: combine of layer 3 -> .",
    ]


@pytest.mark.parametrize("layers", [[1], [1, 2], list(range(1, 9))])
def test_every_exchange_flies_under_the_other_pass(layers):
    forward, backward = passes(layers)
    order = interleave(forward, backward)
    assert [p for p in order if p.forward] == list(forward)
    assert [p for p in order if not p.forward] == list(backward)
    assert open_exchanges(order) == OPEN_EXCHANGES
    flights = 0
    for i, piece in enumerate(order):
        if piece.posts is None:
            continue
        waits = next(j for j, other in enumerate(order) if other.begins == piece.posts)
        assert any(other.forward is not piece.forward for other in order[i + 1 : waits])
        flights += 1
    assert flights == 4 * len(layers)


@pytest.mark.parametrize("flight", [0.0, 0.2, 0.6, 3.0])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_pair_under_a_clock(count, flight):
    """Experts and weights take 1, attention 0.1: only attention hides the first exchange, something
    of 1 or more every other, two of them together in the middle."""
    order = interleave(*passes(range(count)))

    def takes(piece):
        return 1.0 if piece.begins and piece.begins.name in (OUT, GRAD_OUT, WEIGHTS) else 0.1

    pieces, flights = play(order, takes, lambda border: flight)
    compute = sum(map(takes, order))
    exposed = pieces[-1].end - compute
    assert len(flights) == 4 * count
    if flight <= 0.6:
        assert exposed == pytest.approx(max(0.0, flight - 0.1), abs=1e-9)
    else:  # the link is never idle but for the ends
        assert pieces[-1].end >= 4 * count * flight
    assert sum(s.end - s.start for s in pieces) == pytest.approx(compute)
    assert all(a.end <= b.start for a, b in pairwise(pieces))
    assert all(a.end <= b.start for a, b in pairwise(flights))


def test_unequal_passes_end_with_what_is_left():
    short, long = passes([1]), passes([1, 2, 3])
    for order in (interleave(short[0], long[1]), interleave(long[0], short[1])):
        assert open_exchanges(order) <= OPEN_EXCHANGES


def test_exchanges_out_of_order_are_noticed():
    forward, backward = passes([1])
    with pytest.raises(ValueError, match="combine of layer 1 is waited for before it"):
        open_exchanges(reversed(forward))
    with pytest.raises(ValueError, match="dispatch of layer 1 is never waited for"):
        open_exchanges(forward[:1])
    crossed = [backward[0], forward[0], forward[1], *backward[1:]]
    with pytest.raises(ValueError, match="dispatch of layer 1 is waited for before"):
        open_exchanges(crossed)
