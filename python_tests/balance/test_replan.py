"""When experts move, and whether it pays."""

from __future__ import annotations

import pytest
import torch

from moekernels.balance import placement, replan
from moekernels.errors import UsageError

LEVEL, STEEP = [10.0] * 8, [40.0, 30, 20, 10, 4, 3, 2, 1]


@pytest.mark.parametrize(
    "text, rule",
    [
        ("never", replan.Rule()),
        ("auto", replan.Rule(replan.AUTO_STEPS, must_pay=True)),
        ("7", replan.Rule(7)),
        ("random:3", replan.Rule(3, random=True)),
    ],
)
def test_rules(text, rule):
    assert replan.Rule.parse(text) == rule


@pytest.mark.parametrize(
    "text", ("", "always", "0", "-1", "1.5", "random", "random:", "random:0", "auto:3", "9" * 30)
)
def test_no_rules(text):
    with pytest.raises(UsageError, match="--replan must be never, auto"):
        replan.Rule.parse(text)


def test_only_uneven_layers_change():
    loads, began = torch.tensor([LEVEL, STEEP]), placement.unmoved(2, 8)
    after = replan.better(loads, began, [[0, 0]] * 2)
    assert torch.equal(after[0], began[0]) and not torch.equal(after[1], began[1])
    assert placement.rank_loads(loads, after, 2)[1].amax() == 55
    assert torch.equal(replan.better(loads, after, [[0, 0]] * 2), after), "once is enough"
    # Hysteresis: the busiest rank would lose 1 of 81 rows.
    nearly, began = torch.tensor([[40.0, 41, 39, 40]]), placement.unmoved(1, 4)
    assert torch.equal(replan.better(nearly, began, [[0, 0]]), began)
    assert not torch.equal(replan.better(nearly, began, [[0, 0]], least=0.0), began)


def test_nodes_may_outweigh_load():
    """Experts 0 and 2, 1 and 3 travel together; ranks 0 and 1 are on two nodes."""
    loads, pairs = torch.full((1, 4), 10.0), 10.0 * torch.eye(4)
    pairs[[0, 2, 1, 3], [2, 0, 3, 1]] = 10.0
    after = replan.better(loads, placement.unmoved(1, 4), [[0, 1]], pairs[None])
    ranks = (after[0] // 2).tolist()
    assert ranks[0] == ranks[2] != ranks[1] == ranks[3]


def test_a_draw_hangs_on_seed_and_step():
    began = placement.unmoved(3, 8)
    drawn = [replan.drawn(began, 4, seed, step) for seed, step in ((0, 3), (0, 3), (1, 3), (0, 6))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])
    for slots in drawn:
        assert torch.equal(slots.sort(1).values, began)


def test_the_slowest_stage_counts():
    loads, began = torch.tensor([STEEP, LEVEL, STEEP, LEVEL]), placement.unmoved(4, 8)
    assert replan.busiest_rows(loads, began, 2, [[0, 1], [2, 3]]) == 140
    assert replan.busiest_rows(loads, began, 2, [[0, 2], [1, 3]]) == 200
    assert replan.busiest_rows(loads, began, 2, [[], []]) == 0
