"""A set link in the plan: what of an exchange in parts is waited for."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moekernels.model.dispatch import SLOTS
from moekernels.model.layout import Layout
from moekernels.ops.exchange import Shape, bytes_of
from moekernels.parallel.exchange import Collective
from moekernels.parallel.mesh import Mesh
from moekernels.plan.cost import layer_cost
from moekernels.plan.memory import stage_memory
from moekernels.plan.overlap import exposed
from moekernels.plan.problem import problem_of
from moekernels.plan.strategy import Strategy
from moekernels.run import files as cfg
from python_tests.support.activations import counted, measure, small


def test_in_one_piece_both_ways_are_waited_for() -> None:
    assert exposed(1, 3.0, 10.0) == pytest.approx(6.0)


def test_work_afterwards_hides_the_way_home() -> None:
    assert exposed(1, 3.0, 10.0, 10.0) == pytest.approx(3.0)
    assert exposed(1, 3.0, 10.0, 1.0) == pytest.approx(5.0)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_expose_the_first_there_and_the_last_home(parts: int) -> None:
    """Where computing a part takes as long as bringing it there and back."""
    assert exposed(parts, 3.0, 10.0) == pytest.approx(6.0 / parts)
    assert exposed(parts, 3.0, 10.0, 10.0) == pytest.approx(3.0 / parts)


def test_of_four_exchanges_four_parts_hide_what_the_stamps_of_such_a_run_say() -> None:
    """`parallel/test_measure.py` plays the same, part by part, and asks both clock and stamps."""
    hidden = 1 - (exposed(4, 1.0, 5.0) + exposed(4, 1.0, 5.0, 5.0)) / 4
    assert hidden == pytest.approx(0.8125)


def test_a_link_that_is_the_bound_is_waited_for_but_for_the_computing() -> None:
    assert exposed(100, 10.0, 1.0) == pytest.approx(19.0, abs=0.2)


def test_the_plan_takes_the_run_s_link() -> None:
    layout, times = Layout(dp=2, ep=2), []
    s = Strategy(layout, (16,), (0,), 1)
    for link, parts in (("", 1), ("1ms,1MB/s", 1), ("1ms,1MB/s", 4), ("1ms,2MB/s", 1)):
        flags = {("train", "link"): link, ("train", "exchange_parts"): parts}
        problem = problem_of(cfg.resolve("tiny", None, flags))
        cost = layer_cost(problem.model, problem.cluster, s)
        times.append([cost.forward["expert exchange"], cost.backward["expert exchange"]])
    none, one, four, faster = times
    for way in (0, 1):
        assert one[way].fixed - none[way].fixed == pytest.approx(2e-3)
        slow, fast = (x[way].per_token - none[way].per_token for x in (one, faster))
        assert slow == pytest.approx(2 * fast, rel=1e-2)
        assert none[way].per_token < four[way].per_token < one[way].per_token
    model = problem.model
    sent = 2.0 * model.top_k * 2 * model.d_model / 2  # bf16 rows there and back, half of them
    assert one[0].per_token - none[0].per_token == pytest.approx(sent / 1e6, rel=0.2)


@pytest.fixture
def three_peers(monkeypatch):
    """A mesh whose peers exist in name only, and hold rows as this rank does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(Collective, "counts", lambda self, outgoing: (outgoing, outgoing))
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield Mesh(Layout(dp=4, ep=4))
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("d_in", [64, 128])
@pytest.mark.parametrize("checkpoint", [0, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_hold_room_for_all_rows_that_come_home(
    parts, d_in, checkpoint, recompute, three_peers
):
    """Within 2 % of what there is; a layer that is computed again is not cut."""
    model = small(d_in, num_experts=32, recompute_experts=recompute)
    layers = range(1, 1 + checkpoint)
    kept, peak = measure(model, three_peers, 1, False, False, "fp32", 1024, layers, parts=parts)
    s = Strategy(three_peers.layout, (1,), (checkpoint,), 1, dtype="fp32")
    said_kept, said_peak = counted(model, s, 1024, False, False, parts=parts)
    assert said_kept == pytest.approx(kept, rel=5e-3)
    assert said_peak == pytest.approx(peak, rel=2e-2)


def test_a_bound_is_memory_whatever_the_imbalance_is() -> None:
    """Kept rows grow with it, and GPUs' slabs are what the exchange asks for; time does not."""
    s, found = Strategy(Layout(dp=4, ep=4), (16,), (0,), 4), {}
    for text in ("exact", "bounded:1", "bounded:3", "bounded:9"):
        flags = {("train", "exchange_buffers"): text}
        problem = problem_of(cfg.resolve("tiny", None, flags))
        model, cost = problem.model, layer_cost(problem.model, problem.cluster, s)
        bound = problem.cluster.exchange_bound
        how = {"imbalance": problem.cluster.imbalance, "bound": bound}
        found[text] = (
            stage_memory(model, s, 0, 64, device="cpu", **how),
            stage_memory(model, s, 0, 64, device="cuda", **how),
            cost.forward["expert exchange"].per_token,
        )
    exact, one, three, nine = found.values()
    assert problem.cluster.imbalance == 1.1 and exact[2] == one[2] == three[2]
    rows = 64 * model.top_k * model.moe_layers * s.microbatches  # that are kept, at the mean
    assert three[0].activations - one[0].activations >= 2 * rows * model.d_model * 2
    assert one[0].activations < exact[0].activations < three[0].activations
    assert one[0].messages == exact[0].messages == exact[1].messages == 0
    width = model.d_model * 2
    for memory, factor in ((one[1], 1), (three[1], 3), (nine[1], 4)):  # 4 ranks have no more
        mine = 64 * model.top_k
        shape = Shape(4, model.num_experts // 4, SLOTS, factor * mine, mine, width)
        assert memory.messages == pytest.approx(bytes_of(shape), rel=0.05)
