"""The exchange: rows arrive at their experts with their weights, and everything comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moekernels.model.layout import Layout
from moekernels.model.router import RouterSpec
from moekernels.nn.dispatcher import AllGatherDispatcher, AllToAllDispatcher, make_dispatcher
from moekernels.parallel import expert, tensor
from moekernels.parallel.mesh import Mesh
from python_tests.support.distributed import RankPool

HIDDEN = 6
LAYOUTS = {"ep3": Layout(dp=3, ep=3), "etp3": Layout(dp=3, etp=3), "tp3 ep3": Layout(tp=3, ep=3)}
KINDS = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    with RankPool(3) as pool:
        yield pool


def routing(name: str, rank: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K] among 6 experts and weights [T, K]; T differs by rank where the layout
    allows.
    """
    generator = torch.Generator().manual_seed(rank)
    tokens = 8 if name in ("tp", "one") else [5, 9, 2][rank]
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(6, generator=generator)[:top_k] for _ in range(tokens)])
    if name == "one":  # everything to one expert: other ranks get nothing at all
        ids = torch.full_like(ids, -1)
        ids[:, 0] = 4
    elif name == "none":
        ids = torch.full_like(ids, -1)
    elif name == "some":
        ids[::3] = -1
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    weights = torch.where(ids >= 0, weights, 0).to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype), ids.int(), weights


def scale_of(experts: Tensor) -> Tensor:
    """What expert number e multiplies its rows by."""
    return (experts + 1).double()


def _round_trip(
    rank: int, layout: Layout, kind: str, name: str, top_k: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    mesh = Mesh(layout)
    x, ids, weights = routing(name, rank, top_k, dtype)
    x.requires_grad_()
    weights.requires_grad_()
    dispatcher = KINDS[kind](mesh, 6)
    rows, way = dispatcher.dispatch(x, ids, weights)
    if way.token_of is not None:
        rows = rows[way.token_of.clamp_min(0).long()]
    local = torch.arange(dispatcher.local_experts) + mesh.ep_index * dispatcher.local_experts
    of_row = local.repeat_interleave(way.offsets.diff(), output_size=rows.shape[0])
    # A linear expert in etp shards of equal thirds, say: together they are the whole.
    factor = scale_of(of_row)[:, None] / layout.etp * way.weights.double()[:, None]
    out = dispatcher.combine((rows * factor.to(dtype)).contiguous(), way)
    out.backward(torch.ones_like(out))
    return {"out": out.detach(), "dx": x.grad, "dweights": weights.grad}


CASES = [
    *((layout, routed) for layout in ("ep3", "etp3") for routed in ("all", "some", "one", "none")),
    ("tp3 ep3", "tp"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(three: RankPool, kind: str, dtype: torch.dtype) -> None:
    for layout, routed in CASES:
        round_trip(three, layout, kind, routed, dtype)


def round_trip(pool: RankPool, layout: str, kind: str, routed: str, dtype: torch.dtype) -> None:
    """Every rank gets what it would have computed itself."""
    results = pool.run(_round_trip, LAYOUTS[layout], kind, routed, 2, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    for rank, result in enumerate(results):
        x, ids, weights = routing(routed, rank, 2, dtype)
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        factor = torch.where(ids >= 0, scale_of(ids), 0) * weights
        out = x * factor.sum(1, keepdim=True)
        out.sum().backward()
        wanted = {"out": out.detach(), "dx": x.grad, "dweights": weights.grad}
        for key, value in wanted.items():
            torch.testing.assert_close(
                result[key].double(), value, rtol=tolerance, atol=tolerance * 10
            )


def _count_messages(rank: int, kind: str) -> tuple[int, int]:
    """How many collectives a layer's forward and backward take."""
    calls = 0
    whole = tensor.post_all_to_all

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return whole(*args, **kwargs)

    tensor.post_all_to_all = counted
    try:
        mesh = Mesh(Layout(dp=3, ep=3), exchange_mode="collective")
        x, ids, weights = routing("all", rank, 2, torch.float32)
        x.requires_grad_()
        dispatcher = KINDS[kind](mesh, 6)
        rows, way = dispatcher.dispatch(x, ids, weights)
        out = dispatcher.combine(rows * way.weights[:, None], way)
        forward = calls
        out.sum().backward()
    finally:
        tensor.post_all_to_all = whole
    return forward, calls - forward


def test_one_message_a_direction(three: RankPool) -> None:
    assert set(three.run(_count_messages, "all_to_all")) == {
        (3, 2)
    }  # counts, there, back; back, there


def _replay(rank: int, kind: str, mode: str) -> bool:
    mesh = Mesh(Layout(dp=3, ep=3), exchange_mode=mode)
    x, ids, weights = routing("all", rank, 3, torch.float32)
    dispatcher, kept = KINDS[kind](mesh, 6), expert.Kept()
    with kept.recording():
        rows, way = dispatcher.dispatch(x, ids, weights, kept)
    before = mesh.exchange
    dispatcher.group = None  # nobody can be met now
    with kept.replay():
        again, way_again = dispatcher.dispatch(x, ids, weights, kept)
    dispatcher.group = before
    return torch.equal(rows, again) and torch.equal(way.weights, way_again.weights)


@pytest.mark.parametrize("mode", ["shared", "collective"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_exchange_brought_is_kept_for_recomputation(
    three: RankPool, kind: str, mode: str
) -> None:
    assert all(three.run(_replay, kind, mode))


def choices(top_k: int) -> RouterSpec:
    return RouterSpec(num_experts=6, top_k=top_k)


def _kinds(rank: int) -> list[str]:
    mesh, alone = Mesh(Layout(dp=3, ep=3)), Mesh(Layout(dp=3))
    made = [
        make_dispatcher("auto", mesh, choices(3)),
        make_dispatcher("auto", mesh, choices(4)),
        make_dispatcher("all_gather", mesh, choices(1)),
        make_dispatcher("all_to_all", alone, choices(1)),
    ]
    return [type(one).__name__ for one in made]


def test_more_choices_than_peers_take_the_all_gather(three: RankPool) -> None:
    assert three.run(_kinds)[0] == [
        "AllToAllDispatcher",
        "AllGatherDispatcher",
        "AllGatherDispatcher",
        "LocalDispatcher",
    ]
