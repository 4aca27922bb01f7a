"""Copies of hot experts: where placement cannot help, evenly, and always to the same places."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from moekernels.balance import placement, replicas
from moekernels.balance.replan import LEAST
from moekernels.balance.replicas import LANES, Copy
from moekernels.errors import UsageError

RECORDED = Path(__file__).with_name("recorded_loads.json")


def drawn(seed, experts, ranks):
    """Steep loads [E] and a placement [E]."""
    generator = torch.Generator().manual_seed(seed)
    loads = (1000 * torch.rand(experts, generator=generator) ** 4).round()
    return loads, torch.randperm(experts, generator=generator)


@pytest.mark.parametrize("ranks, each", [(2, 1), (4, 1), (8, 1), (8, 2), (16, 4)])
@pytest.mark.parametrize("spare", [1, 3])
def test_copies_even_the_ranks(ranks, each, spare):
    units = replicas.units_of(ranks)
    for seed in range(8):
        loads, slot_of = drawn(seed, ranks * each, ranks)
        copies = replicas.choose(loads, slot_of, ranks, min(spare, (ranks - 1) * each), units)
        owner = slot_of // each
        assert all(owner[c.expert] != c.rank and c.units > 0 for c in copies)
        assert len({(c.rank, c.place) for c in copies}) == len(copies)
        assert len({(c.rank, c.expert) for c in copies}) == len(copies)
        assert all(c.place < spare for c in copies)
        given = Counter()
        for c in copies:
            given[c.expert] += c.units
        assert all(n <= units for n in given.values())
        mean = loads.sum() / ranks
        without, rows = (
            replicas.rank_loads(loads, slot_of, ranks, some, units) for some in ((), copies)
        )
        torch.testing.assert_close(rows.sum(), loads.double().sum())
        assert rows.min() >= -1e-9 and rows.max() <= without.max()
        if spare == 3:  # room enough: what is left over is less than a unit
            unit = loads.max() / units
            assert rows.max() <= mean * (1 + LEAST) + unit


def test_recorded_loads_need_none_but_with_an_expert_a_rank():
    """Decided by the hottest expert over a rank's mean; ours has 2.2 of an expert's mean."""
    recorded = torch.tensor(json.loads(RECORDED.read_text()), dtype=torch.float64)
    slots = placement.unmoved(*recorded.shape)
    for ranks in (2, 4, 8, 16):
        for row, slot_of in zip(recorded, slots):
            assert replicas.placement_suffices(row, ranks)
            units = replicas.units_of(ranks)
            assert replicas.better(row, slot_of, ranks, 1, units, ()) == []
    alone = recorded.shape[1]
    units = replicas.units_of(alone)
    for row, slot_of in zip(recorded, slots):
        copies = replicas.better(row, slot_of, alone, 1, units, ())
        rows = replicas.rank_loads(row, slot_of, alone, copies, units)
        was = row.max() / row.mean()
        assert copies and rows.max() / rows.mean() < 1 + (was - 1) / 4


def test_what_is_copied_stays_until_another_choice_is_better():
    slot_of, units = torch.arange(4), replicas.units_of(4)
    loads = torch.tensor([700.0, 100, 100, 100])
    now = replicas.better(loads, slot_of, 4, 1, units, ())
    assert {c.expert for c in now} == {0} and {c.rank for c in now} == {1, 2, 3}
    assert replicas.better(loads * 3 + 1, slot_of, 4, 1, units, now) == now
    other = replicas.better(loads.flip(0), slot_of, 4, 1, units, now)
    assert {c.expert for c in other} == {3}
    even = torch.full((4,), 250.0)
    assert replicas.better(even, slot_of, 4, 1, units, now) == []
    # Just above a rank's mean: none begins, but one that is there may stay.
    little = torch.tensor([253.0, 249, 249, 249])
    assert replicas.better(little, slot_of, 4, 1, units, ()) == []
    few = [Copy(0, 1, 0, 1)]
    assert replicas.better(little, slot_of, 4, 1, units, few) == few
    assert replicas.better(torch.zeros(4), slot_of, 4, 1, units, now) == []


@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize("nodes", [[0, 0, 0, 0], [0, 0, 1, 1]], ids=str)
def test_rows_go_to_a_copy_as_its_share_says_the_nearest_first(etp, nodes):
    ranks, each, spare = 4, 2, 2
    slot_of = torch.tensor([5, 0, 1, 2, 3, 4, 6, 7])  # expert 0 lies on rank 2
    units = replicas.units_of(ranks * etp)
    copies = [Copy(0, 1, 0, units // 2), Copy(0, 3, 1, units // 8), Copy(3, 0, 1, units // 4)]
    tables = [
        replicas.lanes(copies, slot_of, nodes, spare, source, etp) for source in range(ranks * etp)
    ]
    all_of = torch.stack(tables)  # [S, LANES, E]
    owners = replicas.slots_of_owners(slot_of, ranks, spare)
    assert owners.tolist() == [9, 0, 1, 4, 5, 8, 12, 13]
    for expert in (1, 2, 4, 5, 6, 7):
        assert (all_of[:, :, expert] == owners[expert]).all()
    share = Counter(all_of[:, :, 0].flatten().tolist())
    assert share == {1 * 4 + 2: units // 2, 3 * 4 + 3: units // 8, 9: units - units * 5 // 8}
    assert Counter(all_of[:, :, 3].flatten().tolist()) == {3: units // 4, 4: units * 3 // 4}
    went = all_of[:, :, 0].view(ranks, etp * LANES) // (each + spare)  # the rank of each row
    assert (went[1] == 1).all() and (went[2] == 2).all()  # who has one keeps its rows
    assert (went[3] == 3).sum() == units // 8
    if nodes[3]:  # the copy on their node takes all that ranks 0 and 1 have
        assert (went[0] == 1).all() and (went[3] != 1).all()


def test_without_copies_there_is_one_lane():
    slot_of = torch.tensor([1, 0, 3, 2])
    assert replicas.lanes([], slot_of, [0, 0], 1, 1, 1).tolist() == [[1, 0, 4, 3]]
    assert replicas.slots_of_owners(slot_of, 2, 0).tolist() == slot_of.tolist()


def test_copies_in_every_slot():
    """What layouts are compared with."""
    for ranks, each, spare in ((2, 4, 3), (4, 2, 5), (8, 1, 7)):
        slot_of = torch.randperm(ranks * each, generator=torch.Generator().manual_seed(1))
        units = replicas.units_of(ranks)
        copies = replicas.anywhere(slot_of, ranks, spare, units)
        assert len(copies) == ranks * spare
        left = json.loads(json.dumps([copies]))
        assert replicas.from_facts(left, slot_of[None], ranks, units, "step-1") == [copies]


GOOD = [[[0, 1, 0, 16]], []]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        [[], [], []],
        [[[0, 1, 0]], []],
        [[["a", 1, 0, 16]], []],
        [[[4, 1, 0, 16]], []],
        [[[0, 2, 0, 16]], []],
        [[[0, 0, 0, 16]], []],
        [[[0, 1, -1, 16]], []],
        [[[0, 1, 0, 0]], []],
        [[[0, 1, 0, 33]], []],
        [[[0, 1, 0, 8], [1, 1, 0, 8]], []],
        [[[0, 1, 0, 8], [0, 1, 1, 8]], []],
    ],
    ids=str,
)
def test_copies_of_a_checkpoint_that_do_not_fit(value):
    slots = placement.unmoved(2, 4)
    assert replicas.from_facts(GOOD, slots, 2, 32, "here") == [[Copy(0, 1, 0, 16)], []]
    with pytest.raises(UsageError, match="here: its copies of experts are not those of 2 layers"):
        replicas.from_facts(value, slots, 2, 32, "here")
