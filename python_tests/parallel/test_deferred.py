"""Gradients of weights that are put off: the same bits, in the same order, and never lost."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.model.layout import Layout
from moekernels.nn.dispatcher import AllToAllDispatcher
from moekernels.ops import _deferred
from moekernels.parallel.exchange import _SharedBack
from moekernels.parallel.mesh import Mesh
from python_tests.support.distributed import run_ranks

E, H, F = 3, 4, 5


def _weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(E, 2 * F, H), (E, H, F), (E, 2 * F), (E, H)]
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for w in weights:
        w.main_grad = torch.zeros_like(w)
    return weights


def _passed(weights: list[torch.nn.Parameter], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(7, H, generator=generator).requires_grad_()
    w1, w2, b1, b2 = weights
    offsets = torch.tensor([0, 2, 2, 7])
    y = ops.experts(rows, None, w1, w2, offsets, b1=b1, b2=b2)
    return ops.grouped_gemm(y, w1, offsets).square().sum()


def _grads(weights: list[torch.nn.Parameter]) -> list[Tensor]:
    return [w.main_grad for w in weights]


def test_a_driven_queue_runs_when_it_is_told_in_the_same_order() -> None:
    plain, put_off = _weights(), _weights()
    for seed in (1, 2):
        _passed(plain, seed).backward()
    queue = _deferred.Queue()
    for seed in (1, 2):
        with _deferred.deferred(queue):
            _passed(put_off, seed).backward()
    assert len(queue) == 10 and not any(g.any() for g in _grads(put_off))
    assert queue.run(3) == 3 and queue.run() == 7 and queue.run() == 0
    for got, wanted in zip(_grads(put_off), _grads(plain), strict=True):
        assert torch.equal(got, wanted)


def test_joined_work_has_the_bits_of_each_alone_and_the_rest_is_not_put_off() -> None:
    plain, joined = _weights(), _weights()
    for seed in (1, 2, 3):
        _passed(plain, seed).backward()
    queue = _deferred.Joined()
    for seed in (1, 2, 3):
        with queue.taking():
            _passed(joined, seed).backward()
    w1, w2, b1, b2 = _grads(joined)
    assert len(queue) == 9 and b1.any() and b2.any() and not w1.any() and not w2.any()
    assert queue.run() == 9 and queue.run() == 0
    for got, wanted in zip(_grads(joined), _grads(plain), strict=True):
        assert torch.equal(got, wanted)


def test_joined_work_of_one_buffer_keeps_its_order_whatever_its_kind() -> None:
    """Only neighbours of one key are joined."""
    done = []

    class Work:
        def __init__(self, name: str, buffer: int, key: str) -> None:
            self.name, self.buffer, self.key = name, buffer, key

        def join(self, others: list[Work]) -> None:
            done.append(self.name + "".join(other.name for other in others))

        def __call__(self) -> None:
            done.append(self.name)

    queue = _deferred.Joined()
    for name, buffer, key in ("a", 2, "x"), ("b", 1, "x"), ("c", 2, "x"), ("d", 2, "y"):
        queue.put(Work(name, buffer, key))
    queue.put(Work("e", 2, "x"))
    queue.put(lambda: done.append("now"))
    queue.run()
    assert done == ["now", "b", "ac", "d", "e"]


class Mark(torch.autograd.Function):
    """Calls something in a backward."""

    @staticmethod
    def forward(ctx, x: Tensor, call) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.call()
        return grad, None


def test_what_a_backward_began_to_put_off_runs_at_its_end() -> None:
    plain, put_off = _weights(), _weights()
    _passed(plain, 1).backward()
    Mark.apply(_passed(put_off, 1), _deferred.begin).backward()
    assert not _deferred._begun
    for got, wanted in zip(_grads(put_off), _grads(plain), strict=True):
        assert torch.equal(got, wanted)


def test_a_backward_that_failed_leaves_nothing_to_the_next() -> None:
    def fail() -> None:
        raise ArithmeticError("a gradient that cannot be")

    plain, put_off = _weights(), _weights()
    bad = Mark.apply(_passed([Mark.apply(put_off[0], fail), *put_off[1:]], 2), _deferred.begin)
    with pytest.raises(ArithmeticError):
        bad.backward()
    for w in put_off:
        w.main_grad.zero_()
    _passed(plain, 1).backward()
    Mark.apply(_passed(put_off, 1), _deferred.begin).backward()
    assert not _deferred._begun
    for got, wanted in zip(_grads(put_off), _grads(plain), strict=True):
        assert torch.equal(got, wanted)


def test_a_backward_of_another_thread_takes_nothing_from_this_one() -> None:
    plain, put_off, others = _weights(), _weights(), _weights()
    other = Mark.apply(_passed(others, 1), _deferred.begin)

    def beside() -> None:
        thread = threading.Thread(target=other.backward)
        thread.start()
        thread.join()

    for w in (plain, put_off):
        w[0] = Mark.apply(w[0], beside if w is put_off else lambda: None)
    _passed(plain, 1).backward()
    Mark.apply(_passed(put_off, 1), _deferred.begin).backward()
    for got, wanted in zip(_grads(put_off[1:]), _grads(plain[1:]), strict=True):
        assert torch.equal(got, wanted) and got.any()
    assert others[0].main_grad.any()


def test_an_output_that_is_asked_for_is_there() -> None:
    """`grouped_gemm_wgrad(out=)` is no backward: its caller reads at once."""
    offsets, rows = torch.tensor([0, 2, 2, 7]), torch.ones(7, H)
    out = torch.zeros(E, H, H)
    with _deferred.deferred(_deferred.Queue()) as queue:
        ops.grouped_gemm_wgrad(rows, rows, offsets, out=out)
    assert len(queue) == 0 and out.any()


def _layer(rank: int, mode: str) -> tuple[list[Tensor], list[str]]:
    """Gradients of a layer's experts, and in which order the way back was posted, they were
    computed and it was waited for."""
    mesh, said = Mesh(Layout(dp=2, ep=2), exchange_mode=mode), []
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6, H, generator=generator).requires_grad_()
    ids = torch.rand(6, 2 * E, generator=generator).topk(2).indices.int()
    weights = _weights()
    dispatcher = AllToAllDispatcher(mesh, 2 * E)
    rows, way = dispatcher.dispatch(x, ids, torch.rand(6, 2, generator=generator))
    y = ops.experts(rows, way.weights, *weights[:2], way.offsets)
    out = dispatcher.combine(y, way)
    wait, run, post = _SharedBack.wait, _deferred.Queue.run, type(way.way_back.exchange).post_back

    def marked(name, call):
        def wrapper(*args):
            said.append(name)
            return call(*args)

        return wrapper

    _SharedBack.wait = marked("wait", wait)
    _deferred.Queue.run = marked("dW", run)
    type(way.way_back.exchange).post_back = marked("post", post)
    try:
        out.square().sum().backward()
    finally:
        _SharedBack.wait, _deferred.Queue.run = wait, run
        type(way.way_back.exchange).post_back = post
    return [x.grad, *_grads(weights)[:2]], said


def test_weights_gradients_are_computed_under_the_way_back() -> None:
    shared = run_ranks(2, _layer, "shared")
    collective = run_ranks(2, _layer, "collective")
    for (got, said), (wanted, others) in zip(shared, collective, strict=True):
        assert all(map(torch.equal, got, wanted)) and got[1].any()
        assert said == ["post", "dW", "wait"] and others == ["post", "dW"]
