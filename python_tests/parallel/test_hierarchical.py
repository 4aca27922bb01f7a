"""An exchange in two levels: one copy of a token a node. Nodes are declared, as `Mesh` allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moekernels.cli import main
from moekernels.model import dispatch
from moekernels.model.layout import Layout
from moekernels.model.router import RouterSpec
from moekernels.model.spec import Place
from moekernels.nn.dispatcher import AllToAllDispatcher, HierarchicalDispatcher, make_dispatcher
from moekernels.nn.transformer import StageModel
from moekernels.ops import _deferred
from moekernels.parallel import expert
from moekernels.parallel.measure import border
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.plan.strategy import Strategy
from python_tests.support.activations import counted, measure, small
from python_tests.support.distributed import RankPool
from python_tests.support.layouts import TINY, micro_batches

EXPERTS, HIDDEN = 8, 6
NODES = {"two of two": (0, 0, 1, 1), "dealt in turn": (0, 1, 0, 1)}
KINDS = {"all_to_all": AllToAllDispatcher, "hierarchical": HierarchicalDispatcher}
SHAPES = {"ep4": Layout(dp=4, ep=4), "ep2 etp2": Layout(dp=4, ep=2, etp=2)}


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def routing(name: str, rank: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens = [5, 0, 9, 3][rank]
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    drawn = [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(drawn) if drawn else torch.zeros(0, top_k, dtype=torch.int64)
    if name == "one":  # everything to one expert: other ranks and nodes get nothing at all
        ids = torch.full_like(ids, -1)
        ids[:, 0] = 5
    elif name == "some":
        ids[::3] = -1
        ids[1::3, 0] = -1
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    weights = torch.where(ids >= 0, weights, 0).to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype), ids.int(), weights


def made(kind: str, layout: Layout, nodes: str, mode: str = "auto") -> tuple[Mesh, object]:
    mesh = Mesh(layout, nodes=Nodes(NODES[nodes]), exchange_mode=mode)
    return mesh, KINDS[kind](mesh, EXPERTS)


def there_and_back(mesh, dispatcher, x, ids, weights, kept=None) -> Tensor:
    """As experts that multiply by their number + 1, in etp shards of equal parts."""
    rows, way = dispatcher.dispatch(x, ids, weights, kept)
    each = dispatcher.local_experts
    first = mesh.ep_index * each
    of_row = (torch.arange(each) + first).repeat_interleave(way.offsets.diff())
    factor = (of_row + 1)[:, None] / mesh.layout.etp * way.weights.double()[:, None]
    return dispatcher.combine((rows * factor.to(rows.dtype)).contiguous(), way)


def _round_trip(rank, layout, nodes, name, top_k, dtype, mode="auto") -> dict[str, list[Tensor]]:
    found = {}
    for kind in KINDS:
        mesh, dispatcher = made(kind, SHAPES[layout], nodes, mode)
        x, ids, weights = routing(name, rank, top_k, dtype)
        x.requires_grad_()
        weights.requires_grad_()
        out = there_and_back(mesh, dispatcher, x, ids, weights)
        scale = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7)).to(dtype)
        (out * scale).sum().backward()
        found[kind] = [out.detach(), x.grad, weights.grad]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nodes", NODES)
def test_it_computes_what_the_flat_exchange_does(four: RankPool, nodes: str, dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.05)
    for name, top_k in (("all", 3), ("all", 1), ("all", EXPERTS), ("some", 3), ("one", 2)):
        for rank, found in enumerate(four.run(_round_trip, "ep4", nodes, name, top_k, dtype)):
            for flat, two in zip(found["all_to_all"], found["hierarchical"]):
                scale = flat.abs().max() if flat.numel() else 1.0
                error = (flat.double() - two.double()).abs().max() if flat.numel() else 0.0
                assert error <= tolerance * max(scale, 1), f"{name}, K {top_k}, rank {rank}"


@pytest.mark.parametrize("mode", ["auto", "collective"])
def test_it_repeats_bit_for_bit_and_knows_shards_of_experts(four: RankPool, mode: str) -> None:
    args = ("ep2 etp2", "two of two", "some", 3, torch.float32, mode)
    first, again = four.run(_round_trip, *args), four.run(_round_trip, *args)
    for a, b in zip(first, again):
        for flat, two, repeated in zip(a["all_to_all"], a["hierarchical"], b["hierarchical"]):
            assert torch.equal(two, repeated)
            torch.testing.assert_close(two, flat, rtol=1e-6, atol=1e-5)


def _replay(rank: int) -> tuple[bool, int]:
    """Whether a recomputed layer's output is the same, and what it sends over the border again."""
    mesh, dispatcher = made("hierarchical", SHAPES["ep4"], "two of two")
    x, ids, weights = routing("all", rank, 3, torch.float32)
    kept = expert.Kept()
    with kept.recording():
        first = there_and_back(mesh, dispatcher, x, ids, weights, kept)
    border.take()
    with kept.replay():
        again = there_and_back(mesh, dispatcher, x, ids, weights, kept)
    copies = border.take() / (HIDDEN * 4)
    return torch.equal(first, again), copies == int(copies)


