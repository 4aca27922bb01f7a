"""An exchange in parts has the bits of one piece, and its rows travel while experts compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.dispatcher import AllToAllDispatcher
from moekernels.nn.experts import Experts
from moekernels.nn.home import Home
from moekernels.parallel.measure import Stamps
from moekernels.parallel.mesh import Mesh
from python_tests.support.distributed import RankPool

EXPERTS, HIDDEN = 12, 16


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def _layer(mesh: Mesh, parts: int, dtype: torch.dtype, lifted: bool, main_grads: bool = True):
    spec = DecoderSpec(
        d_model=HIDDEN,
        num_experts=EXPERTS,
        top_k=3,
        expert_d_in=24 if lifted else 0,
        expert_d_ff=20,
        init_std=0.3,
    )
    experts = Experts(spec, mesh, Home(dtype, seed=3), name="experts")
    for p in experts.parameters():
        if main_grads:
            p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    return experts, AllToAllDispatcher(mesh, EXPERTS, 5, parts)


def _inputs(rank: int, routed: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if routed == "none on one" and rank else 7 + 4 * rank
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(3, dim=1).indices.int()
    if routed == "one expert":
        ids[:, 1:], ids[:, 0] = -1, 4
    weights = torch.rand(tokens, 3, generator=generator).requires_grad_()
    return x, ids, weights


def _pass(mesh, parts, dtype, lifted, given, main_grads=True) -> list[Tensor]:
    experts, dispatcher = _layer(mesh, parts, dtype, lifted, main_grads)
    x, ids, weights = given
    x.grad = weights.grad = None
    for _ in range(2):  # main gradients accumulate
        if parts > 1:
            y = dispatcher.in_parts(x, ids, weights, experts)
        else:
            rows, routing = dispatcher.dispatch(x, ids, weights)
            y = dispatcher.combine(experts(rows, routing), routing)
        y.backward(torch.arange(y.numel()).view_as(y).to(dtype) / 7)
    grads = [p.main_grad if main_grads else p.grad for p in experts.parameters()]
    return [y.detach(), x.grad.clone(), weights.grad.clone(), *grads]


def _bits(rank: int, mode: str) -> list[str]:
    mesh, different = Mesh(Layout(dp=2, ep=2), exchange_mode=mode), []
    for dtype in (torch.float32, torch.bfloat16):
        for lifted in (False, True):
            for routed in ("any", "one expert", "none on one"):
                given = _inputs(rank, routed, dtype)
                wanted = _pass(mesh, 1, dtype, lifted, given)
                for parts in (2, 4, 6):
                    got = _pass(mesh, parts, dtype, lifted, given)
                    if not all(map(torch.equal, got, wanted)):
                        different.append(f"{routed}, {parts} parts, {dtype}, lifted {lifted}")
    plain = _pass(mesh, 1, torch.float32, True, given := _inputs(rank, "any", torch.float32), False)
    if not all(map(torch.equal, _pass(mesh, 3, torch.float32, True, given, False), plain)):
        different.append("without main gradients")
    return different


@pytest.mark.parametrize("mode", ["shared", "collective"])
def test_the_bits_of_one_piece(two: RankPool, mode: str) -> None:
    assert two.run(_bits, mode) == [[], []]


def _second(rank: int) -> str:
    mesh = Mesh(Layout(dp=2, ep=2))
    experts, dispatcher = _layer(mesh, 2, torch.float32, False, False)
    x, ids, weights = _inputs(rank, "any", torch.float32)
    y = dispatcher.in_parts(x, ids, weights, experts)
    with pytest.raises(RuntimeError) as said:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    return str(said.value)


def test_a_second_derivative_is_refused_by_name() -> None:
    with RankPool(2) as pool:
        for said in pool.run(_second):
            assert said == (
                "a gradient of a gradient is not computed through an exchange in parts; "
                "--exchange-parts 1 has it"
            )


def _alone_without_gradients(rank: int) -> bool:
    mesh = Mesh(Layout(dp=2, ep=2))
    experts, dispatcher = _layer(mesh, 3, torch.float32, False)
    x, ids, weights = (t.detach() for t in _inputs(rank, "any", torch.float32))
    for p in experts.parameters():
        p.requires_grad_(False)
    rows, routing = dispatcher.dispatch(x, ids, weights)
    wanted = dispatcher.combine(experts(rows, routing), routing)
    got = dispatcher.in_parts(x, ids, weights, experts)
    return torch.equal(got, wanted) and not got.requires_grad


def test_without_gradients(two: RankPool) -> None:
    assert all(two.run(_alone_without_gradients))


def _stamps(rank: int) -> list[Stamps]:
    mesh = Mesh(Layout(dp=2, ep=2))
    _pass(mesh, 2, torch.float32, False, _inputs(rank, "any", torch.float32))
    return [Stamps(*s) for s in mesh.exchange.memory.host.take_stamps()]


def test_rows_are_given_away_before_others_are_asked_for(two: RankPool) -> None:
    """Both parts of a dispatch at once, and a part's results before the next part's rows are
    waited for; in backward the same, from the last part to the first."""
    for stamps in two.run(_stamps):
        there, back, grads_there, grads_back = (stamps[i : i + 2] for i in (0, 2, 4, 6))
        for way, pair in enumerate((there, back, grads_there, grads_back)):
            assert [s.label for s in pair] == [4 * 5 + way] * 2  # of layer 5
        for out, home in ((there, back), (grads_there, grads_back)):
            assert max(s.post for s in out) <= min(s.need for s in out)
            posted = min(s.post for s in home)
            assert out[0].need <= posted <= out[1].need
