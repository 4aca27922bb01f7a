"""The planner's search: exact on small spaces, and never made worse by a better machine."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moekernels.errors import UsageError
from moekernels.plan.evaluate import Problem, batch_sizes, evaluate, lower_bound
from moekernels.plan.memory import stage_memory
from moekernels.plan.problem import configured, problem_of
from moekernels.plan.search import MOMENT_DTYPES, Space, candidates, fit, search
from moekernels.run import files as cfg
from python_tests.support.plans import problem


@pytest.fixture(scope="module")
def document() -> Problem:
    return problem_of(cfg.resolve("spec-30b", None, {}))


@pytest.mark.parametrize("memory", [0.8e9, 0.45e9, 0.3e9])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb"])
def test_search_is_exhaustive(memory, schedule):
    """Every candidate, every checkpointed set that is alike within a rank: none is faster."""
    asked = problem(memory)
    space = Space(gpus=4, schedule=schedule, microbatches=4, optimizer_state="bf16")
    best = float("inf")
    for s in candidates(asked, 4, space):
        s = replace(s, optimizer_state="bf16")
        for again in itertools.product(*[range(n + 1) for n in s.layers]):
            plan = evaluate(asked, replace(s, checkpointed=again))
            if plan.memory <= asked.cluster.memory:
                best = min(best, plan.step)
    if best == float("inf"):
        with pytest.raises(UsageError, match="memory binds"):
            search(asked, space)
    else:
        assert search(asked, space).best.step == pytest.approx(best, rel=1e-12)


def test_bounds_are_bounds(document):
    for s in itertools.islice(candidates(document, 8, Space()), 0, None, 23):
        sl = batch_sizes(document.model, document.batch, s.layout.dp, s.microbatches, s.layout.tp)
        assert lower_bound(document, s, sl) <= evaluate(document, s).flush * (1 + 1e-12)


def test_more_memory_is_never_slower():
    steps = []
    for memory in (0.25e9, 0.3e9, 0.35e9, 0.4e9, 0.5e9, 0.8e9):
        try:
            steps.append(search(problem(memory)).best.step)
        except UsageError:
            assert not steps, "what fits a small card fits a larger one"
    assert len(steps) >= 3
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("name", ["memory_bandwidth", "link_bandwidth", "network_bandwidth"])
def test_more_bandwidth_never_hurts(name):
    asked = problem(gpus_per_node=2)
    doubled = replace(asked.cluster, **{name: 2 * getattr(asked.cluster, name)})
    assert search(replace(asked, cluster=doubled)).best.step <= search(asked).best.step


def test_memory_grows_with_the_micro_batch(document):
    s = configured(cfg.resolve("spec-30b", None, {}))
    for rank in range(4):
        totals = [stage_memory(document.model, s, rank, t).total for t in (0, 512, 4096, 20736)]
        assert totals == sorted(totals)
        assert len(set(totals)) == 4


def test_the_recommended_is_not_dominated(document):
    result = search(document)
    for plan in result.pareto:
        assert plan.memory <= document.cluster.memory - document.cluster.reserve
        beats = plan.step < result.best.step and plan.gpus <= result.best.gpus
        assert not (beats and plan.memory <= result.best.memory)
    assert result.best in result.pareto
    assert result.rejected


def test_parts_add_up(document):
    result = search(document, Space(pp=4))
    plan = result.best
    assert sum(plan.parts.values()) == pytest.approx(plan.step)
    assert plan.flush <= plan.step
    assert 0 < plan.mfu <= plan.hfu < 1
    assert sum(plan.strategy.layers) == document.model.num_layers


def test_the_first_format_is_kept_where_it_fits(document):
    roomy = replace(document, cluster=replace(document.cluster, memory=500e9))
    assert search(roomy).best.strategy.optimizer_state == MOMENT_DTYPES[0]


def test_nothing_fits_says_by_how_much(document):
    tight = replace(document, cluster=replace(document.cluster, memory=15e9))
    said = r"memory binds.*100 % of its state on the host.*over by \d+\.\d GB"
    with pytest.raises(UsageError, match=said):
        search(tight)
    s = next(iter(candidates(tight, 8, Space())))
    assert fit(tight, s) > 0