def test_what_came_is_kept_for_a_recomputed_layer(four: RankPool) -> None:
    assert four.run(_replay) == [(True, True)] * 4


def _second_order(rank: int) -> list[Tensor]:
    found = []
    for kind in KINDS:
        mesh, dispatcher = made(kind, SHAPES["ep4"], "two of two")
        x, ids, weights = routing("some", rank, 3, torch.float64)
        x.requires_grad_()
        weights.requires_grad_()
        out = there_and_back(mesh, dispatcher, x, ids, weights)
        dx, dweights = torch.autograd.grad(out.square().sum(), (x, weights), create_graph=True)
        (dx.square().sum() + dweights.square().sum()).backward()
        found += [x.grad, weights.grad]
    return found


def test_a_gradient_of_its_gradient(four: RankPool) -> None:
    for dx, dweights, dx2, dweights2 in four.run(_second_order):
        torch.testing.assert_close(dx2, dx, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dweights2, dweights, rtol=1e-10, atol=1e-10)


def _model(rank: int, kind: str, parts: int, batches: list) -> list[Tensor]:
    mesh = Mesh(SHAPES["ep4"], nodes=Nodes(NODES["two of two"]))
    options = {"dispatcher": kind, "exchange_parts": parts, "dtype": torch.float64}
    model = StageModel(replace(TINY, top_k=3), mesh, range(1, 3), True, True, **options)
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
    model(batches[rank]).backward()
    return [p.main_grad if p.grad is None else p.grad for p in model.parameters()]


def test_a_model_of_it_whole_and_in_parts(four: RankPool) -> None:
    batches = micro_batches([[9], [5, 6], [8], [3]])
    flat = four.run(_model, "all_to_all", 1, batches)
    whole = four.run(_model, "hierarchical", 1, batches)
    parts = four.run(_model, "hierarchical", 2, batches)
    for rank in range(4):
        for a, b, c in zip(flat[rank], whole[rank], parts[rank]):
            assert torch.equal(b, c)
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


def _order(rank: int) -> list[str]:
    """What runs when in a backward: weights' gradients that were put off, and ways home."""
    seen: list[str] = []
    mesh, dispatcher = made("hierarchical", SHAPES["ep4"], "two of two")
    x, ids, weights = routing("all", rank, 3, torch.float64)
    x.requires_grad_()
    weights.requires_grad_()
    rows, way = dispatcher.dispatch(x, ids, weights)
    rows = _PutsOff.apply(rows, seen)
    out = dispatcher.combine(rows * way.weights[:, None], way)
    for plan, name in ((way.way_back[0].way_back, "node"), (way.way_back[1], "border")):
        plan.exchange = _Told(plan.exchange, name, seen)
    out.sum().backward()
    return seen


class _PutsOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, seen):
        ctx.seen = seen
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        _deferred.later(lambda: ctx.seen.append("weights"))
        return grad, None


class _Told:
    def __init__(self, exchange, name, seen):
        self.exchange, self.name, self.seen = exchange, name, seen

    def post_out(self, *args):
        return self.exchange.post_out(*args)

    def post_back(self, *args):
        self.seen.append(self.name)
        return self.exchange.post_back(*args)


def test_weights_gradients_run_under_the_way_over_the_border(four: RankPool) -> None:
    assert four.run(_order) == [["node", "border", "weights"]] * 4


