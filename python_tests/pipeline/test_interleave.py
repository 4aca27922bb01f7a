"""What one piece of a pair posts flies while a piece of the other pass computes."""

from __future__ import annotations

import pytest

from moekernels.pipeline.interleave import (
    OPEN_EXCHANGES,
    Piece,
    interleave,
    open_exchanges,
    passes,
)


def said(piece: Piece) -> str:
    return f"{'F' if piece.forward else 'B'}: {piece.begins or 'begin'} -> {piece.posts or '.'}"


def test_the_order_of_one_layer():
    assert [said(piece) for piece in interleave(*passes([3]))] == [
        "B: begin -> combine's gradient of layer 3",
        "F: begin -> dispatch of layer 3",
        "B: combine's gradient of layer 3 -> dispatch's gradient of layer 3",
        "B: weights of layer 3 -> .",
        "F: dispatch of layer 3 -> combine of layer 3",
        "B: dispatch's gradient of layer 3 -> .",
        "F: combine of layer 3 -> .",
    ]


@pytest.mark.parametrize("layers", [[1], [1, 2], [2, 3, 4], list(range(1, 9))])
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
    crossed = [forward[0], backward[0], backward[1], forward[1]]
    with pytest.raises(ValueError, match="combine's gradient of layer 1 is waited for before"):
        open_exchanges(crossed)
