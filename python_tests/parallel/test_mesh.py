"""Both factorisations of a world, and what is said where a layout does not divide."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import Nodes
from python_tests.support.distributed import run_ranks
from python_tests.support.layouts import TINY, assemble, micro_batches, run_model

GROUPS = ("world", "stage", "tp", "dp", "pp", "exchange", "edp", "expert_copies")
SMALL = st.sampled_from([1, 2, 3, 4])


def ranks_of(layout: Layout, rank: int) -> dict[str, tuple[int, ...]]:
    """Every group of a rank, without torch.distributed."""
    mesh = Mesh.__new__(Mesh)
    mesh.layout, mesh.rank, mesh.order = layout, rank, tuple(range(layout.world))
    mesh._made, mesh.nodes = AllGroups(), Nodes((0,) * layout.world)
    mesh._place(ends=True)
    return {name: getattr(mesh, name).ranks for name in (*GROUPS, "ends")}


class AllGroups(dict):
    """Says of every group that it is made already."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> None:
        return None


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL, SMALL, SMALL, SMALL)
def test_groups_factor_the_world(tp: int, dp: int, pp: int, ep: int, etp: int) -> None:
    if tp * dp % (ep * etp):
        with pytest.raises(UsageError):
            Layout(tp, dp, pp, ep, etp)
        return
    layout = Layout(tp, dp, pp, ep, etp)
    sizes = {
        "world": tp * dp * pp,
        "stage": tp * dp,
        "tp": tp,
        "dp": dp,
        "pp": pp,
        "exchange": ep * etp,
        "edp": layout.edp,
        "expert_copies": layout.edp * etp,
    }
    of_rank = [ranks_of(layout, rank) for rank in range(layout.world)]
    for name, size in sizes.items():
        for rank, groups in enumerate(of_rank):
            assert len(groups[name]) == size and rank in groups[name]
            assert all(of_rank[other][name] == groups[name] for other in groups[name])
    for rank, groups in enumerate(of_rank):
        outer = {layout.rank_of(p, d, rank % tp) for p in (0, pp - 1) for d in range(dp)}
        assert set(groups["ends"]) == (outer if rank in outer else set(groups["dp"]))
        assert set(groups["tp"]) & set(groups["dp"]) & set(groups["pp"])
        assert len(set(groups["tp"]) & set(groups["dp"])) == 1
        assert len(set(groups["exchange"]) & set(groups["edp"])) == 1
        assert groups["tp"] == tuple(range(groups["tp"][0], groups["tp"][0] + tp))
        first = groups["exchange"][0]
        assert groups["exchange"] == tuple(range(first, first + ep * etp))


def test_rank_order_is_tp_then_dp_then_pp() -> None:
    layout = Layout(tp=2, dp=3, pp=2)
    order = [layout.rank_of(p, d, t) for p in range(2) for d in range(3) for t in range(2)]
    assert order == list(range(12))


def test_one_process_needs_no_process_group() -> None:
    mesh = Mesh(Layout())
    assert all(getattr(mesh, name) == Group(None, 0, 1, (0,)) for name in GROUPS)


def _mesh_facts(rank: int) -> dict:
    mesh = Mesh(Layout(tp=2, dp=2, ep=2, etp=2))
    return {
        "indices": (mesh.pp_index, mesh.dp_index, mesh.tp_index, mesh.ep_index, mesh.etp_index),
        "none": [name for name in GROUPS if getattr(mesh, name).process_group is None],
        "shared": mesh.stage.process_group is mesh.exchange.process_group,
        "alike": mesh.tokens_alike,
    }


def test_mesh_on_ranks() -> None:
    facts = run_ranks(4, _mesh_facts)
    assert [f["indices"] for f in facts] == [
        (0, 0, 0, 0, 0), (0, 0, 1, 0, 1), (0, 1, 0, 1, 0), (0, 1, 1, 1, 1)
    ]  # fmt: skip
    assert facts[0]["none"] == ["pp", "edp"]
    assert all(f["shared"] and not f["alike"] for f in facts)