def _sent(rank: int, kind: str, nodes: str, top_k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes over the border of a forward and a backward; rows and copies that have to cross."""
    mesh, dispatcher = made(kind, SHAPES["ep4"], nodes)
    x, ids, weights = routing("some", rank, top_k, dtype)
    x.requires_grad_()
    border.take()
    there_and_back(mesh, dispatcher, x, ids, weights).sum().backward()
    places = torch.tensor([mesh.nodes.of[r] for r in mesh.exchange.ranks])
    node_of = places[torch.arange(EXPERTS) // (EXPERTS // 4)]
    own = mesh.nodes.of[rank]
    met = [{int(node_of[e]) for e in token if e >= 0} - {own} for token in ids]
    rows = sum(int(node_of[e]) != own for token in ids for e in token if e >= 0)
    return border.take(), rows, sum(map(len, met))


@pytest.mark.parametrize(
    "dtype, width", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)]
)
@pytest.mark.parametrize("nodes", NODES)
def test_bytes_over_the_border_are_those_of_the_rows_that_cross(four, nodes, dtype, width) -> None:
    wide, k = max(4, width), 3
    sent, rows, _ = map(sum, zip(*four.run(_sent, "all_to_all", nodes, k, dtype)))
    numbers = 4 * 2 * EXPERTS // 4 * 8
    assert sent == rows * (4 * HIDDEN * width + 2 * wide) + numbers
    sent, _, copies = map(sum, zip(*four.run(_sent, "hierarchical", nodes, k, dtype)))
    assert 0 < copies < rows
    assert sent == copies * (4 * HIDDEN * width + 3 * k * wide) + 4 * 8


# ---- what the planner says of it


def spec(top_k: int, experts: int = 64) -> RouterSpec:
    return RouterSpec(d_model=1024, num_experts=experts, top_k=top_k)


@pytest.mark.parametrize(
    "nodes, top_k, rows, copies",
    [(2, 2, 1.0, 0.75), (2, 8, 4.0, 1.0), (4, 2, 1.5, 1.31), (4, 8, 6.0, 2.7)],
)
def test_copies_to_other_nodes_a_token(nodes, top_k, rows, copies) -> None:
    assert top_k * (1 - 1 / nodes) == rows
    found = dispatch.nodes_met(spec(top_k, 4096), nodes) * (1 - 1 / nodes)
    assert found == pytest.approx(copies, abs=0.01)


def test_auto_takes_it_where_it_saves_a_third() -> None:
    layout = Layout(dp=16, ep=16)
    assert dispatch.choose("auto", spec(8), layout, nodes=2) == "hierarchical"
    assert dispatch.choose("auto", spec(2), layout, nodes=2) == "all_to_all"
    assert dispatch.choose("auto", spec(8), layout) == "all_to_all"
    assert dispatch.choose("auto", spec(8), Layout(dp=4, ep=4), nodes=2) == "hierarchical"
    assert dispatch.choose("auto", spec(8), Layout(dp=4, ep=4)) == "all_gather"


def test_the_planner_refuses_it_on_one_node(capsys) -> None:
    assert main(["plan", "--preset", "tiny", "--gpus", "8", "--dispatcher", "hierarchical"]) == 2
    assert "8 cards are of one with 8; give all_to_all, or more --gpus" in capsys.readouterr().err


def _choices(rank: int) -> list[str]:
    found = []
    for nodes in ((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 2, 3)):
        mesh = Mesh(SHAPES["ep4"], nodes=Nodes(nodes))
        found.append(mesh.flat)
        try:
            kind = make_dispatcher("hierarchical", mesh, spec(2))
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(type(kind).__name__)
        found.append(type(make_dispatcher("auto", mesh, spec(4))).__name__)
    shards = Mesh(Layout(dp=4, etp=4), nodes=Nodes((0, 0, 1, 1)))
    return [*found, shards.flat]


def test_where_nodes_do_not_fit_it_is_refused_by_name(four: RankPool) -> None:
    for said in four.run(_choices):
        assert said[1] == (
            "--dispatcher hierarchical: ranks that exchange rows are of one node; give all_to_all"
        )
        assert said[3] == "nodes hold different numbers of the ranks that exchange rows"
        assert said[3] in said[4]
        assert said[2] == said[5] == "AllToAllDispatcher"
        assert said[6:9] == ["", "HierarchicalDispatcher", "HierarchicalDispatcher"]
        assert said[9] == "ranks that exchange rows are alone on their nodes"
        assert said[12] == "an expert's etp shards lie on several nodes"


def test_the_planner_knows_every_byte(four: RankPool) -> None:
    """Where a token chooses all experts nothing is left to chance."""
    tokens = {rank: 4 for rank in range(4)}
    for kind in KINDS:
        for sent, *_ in four.run(_all_chosen, kind, tokens[0]):
            at = Place(SHAPES["ep4"], 4.0, "bf16", kind, nodes=2)
            one = RouterSpec(d_model=HIDDEN, num_experts=EXPERTS, top_k=EXPERTS)
            assert sent == sum(dispatch.WAYS[kind].border(one, at))


def _all_chosen(rank: int, kind: str, tokens: int) -> tuple[int]:
    mesh, dispatcher = made(kind, SHAPES["ep4"], "two of two")
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(EXPERTS, dtype=torch.int32).repeat(tokens, 1)
    border.take()
    there_and_back(mesh, dispatcher, x, ids, torch.ones(tokens, EXPERTS)).sum().backward()
    return (border.take(),)


def _memory(rank: int, kind: str, dtype: str, again: bool) -> tuple:
    model = replace(small(), top_k=8)  # of 8 experts
    mesh = Mesh(SHAPES["ep4"], nodes=Nodes(NODES["two of two"]))
    found = measure(model, mesh, 2, False, False, dtype, 512, (1, 2) * again, kind)
    s = Strategy(SHAPES["ep4"], (2,), (2 * again,), 1, dtype=dtype, dispatcher=kind, nodes=2)
    return found, counted(model, s, 512, False, False)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_planner_knows_what_it_keeps(four: RankPool, kind: str, again: bool) -> None:
    for found, said in four.run(_memory, kind, "bf16", again):
        assert said == pytest.approx(found, rel=3e-3)
