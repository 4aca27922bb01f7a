"""What a plan is asked for: objectives, lengths, and how evenly the experts are loaded."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace

import pytest

from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.plan.evaluate import evaluate
from moekernels.plan.problem import configured, loads_of, problem_of
from moekernels.plan.search import Space, candidates, search
from moekernels.plan.strategy import Objective, busiest
from moekernels.run import files as cfg
from python_tests.support.plans import problem

SPACE = Space(gpus=4, schedule="1f1b", microbatches=4, optimizer_state="bf16")


def every_plan(asked, space):
    """All candidates with all sets of checkpointed layers that fit."""
    for s in candidates(asked, 4, space):
        for again in itertools.product(*[range(n + 1) for n in s.layers]):
            plan = evaluate(asked, replace(s, optimizer_state="bf16", checkpointed=again))
            if plan.memory <= asked.cluster.memory:
                yield plan


@pytest.mark.parametrize("memory, vocabulary", [(0.8e9, 4096), (0.3e9, 4096), (1.6e9, 32768)])
@pytest.mark.parametrize("best, value", [
    ("throughput", lambda p: p.step), ("latency", lambda p: p.layer_seconds),
    ("memory", lambda p: p.memory), ("cost", lambda p: p.step * p.gpus),
])  # fmt: skip
def test_the_objective_is_met_exactly(best, value, memory, vocabulary):
    """No plan of the whole space is better at it."""
    asked = replace(problem(memory), objective=Objective(best))
    asked = replace(asked, model=replace(asked.model, vocab_size=vocabulary))
    found = search(asked, SPACE)
    assert value(found.best) == pytest.approx(min(map(value, every_plan(asked, SPACE))), rel=1e-12)
    assert found.best in found.pareto


def test_the_fewest_cards_that_are_fast_enough():
    asked = problem(0.8e9, gpus=16)
    rates = {}
    for gpus in (1, 2, 4, 8, 16):
        try:
            rates[gpus] = search(asked, Space(gpus=gpus)).best.sequences_per_second
        except UsageError:
            continue
    assert len(rates) >= 3
    for wanted in [1.0, *(0.99 * r for r in rates.values())]:
        found = search(replace(asked, objective=Objective("gpus", wanted))).best
        assert found.gpus == min(g for g, rate in rates.items() if rate >= wanted)
        assert found.sequences_per_second >= wanted
    with pytest.raises(UsageError, match=r"nothing on 16 cards reaches 1e\+09 sequences/s"):
        search(replace(asked, objective=Objective("throughput", 1e9)))


# --- loads of the experts


def test_the_busiest_rank():
    loads = ((4.0, 0.0, 1.0, 3.0), (1.0, 1.0, 1.0, 1.0))
    assert busiest(loads, 1) == 1.0
    assert busiest(loads, 2) == pytest.approx((1.0 + 1.0) / 2)
    assert busiest(loads, 4) == pytest.approx((2.0 + 1.0) / 2)


def zipf(exponent, **given):
    flags = {("model", "num_experts"): given.pop("experts", 64)}
    run = cfg.resolve("spec-30b", None, flags)
    run.workload.zipf = exponent
    return run


EXPONENTS = (0.1, 0.3, 0.7, 1.0, 1.5, 3.0)


@pytest.mark.parametrize("experts", [64, 60, 7])
def test_zipf_is_more_uneven_with_its_exponent(experts):
    for ranks in (n for n in (1, 2, 3, 4, 8, 16, 32) if experts % n == 0):
        uneven = [busiest(loads_of(zipf(e, experts=experts)), ranks) for e in EXPONENTS]
        assert uneven == sorted(uneven) and uneven[0] >= 1.0
        assert ranks == 1 or uneven[-1] > 1.5


def test_more_skew_is_never_faster():
    """Neither one strategy nor the best of all; and what has all experts everywhere feels none."""
    asked = [problem_of(zipf(e)) for e in EXPONENTS]
    folded = configured(cfg.resolve("spec-30b", None, {}))
    alone = replace(folded, layout=Layout(pp=8), layers=(2,) * 8, checkpointed=(0,) * 8)
    for s, strictly in ((folded, True), (alone, False)):
        steps = [evaluate(p, s).step for p in asked]
        assert steps == sorted(steps)
        assert len(set(steps)) == (len(steps) if strictly else 1)
    best = [search(p).best.step for p in asked]
    assert best == sorted(best) and best[-1] > best[0]


def test_a_sharper_histogram_is_never_faster():
    draw = random.Random(1)
    base = [[draw.random() for _ in range(64)] for _ in range(3)]
    s = configured(cfg.resolve("spec-30b", None, {}))
    steps, uneven = [], []
    for sharper in (0.0, 1.0, 2.0, 8.0):
        loads = tuple(tuple(sorted((x**sharper for x in layer), reverse=True)) for layer in base)
        asked = problem_of(zipf(0.0))
        asked = replace(asked, cluster=replace(asked.cluster, loads=loads))
        uneven.append(busiest(loads, s.layout.ep))
        steps.append(evaluate(asked, s).step)
    assert uneven[0] == pytest.approx(1.0) and uneven == sorted(uneven)
    assert steps == sorted(steps) and len(set(steps)) == 4


# --- as input


def planned(capsys, *flags):
    assert main(["plan", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_file_of_it_all(tmp_path, capsys):
    (tmp_path / "loads.json").write_text(json.dumps([[1.0] * 63 + [64.0]] * 2))
    file = tmp_path / "plan.toml"
    file.write_text(
        f"[workload]\nlengths = {[100, 4000, 512, 900] * 16}\n"
        f'loads_from = "{tmp_path}"\n[objective]\nbest = "memory"\nat_least = 0.01\n'
    )
    data = planned(capsys, "--preset", "spec-30b", "--config", str(file))
    assert data["batch"]["tokens"] == 16 * 5512
    assert data["objective"] == {"best": "memory", "at_least": 0.01}
    assert data["hardware"]["loads"][1][-1] == 64.0
    least = min(p["memory_bytes"] for p in data["pareto"])
    assert data["recommended"]["memory_bytes"] == least


def test_flags_of_it_all(capsys):
    even = planned(capsys, "--tp", "2", "--dp", "4", "--ep", "8")["recommended"]
    skewed = planned(capsys, "--tp", "2", "--dp", "4", "--ep", "8", "--zipf", "1")["recommended"]
    assert skewed["step_seconds"] > even["step_seconds"]
    cheap = planned(capsys, "--gpus", "64", "--objective", "gpus", "--at-least", "60")
    assert cheap["recommended"]["gpus"] == 16
    assert cheap["recommended"]["sequences_per_second"] >= 60


BAD = {
    "loads = [1.0, 2.0]": r"workload.loads: layer 1 has 2 loads; use one for each of 64 experts",
    "loads = [-1.0]": r"layer 1 has 1 loads",
    f"loads = {[0.0] * 64}": r"layer 1 has no row at all",
    f"loads = {[-1.0] * 64}": r"a load that is no number from 0",
    'zipf = 1.0\nloads_from = "x"': r"zipf and loads_from both say",
    'loads_from = "/nowhere"': r"loads_from /nowhere: cannot be read",
    "zipf = -1": r"workload.zipf must be at least 0",
    "lengths = [0]": r"workload.lengths has 0; use lengths from 1",
    'lengths_from = "/nowhere"': r"cannot be read",
    '[objective]\nbest = "speed"': r"objective.best is 'speed': ",
    "[objective]\nat_least = -1": r"objective.at_least must be at least 0",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_one_line(text, tmp_path, capsys):
    file = tmp_path / "plan.toml"
    file.write_text(text if text.startswith("[") else f"[workload]\n{text}")
    assert main(["plan", "--preset", "spec-30b", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(BAD[text], error), error
