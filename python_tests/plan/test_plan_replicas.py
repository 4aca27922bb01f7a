"""Copies of hot experts in a plan: evener where they pay, refused elsewhere."""

from __future__ import annotations

import json

import pytest

from moekernels.cli import main
from moekernels.model.layout import Layout
from moekernels.plan import replicas, room
from moekernels.plan.strategy import busiest
from moekernels.run import files as cfg

STEEP = (tuple(1.0 / (n + 1) for n in range(64)),)


def test_ranks_are_evener_with_them():
    layout = Layout(dp=16, ep=16)
    assert replicas.hottest(STEEP, 16) > 3
    alone = busiest(STEEP, 16)
    some = [replicas.busiest(STEEP, layout, n) for n in (1, 2, 4)]
    assert alone > some[0] > some[1] >= some[2] and some[2] < 1.1
    even = ((1.0,) * 64,)
    assert replicas.busiest(even, layout, 2) == 1.0


def plan(capsys, *more):
    code = main(["plan", "--preset", "spec-30b", "--gpus", "16", "--json", *more])
    said = capsys.readouterr()
    return code, said.out or said.err


def test_a_plan_has_them_where_they_pay(capsys):
    more = ("--dp", "16", "--ep", "16", "--zipf", "1", "--dispatcher", "all_to_all")
    code, out = plan(capsys, *more, "--replicas", "2")
    assert code == 0
    found = json.loads(out)
    assert found["recommended"]["strategy"]["replicas"] == 2
    assert "--replicas 2" in found["launch"]
    plain = json.loads(plan(capsys, *more)[1])["recommended"]
    assert plain["strategy"]["replicas"] == 0
    assert found["recommended"]["step_seconds"] < plain["step_seconds"]


@pytest.mark.parametrize(
    "more, reason",
    [
        ("--dp 2 --tp 2 --pp 4 --ep 2 --zipf 1", "placement suffices at ep 2, which top-k 2"),
        ("--dp 16 --ep 8 --zipf 0.1", "placement suffices at ep 8: the hottest expert alone"),
    ],
)
def test_a_plan_refuses_them_where_placement_suffices(capsys, more, reason):
    code, said = plan(capsys, *more.split(), "--replicas", "1")
    assert code == 2 and reason in said and said.count("\n") == 1


def test_more_slots_than_memory_is_said_before_the_run():
    run = cfg.resolve("tiny", None, {})
    run.layout.dp = run.layout.ep = 8
    run.layout.tp = run.layout.pp = 1
    before = room.needed(run)
    assert before["copies of experts"] == 0
    run.train.replicas = 56
    held = room.needed(run)
    # All experts of the seven other ranks: seven times what the owners have.
    experts = run.model.moe_layers * run.model.num_experts
    per_expert = held["copies of experts"] / (8 * 56 * run.model.moe_layers)
    assert per_expert * experts * 7 == held["copies of experts"]
