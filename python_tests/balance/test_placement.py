"""Where experts are put: on recorded loads, on planted groups, on hostile numbers."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from moekernels.balance import placement
from moekernels.errors import UsageError

# Loads of the last steps of a run of the default preset: 16 layers of 64 experts.
RECORDED = torch.tensor(
    json.loads((Path(__file__).parent / "recorded_loads.json").read_text()), dtype=torch.float64
)


def uneven(loads, rank_of, ranks):
    """Busiest rank over the mean; every rank holds equally many."""
    assert rank_of.bincount(minlength=ranks).tolist() == [len(loads) // ranks] * ranks
    sums = torch.zeros(ranks, dtype=torch.float64).index_add_(0, rank_of, loads.double())
    return (sums.max() / sums.mean()).item()


@pytest.mark.parametrize("ranks", (2, 4, 8, 16))
@pytest.mark.parametrize("start", ("scratch", "neighbours"))
def test_recorded_loads_lie_evenly(ranks, start):
    began = placement.unmoved(*RECORDED.shape)
    neighbours = placement.rank_loads(RECORDED, began, ranks)
    slots = None if start == "scratch" else began[0]
    solved = [placement.solve(layer, [0] * ranks, slot_of=slots) for layer in RECORDED]
    after = [uneven(layer, rank_of, ranks) for layer, rank_of in zip(RECORDED, solved)]
    assert max(after) <= 1.005
    assert (neighbours.amax(1) / neighbours.mean(1)).mean() > 1.03


@pytest.mark.parametrize("seed", range(3))
def test_as_good_as_any(seed):
    """Against every way to lay eight experts on two ranks, by load and by nodes."""
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randint(1, 100, (8,), generator=generator).double()
    pairs = torch.randint(0, 9, (8, 8), generator=generator).double()
    pairs = (pairs + pairs.T).fill_diagonal_(50)
    price = 2 / pairs.diagonal().sum()

    def cost(half):
        rank_of = torch.tensor([x in half for x in range(8)]).long()
        apart = rank_of[:, None] != rank_of
        return uneven(loads, rank_of, 2) + price * pairs[apart].sum() / 2

    rank_of = placement.solve(loads, [0, 1], pairs, beta=1.0)
    best = min(cost(set(half)) for half in combinations(range(8), 4))
    assert cost(set(rank_of.nonzero()[:, 0].tolist())) <= best * 1.02
    alone = min(
        uneven(loads, torch.tensor([x in half for x in range(8)]).long(), 2)
        for half in combinations(range(8), 4)
    )
    assert uneven(loads, placement.solve(loads, [0, 0]), 2) == pytest.approx(alone, rel=1e-2)


def planted(experts, nodes, top_k, tokens, stray, seed=0):
    """ids [T, K] of tokens that draw from one group of experts, but for a share that strays; the
    groups' node of each expert [E]. Groups are scattered over the numbers."""
    generator = torch.Generator().manual_seed(seed)
    group_of = torch.arange(experts) % nodes
    group_of = group_of[torch.randperm(experts, generator=generator)]
    popular = torch.rand(experts, generator=generator) + 0.5
    mine = torch.randint(nodes, (tokens,), generator=generator)
    weights = popular * torch.where(group_of == mine[:, None], 1.0, stray / nodes)
    return torch.multinomial(weights, top_k, generator=generator), group_of


def nodes_a_token(ids, node_of):
    lies = node_of[ids]
    return torch.stack([(lies == n).any(1) for n in range(max(node_of) + 1)]).sum(0).double().mean()


