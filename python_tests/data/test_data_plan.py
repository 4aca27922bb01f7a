"""The batch plan: invariants for any lengths, balance, and what packing is worth in a pipeline."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekernels.data import batch_plan
from moekernels.data.batch_plan import (
    POLICIES,
    Cost,
    greedy,
    karmarkar_karp,
    order_rounds,
    plan_batch,
)
from moekernels.errors import UsageError
from moekernels.pipeline.build import build
from moekernels.pipeline.simulate import Simulator

COST = Cost.of_transformer(942_000_000, num_layers=16, attention_width=1024)


@st.composite
def plans(draw, policy=None):
    microbatches, dp = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    count = draw(st.integers(microbatches * dp, microbatches * dp + 40))
    lengths = draw(st.lists(st.integers(1, 3000), min_size=count, max_size=count))
    options = {
        "microbatches": microbatches,
        "dp": dp,
        "align": draw(st.sampled_from([1, 2, 4, 8])),
        "policy": policy or draw(st.sampled_from(POLICIES)),
        "cost": Cost(1.0, draw(st.sampled_from([0.0, 1e-4, 1.0]))),
    }
    return lengths, options


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_in_exactly_one_micro_batch(drawn):
    lengths, options = drawn
    plan = plan_batch(lengths, **options)
    assert len(plan.groups) == options["dp"]
    assert all(len(rank) == options["microbatches"] for rank in plan.groups)
    groups = [group for rank in plan.groups for group in rank]
    assert all(groups)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))


@given(plans())
@settings(max_examples=100, deadline=None)
def test_rows_and_costs_are_those_of_the_groups(drawn):
    lengths, options = drawn
    plan = plan_batch(lengths, **options)
    for groups, rows, costs, pads in zip(plan.groups, plan.rows, plan.costs, plan.pad_to):
        for group, n, cost, pad in zip(groups, rows, costs, pads):
            sizes = [lengths[i] for i in group]
            if options["policy"] == "packed":
                assert pad is None
            else:
                assert pad == max(sizes)
                sizes = [pad] * len(group)
            assert n % options["align"] == 0
            assert 0 <= n - sum(sizes) < options["align"]
            assert cost == pytest.approx(sum(map(options["cost"], sizes)))


@given(plans())
@settings(max_examples=50, deadline=None)
def test_the_same_input_gives_the_same_plan(drawn):
    lengths, options = drawn
    assert plan_batch(list(lengths), **options) == plan_batch(tuple(lengths), **options)


@given(plans(policy="packed"))
@settings(max_examples=150, deadline=None)
def test_packing_balances_at_least_as_well_as_greedy(drawn):
    lengths, options = drawn
    plan = plan_batch(lengths, **options)
    costs = [options["cost"](n) for n in lengths]
    parts = options["dp"] * options["microbatches"]
    bound = max(sum(costs[i] for i in group) for group in greedy(costs, parts))
    assert max(max(rank) for rank in plan.costs) <= bound * (1 + 1e-12)


@given(plans(policy="packed"), st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_a_token_limit_is_kept_or_refused(drawn, slack):
    lengths, options = drawn
    parts = options["dp"] * options["microbatches"]
    limit = max(max(lengths), sum(lengths) // parts) + slack
    try:
        plan = plan_batch(lengths, **options, max_tokens=limit)
    except UsageError as error:
        needed = int(str(error).split("a limit of at least ")[1].split(" ")[0])
        assert needed > limit
        plan_batch(lengths, **options, max_tokens=needed)  # what the message names would do
    else:
        assert max(max(rank) for rank in plan.rows) <= limit
        assert all(group for rank in plan.groups for group in rank)


@given(
    st.lists(st.floats(0.001, 1e6, allow_nan=False), min_size=1, max_size=60), st.integers(1, 20)
)
@settings(max_examples=150, deadline=None)
def test_karmarkar_karp_leaves_no_part_empty(costs, parts):
    if len(costs) < parts:
        parts = len(costs)
    groups = karmarkar_karp(costs, parts)
    assert len(groups) == parts and all(groups)
    assert sorted(i for group in groups for i in group) == list(range(len(costs)))


@pytest.mark.skipif(batch_plan._compiled is None, reason="moekernels._host is not built")
@given(
    st.lists(st.integers(1, 50) | st.floats(0.001, 1e12), min_size=1, max_size=80),
    st.integers(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_the_compiled_partition_equals_the_python_one_in_every_tie(costs, parts):
    assert karmarkar_karp(costs, parts) == batch_plan._karmarkar_karp(costs, parts)


def test_one_giant_among_crumbs_leaves_no_micro_batch_empty():
    plan = plan_batch([10_000, 1, 1, 1], 4, cost=COST)
    assert sorted(len(group) for group in plan.groups[0]) == [1, 1, 1, 1]


def test_data_parallel_ranks_run_alike_micro_batches_at_the_same_time():
    rng = random.Random(0)
    lengths = [rng.randint(128, 10240) for _ in range(512)]
    plan = plan_batch(lengths, 8, dp=4, cost=COST)
    for m in range(8):
        round_ = [plan.costs[d][m] for d in range(4)]
        assert max(round_) <= 1.001 * min(round_)
    totals = [sum(rank) for rank in plan.costs]
    assert max(totals) <= 1.001 * min(totals)


def test_padded_keeps_the_given_order_and_buckets_sort():
    lengths = [5, 1, 9, 3, 7, 2]
    padded = plan_batch(lengths, 3, policy="padded")
    assert padded.groups == [[[0, 1], [2, 3], [4, 5]]]
    assert padded.rows == [[10, 18, 14]]
    buckets = plan_batch(lengths, 3, policy="buckets")
    assert sorted(buckets.groups[0]) == [[0, 3], [2, 4], [5, 1]]
    assert sorted(buckets.rows[0]) == [4, 10, 18]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        (
            [5] * 3,
            {"microbatches": 4},
            "batch: 3 sequences cannot fill 4 microbatches; use at least 4 sequences, or at most "
            "3 microbatches",
        ),
        (
            [5] * 3,
            {"microbatches": 2, "dp": 4},
            "batch: 3 sequences cannot fill 4 data-parallel ranks x 2 microbatches; "
            "use at least 8 sequences",
        ),
        ([5], {"microbatches": 0}, "batch: microbatches is 0; use at least 1"),
        ([5, 0], {"microbatches": 1}, "batch: a sequence of 0 tokens; use at least 1"),
        (
            [5],
            {"microbatches": 1, "policy": "sorted"},
            "batch: policy 'sorted' is unknown; use one of packed, buckets, padded",
        ),
        (
            [5, 99],
            {"microbatches": 2, "align": 4, "max_tokens": 50},
            "batch: a sequence of 100 tokens exceeds the limit of 50 per microbatch; "
            "use sequences of at most 48, or a limit of at least 100",
        ),
        (
            [40, 40, 40],
            {"microbatches": 2, "max_tokens": 50},
            "batch: a microbatch of 80 tokens (packed) exceeds the limit of 50 per microbatch; "
            "use more microbatches than 2, fewer sequences than 3, or a limit of at least 80",
        ),
    ],
)
def test_messages(lengths, options, message):
    with pytest.raises(UsageError) as error:
        plan_batch(lengths, **options)
    assert str(error.value) == message


def test_cost_coefficients_are_checked():
    with pytest.raises(UsageError, match="cost coefficients -1 and 0"):
        Cost(-1, 0)
    with pytest.raises(UsageError, match="cost coefficients 0 and 0"):
        Cost(0, 0)


def flush_time(costs, stages=4, backward=2.0):
    """1F1B by events: every action starts when its rank is free and its input has arrived."""
    count = len(costs)
    queues = []
    for stage in range(stages):
        warm = min(stages - stage - 1, count)
        queue = [("F", m) for m in range(warm)]
        for m in range(count - warm):
            queue += [("F", warm + m), ("B", m)]
        queues.append(queue + [("B", m) for m in range(count - warm, count)])
    done, clock = {}, [0.0] * stages
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, m = queue[0]
                if kind == "F":
                    source = ("F", stage - 1, m) if stage else None
                else:
                    source = ("B", stage + 1, m) if stage < stages - 1 else ("F", stage, m)
                if source is not None and source not in done:
                    break
                start = max(clock[stage], done.get(source, 0.0))
                clock[stage] = start + costs[m] * (1.0 if kind == "F" else backward)
                done[kind, stage, m] = clock[stage]
                queue.pop(0)
    return max(clock)


def relative_time(policy, microbatches, seed, makespan=None):
    """Flush time over the same work without padding and without a bubble."""
    rng = random.Random(seed)
    lengths = [rng.randint(128, 10240) for _ in range(128)]
    plan = plan_batch(lengths, microbatches, policy=policy, cost=COST, makespan=makespan)
    return flush_time(plan.costs[0]) / (3 * sum(map(COST, lengths)))


@pytest.mark.parametrize(
    ("microbatches", "gain", "gap"),
    # Against padding with as many microbatches; within `gap` of the bound 1 + 3 / microbatches.
    [(8, 1.9, 0.001), (32, 1.8, 0.01)],
)
def test_packing_halves_the_time_of_padding_and_meets_the_bound(microbatches, gain, gap):
    seeds = range(8)
    bound = 1 + 3 / microbatches
    packed = [relative_time("packed", microbatches, s, flush_time) for s in seeds]
    padded = [relative_time("padded", microbatches, s) for s in seeds]
    buckets = [relative_time("buckets", microbatches, s) for s in seeds]
    assert all(p <= bound * (1 + gap) for p in packed)
    assert sum(padded) / sum(packed) > gain
    assert sum(packed) < sum(buckets) < sum(padded)


def test_the_specs_batch_takes_2_5_times_less_than_padding_in_8_micro_batches():
    """Folding 4 accumulation steps into one flush and packing it, against padding 8 at a time."""
    seeds = range(8)
    padded = sum(relative_time("padded", 8, s) for s in seeds)
    packed = sum(relative_time("packed", 32, s) for s in seeds)
    assert padded / packed > 2.4


def test_order_is_found_on_the_simulation_where_costs_differ():
    random_order = middle = climbed = 0.0
    for seed in range(5):
        rng = random.Random(seed)
        lengths = [min(10240, max(128, int(rng.lognormvariate(6.5, 1.2)))) for _ in range(128)]
        costs = plan_batch(lengths, 32, cost=COST).costs[0]
        assert max(costs) > 1.3 * min(costs)
        rng.shuffle(costs)
        rounds = list(range(32))
        ordered = [order_rounds(rounds, costs, time) for time in (None, flush_time, flush_time)]
        assert ordered[1] == ordered[2] and sorted(ordered[1]) == rounds
        random_order += flush_time(costs)
        middle += flush_time([costs[m] for m in ordered[0]])
        climbed += flush_time([costs[m] for m in ordered[1]])
    assert climbed < middle < random_order


def test_the_projects_simulator_sees_the_same_flush():
    simulator = Simulator(build("1f1b", 4, 32))

    def makespan(costs):
        return simulator.makespan(costs, [2.0 * cost for cost in costs])

    rng = random.Random(0)
    lengths = [min(10240, max(128, int(rng.lognormvariate(6.5, 1.2)))) for _ in range(128)]
    plans = [
        plan_batch(lengths, 32, cost=COST, makespan=time) for time in (None, makespan, flush_time)
    ]
    assert plans[1] == plans[2]
    assert makespan(plans[1].costs[0]) == pytest.approx(flush_time(plans[1].costs[0]), rel=1e-12)
    assert makespan(plans[1].costs[0]) < makespan(plans[0].costs[0])


def test_equal_costs_are_not_simulated():
    calls = []
    order_rounds([[0], [1]], [1.0, 1.0], lambda costs: calls.append(costs) or 1.0)
    assert not calls
