"""What a share of the optimiser's state in the host's memory frees and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moekernels.audit.document import on_hosts
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.plan import cost, host_share
from moekernels.plan.evaluate import evaluate
from moekernels.plan.memory import stage_memory
from moekernels.plan.problem import problem_of, space_of
from moekernels.plan.search import SHARES, Space, search
from moekernels.plan.strategy import Strategy
from moekernels.run import files as cfg
from python_tests.support.activations import DTYPES, small
from python_tests.support.plans import problem

HOST = {"host_memory": 1e12, "host_bandwidth": 55e9}


@pytest.mark.parametrize("dtype, moments", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_bytes_are_those_of_the_optimizer(dtype, moments, share):
    """To the lines at which buckets are cut; two chunks are counted as on their way."""
    model = small(64)
    chunk = StageModel(model, Mesh(Layout()), range(1, 5), True, True, dtype=DTYPES[dtype])
    config = AdamWConfig(state_dtype=DTYPES[moments], offload_optimizer=share)
    optimizer = Optimizer(chunk.named_shards(), chunk.mesh, config)
    layers = (model.num_layers,)
    s = Strategy(Layout(), layers, (0,), 1, dtype=dtype, optimizer_state=moments)
    counted = stage_memory(model, replace(s, offload_optimizer=share), 0, 128)
    lines = 12 * 16 * len(optimizer.buckets)
    assert counted.host == pytest.approx(optimizer.host_bytes(), abs=lines) and counted.host > 0
    before = stage_memory(model, s, 0, 128)
    on_the_way = counted.optimizer - (before.optimizer - counted.host)
    assert 0 < on_the_way <= 2 * counted.host
    assert counted.state - on_the_way == pytest.approx(optimizer.bytes(), abs=4 * lines)


def test_the_update_waits_for_the_link_alone():
    """The part that comes and goes is updated meanwhile: both ways over the link, or the update
    itself where that is longer."""
    asked = problem(1e9, **HOST)
    s = Strategy(Layout(), (4,), (0,), 1)
    plain = cost.update_seconds(asked.model, asked.cluster, s)["optimizer"]
    state = stage_memory(asked.model, s, 0, 1).optimizer
    for share in SHARES:
        there = replace(s, offload_optimizer=share)
        took = cost.update_seconds(asked.model, asked.cluster, there)["optimizer"]
        expected = (1 - share) * plain + max(share * plain, 2 * share * state / 55e9)
        assert took == pytest.approx(expected)
        fast = replace(asked.cluster, host_bandwidth=1e15)
        assert cost.update_seconds(asked.model, fast, there)["optimizer"] == pytest.approx(plain)


def test_it_is_searched_where_memory_is_short():
    """Cards on which nothing fits without; the host's memory binds as well; and whoever asks for
    auto has it searched everywhere."""
    roomy, short = problem(0.8e9, **HOST), problem(0.2e9, **HOST)
    assert search(roomy).best.strategy.offload_optimizer == 0
    with pytest.raises(UsageError, match="memory binds"):
        search(short, Space(shares=(0.0,)))
    with pytest.raises(UsageError, match="memory binds"):
        search(problem(0.2e9))  # no memory of a host is known
    found = search(short).best
    assert found.strategy.offload_optimizer > 0 and found.memory <= 0.2e9
    assert 0 < found.host_memory <= 1e12
    tight = replace(short, cluster=replace(short.cluster, host_memory=found.host_memory / 50))
    with pytest.raises(UsageError, match="memory binds"):
        search(tight)
    slow = replace(roomy, cluster=replace(roomy.cluster, host_bandwidth=1e6))
    assert search(slow, Space(shares=SHARES)).best.strategy.offload_optimizer == 0
    assert search(short, Space(shares=(1.0,))).best.strategy.offload_optimizer == 1
    flags = {("train", "offload_optimizer"): "auto"}
    assert space_of(flags).shares == SHARES and space_of({}).shares == ()


def test_the_trade_is_told():
    """Layers are computed again that a share would keep."""
    asked = problem(0.6e9, **HOST)
    s = Strategy(Layout(tp=2, pp=2), (2, 2), (0, 0), 4)
    told = on_hosts(asked, s)
    assert told[0].share == 0 and told[-1].share == 1
    assert told[0].memory > told[-1].memory and told[0].host == 0
    for one in told:
        if one.fits:
            assert one.memory <= 0.6e9
    kept = next(x for x in told if x.layers == "none" and x.fits)
    assert kept.share == min(x.share for x in told if x.layers == "none" and x.fits)
    again = replace(s, offload_optimizer=kept.share)
    assert kept.step == evaluate(asked, again).step


def test_auto_takes_as_little_as_fits(monkeypatch):
    run = cfg.resolve("spec-30b", None, {})
    run.layout.checkpoint_layers = "none"
    asked = problem_of(run)
    s = replace(host_share.configured(run), checkpointed=(0,) * 4)
    for memory in (80e9, 64e9, 48e9, 10e9):
        monkeypatch.setattr(host_share, "memory_of_cards", lambda memory=memory: memory)
        share, said = host_share.choose(run, "cuda")
        needs = {
            x: max(stage.total for stage in evaluate(asked, replace(s, offload_optimizer=x)).stages)
            for x in (share, max(0, share - 0.05))
        }
        room = memory - 2e9
        if memory == 10e9:
            assert share == 1 and "may be too little" in said
        else:
            assert needs[share] <= room and "may be" not in said
            assert share == 0 or min(needs.values()) <= room < max(needs.values())
        assert f"{share:g} of the optimizer's state" in said
    assert host_share.choose(run, "cpu")[0] == 0
    assert host_share.with_share(run, 0.25).train.offload_optimizer == 0.25