@pytest.mark.parametrize("start", ("scratch", "neighbours"))
@pytest.mark.parametrize("top_k, stray", ((2, 0.1), (2, 0.4), (8, 0.2)))
def test_planted_groups_share_a_node(top_k, stray, start):
    experts, nodes, ranks = 64, 4, 16
    ids, group_of = planted(experts, nodes, top_k, 4000, stray)
    chosen = torch.nn.functional.one_hot(ids, experts).sum(1).double()
    pairs, loads = chosen.T @ chosen, chosen.sum(0)
    node_of = [rank * nodes // ranks for rank in range(ranks)]
    slots = None if start == "scratch" else torch.arange(experts)
    rank_of = placement.solve(loads, node_of, pairs, slot_of=slots)
    found = nodes_a_token(ids, torch.tensor(node_of)[rank_of])
    assert found <= 1.05 * nodes_a_token(ids, group_of)
    assert found < 0.9 * nodes_a_token(ids, torch.arange(experts) * nodes // experts)
    assert uneven(loads, rank_of, ranks) < 1.1
    unknown = placement.solve(loads, node_of, pairs, beta=0.0)  # nodes cost nothing
    assert uneven(loads, unknown, ranks) <= 1.005


def test_many_experts_on_many_nodes():
    experts, nodes, ranks = 512, 8, 64
    ids, group_of = planted(experts, nodes, 8, 4000, 0.2)
    chosen = torch.nn.functional.one_hot(ids, experts).sum(1).double()
    node_of = torch.arange(ranks) * nodes // ranks
    rank_of = placement.solve(chosen.sum(0), node_of.tolist(), chosen.T @ chosen)
    assert nodes_a_token(ids, node_of[rank_of]) <= 1.05 * nodes_a_token(ids, group_of)


def test_hostile_loads():
    for loads in ([0.0] * 8, [1e300] * 8, [0.0] * 7 + [1.0], [5e-324] * 8):
        for ranks in (1, 2, 4, 8):
            rank_of = placement.solve(torch.tensor(loads, dtype=torch.float64), [0] * ranks)
            assert rank_of.bincount().tolist() == [8 // ranks] * ranks
    silent = placement.solve(torch.ones(4), [0, 1], torch.zeros(4, 4))
    assert silent.bincount().tolist() == [2, 2]


def test_nodes_of_unequal_size():
    """Three ranks on one node, one on another: cardinality and balance hold for ranks."""
    loads = RECORDED[0]
    pairs = torch.outer(loads, loads)
    rank_of = placement.solve(loads, [0, 0, 0, 1], pairs, beta=1e-6)
    assert uneven(loads, rank_of, 4) <= 1.005


def test_who_stays_keeps_its_slot():
    before = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    ranks = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    after = placement.put(ranks, before, 2)
    assert sorted(after.tolist()) == list(range(8))
    assert (after // 4).tolist() == ranks.tolist()
    stays = before // 4 == ranks
    assert torch.equal(after[stays], before[stays])
    assert after[torch.tensor([5, 7])].tolist() == [0, 2]  # the free slots, in order
    assert torch.equal(placement.put(before // 4, before, 2), before)
    with pytest.raises(UsageError, match="not 4 experts on each of 2 ranks"):
        placement.put(torch.tensor([0] * 5 + [1] * 3), before, 2)


def test_a_rank_counts_what_lies_on_it():
    loads = torch.tensor([[5, 1, 2, 4]])
    assert placement.rank_loads(loads, torch.tensor([[0, 1, 2, 3]]), 2).tolist() == [[6, 6]]
    assert placement.rank_loads(loads, torch.tensor([[0, 2, 3, 1]]), 2).tolist() == [[9, 3]]


@pytest.mark.parametrize(
    "value", (None, [[0, 1]], [[0, 1, 1], [0, 1, 2]], [[0, 1, 2], [0, 1, "2"]], [[0, 1, 2]] * 3)
)
def test_a_foreign_placement_is_refused(value):
    with pytest.raises(UsageError, match="not one of 2 layers with 3 experts"):
        placement.from_facts(value, 2, 3, "step-1")


def test_a_told_placement_is_read():
    assert placement.from_facts([[2, 0, 1]], 1, 3, "step-1").tolist() == [[2, 0, 1]]


def test_bad_problems_are_one_line():
    with pytest.raises(UsageError, match="3 ranks do not divide 8 experts"):
        placement.solve(torch.ones(8), [0, 0, 0])
    with pytest.raises(UsageError, match="numbered from 0 without a gap"):
        placement.solve(torch.ones(8), [0, 2])


def test_nodes_of_an_exchange():
    node_of = [7, 7, 3, 3, 7, 7, 3, 3]
    assert placement.nodes_of_exchange(node_of, range(4), 1) == [0, 0, 1, 1]
    assert placement.nodes_of_exchange(node_of, range(2, 6), 2) == [0, 1]