def test_describe_shows_both_factorisations() -> None:
    dense, experts = Layout(tp=2, dp=4, pp=4, ep=8).describe().splitlines()
    assert "32 ranks = tp 2 x dp 4 x pp 4" in dense
    assert "32 ranks = etp 1 x ep 8 x edp 1 x pp 4" in experts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(tp=0), "tp is 0; use an integer of at least 1"),
        (lambda: Layout(tp=4, ep=3), "use ep 1, 2 or 4 with etp 1"),
        (lambda: Layout(tp=2, etp=4), "use etp 1 or 2 with ep 1"),
        (lambda: Layout(dp=2, ep=4, etp=3), "use a product of 1 or 2"),
        (lambda: Layout(dp=4, ep=4).validate(num_experts=6), "use ep 1, 2, 3 or 6"),
        (lambda: Layout(pp=4).validate(num_layers=6), "use pp 1, 2, 3 or 6"),
        (
            lambda: Layout(pp=2).validate(num_layers=6, virtual_stages=2),
            "pp 2 x 2 virtual stages does not divide 6 layers; use pp 1 or 3",
        ),
        (lambda: Layout(tp=3).validate(num_heads=4), "tp 3 does not divide 4 attention heads"),
        (lambda: Layout(tp=4).validate(num_kv_heads=2), "4 does not divide 2 key-value heads"),
        (lambda: Layout(dp=2, etp=2).validate(d_ff=3), "use etp 1 or 3"),
        (lambda: Layout(tp=2, pp=2).validate(world=8), "8 were started; use dp 2"),
        (lambda: Layout(tp=2, pp=2).validate(world=6), "6 were started; use 4 ranks"),
        (lambda: Layout(tp=8).validate(vocab_size=5), "use tp 5 or less"),
    ],
)
def test_layouts_that_do_not_divide_say_what_would(make, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        make()


def test_neighbours_share_a_node_however_ranks_are_dealt():
    """Eight ranks dealt to two nodes in turn: tensor parallel and the exchange stay inside."""
    nodes = Nodes((0, 1) * 4)
    layout = Layout(tp=2, dp=2, pp=2, ep=4)
    mesh = Mesh.__new__(Mesh)
    mesh.layout, mesh.nodes, mesh.order, mesh._made = layout, nodes, nodes.order(), AllGroups()
    for mesh.rank in range(8):
        mesh._place(ends=False)
        assert mesh.rank in mesh.tp.ranks and mesh.tp.ranks[mesh.tp_index] == mesh.rank
        assert mesh.exchange.ranks[mesh.ep_index] == mesh.rank
        assert mesh.pp.ranks[mesh.pp_index] == mesh.rank == mesh.world.rank
    assert [mesh.across(name) for name in ("tp", "exchange", "stage", "pp", "world")] == [
        0, 0, 0, 4, 1,
    ]  # fmt: skip
    mesh.layout = Layout(tp=2, dp=4, ep=8)
    mesh._place(ends=False)
    assert mesh.across("exchange") == 1 and mesh.across("tp") == 0
    assert (mesh.inside.ranks, mesh.rail.ranks) == ((1, 3, 5, 7), (6, 7)) and not mesh.flat


def dealt_in_turn(rank, layout, batches, config):
    nodes = Nodes(tuple(r % 2 for r in range(layout.world)))
    with patch("moekernels.parallel.mesh.Nodes.named", lambda names: nodes):
        result = run_model(layout, config, batches, {"dtype": torch.float64})
    return result


@pytest.mark.parametrize("layout", (Layout(tp=2, dp=2, ep=4), Layout(tp=2, dp=2, ep=2)), ids=str)
def test_ranks_that_are_dealt_in_turn_compute_the_same(layout):
    """Their groups are not in the order of ranks."""
    batches = micro_batches([[9, 7], [12], [5, 6], [8]])
    one = run_model(Layout(), TINY, batches, {"dtype": torch.float64})
    many = run_ranks(layout.world, dealt_in_turn, layout, batches, TINY)
    loss = sum(r["loss"] for r in many if r["tp_index"] == 0)
    torch.testing.assert_close(loss, one["loss"], rtol=1e-12, atol=0)
    whole = assemble(many, "gradients")
    for name, (gradient, _) in one["gradients"].items():
        torch.testing.assert_close(whole[name], gradient, rtol=1e-9, atol=1e-12)
