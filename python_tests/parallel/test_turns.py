"""Two passes take turns at their borders, and the failure of one ends both."""

from __future__ import annotations

import multiprocessing
import threading
from contextlib import contextmanager

import pytest
import torch

from moekernels.parallel.turns import border, take_turns
from moekernels.pipeline.interleave import interleave, passes


class Pair:
    """A forward and a backward that write down where they are."""

    def __init__(self, layers, *, fails: str = ""):
        self.layers, self.fails, self.seen, self.spans = layers, fails, [], []
        self.backward = passes(layers)[1]
        self.error: BaseException | None = None

    def at(self, text: str) -> None:
        self.seen.append(text)
        if text == self.fails:
            raise ValueError(f"failed at {text}")

    def run_forward(self):
        self.at("F")
        for layer in self.layers:
            for name in ("dispatch", "combine"):
                border(name, layer, forward=True)
                self.at(f"F {name} {layer}")
        return torch.ones(1)

    def run_backward(self):
        x = torch.ones(1, requires_grad=True)
        _Borders.apply(x, self).backward()
        return x.grad

    @contextmanager
    def observe(self, forward):
        self.spans.append((forward, threading.get_ident()))
        yield
        self.spans.append(())

    def take_turns(self, order=None):
        order = order or interleave(*passes(self.layers))
        return take_turns(order, self.run_forward, self.run_backward, self.observe)


class _Borders(torch.autograd.Function):
    """A backward that has borders within one call of autograd."""

    @staticmethod
    def forward(ctx, x, pair):
        ctx.pair = pair
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        pair = ctx.pair
        pair.at("B")
        try:
            for piece in pair.backward[1:]:
                border(*piece.begins, forward=False)
                border("combine", 1, forward=True)  # of a layer computed again: no turn
                pair.at(f"B {piece.begins.name} {piece.begins.layer}")
        except BaseException as error:
            pair.error = error
            raise
        return grad * 2, None


@pytest.mark.parametrize("layers", [[1], [1, 2, 5]])
def test_passes_run_in_the_order_of_their_pieces(layers):
    order = interleave(*passes(layers))
    for _ in range(20):
        pair = Pair(layers)
        forward, backward = pair.take_turns()
        assert (forward.item(), backward.item()) == (1.0, 2.0)
        expected = [" ".join(["F" if p.forward else "B", *map(str, p.begins or ())]) for p in order]
        assert pair.seen == expected
        assert pair.spans[1::2] == [()] * len(order)  # each ended before the next began
        assert [span[0] for span in pair.spans[::2]] == [p.forward for p in order]


@pytest.mark.parametrize("fails", ["F", "F dispatch 2", "F combine 1", "B", "B weights 1"])
def test_the_failure_of_a_pass_is_the_pairs(fails):
    pair = Pair([1, 2], fails=fails)
    with pytest.raises(ValueError, match=f"failed at {fails}"):
        pair.take_turns()
    assert pair.seen[-1] == fails
    if fails.startswith("F"):
        assert "has failed" in str(pair.error)
    Pair([1, 2]).take_turns()  # the thread of backwards lives on


def test_a_pass_that_leaves_its_order_is_noticed():
    with pytest.raises(
        RuntimeError, match="at weights of layer 1, its order at weights of layer 2"
    ):
        Pair([1]).take_turns(interleave(*passes([2])))
    pair = Pair([1])
    with pytest.raises(RuntimeError, match="a pass ended 2 pieces before its order does"):
        pair.take_turns(interleave(passes([1, 2])[0], passes([1])[1]))


def test_borders_mean_nothing_where_no_pair_runs():
    border("dispatch", 1, forward=True)


def test_a_fork_takes_turns_after_its_parent_did():
    Pair([1]).take_turns()
    child = multiprocessing.get_context("fork").Process(target=Pair([1]).take_turns)
    child.start()
    child.join(60)
    hangs = child.exitcode is None
    child.kill()
    assert not hangs and child.exitcode == 0
