"""Schedules are legal whatever their size, and what is illegal is noticed."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moekernels.errors import UsageError
from moekernels.pipeline.build import build, held_limits
from moekernels.pipeline.check import ScheduleError, check, peak_held, peak_in_flight, peak_owed
from moekernels.pipeline.greedy import ALIKE
from moekernels.pipeline.schedule import Action, Kind, Pair, batches

NAMES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zb", 1),
    ("overlap", 1),
    ("zb", 2),
    ("forward", 1),
]
KINDS = [*NAMES, ("forward", 3)]


@pytest.mark.parametrize("name, virtual_stages", KINDS)
@pytest.mark.parametrize("stages", range(1, 7))
def test_legal(name, virtual_stages, stages):
    for microbatches in range(1, 15):
        check(build(name, stages, microbatches, virtual_stages))


@settings(max_examples=20, deadline=None)
@example(11, 11, 2)  # four receives wait at once
@given(st.integers(1, 12), st.integers(1, 48), st.integers(2, 5))
def test_legal_at_any_size(stages, microbatches, virtual_stages):
    check(build("interleaved", stages, microbatches, virtual_stages))
    check(build("1f1b", stages, microbatches))
    check(build("zb", stages, microbatches))
    check(build("overlap", stages, microbatches))


@pytest.mark.parametrize("stages, microbatches", [(1, 5), (2, 2), (4, 3), (4, 8), (8, 32)])
def test_1f1b_keeps_at_most_stages_minus_rank_microbatches(stages, microbatches):
    peaks = peak_in_flight(build("1f1b", stages, microbatches))
    assert peaks == [min(stages - rank, microbatches) for rank in range(stages)]
    assert peak_in_flight(build("gpipe", stages, microbatches)) == [microbatches] * stages


@pytest.mark.parametrize("stages, microbatches", [(1, 1), (1, 5), (2, 2), (4, 3), (4, 9), (8, 32)])
def test_overlap_pairs_all_but_a_warm_up_of_twice_1f1bs(stages, microbatches):
    schedule = build("overlap", stages, microbatches)
    for rank, actions in enumerate(schedule.actions):
        ahead = min(2 * (stages - 1 - rank) + 1, microbatches)
        pairs = list(schedule.pairs(rank))
        assert [(f.microbatch, b.microbatch) for f, b in pairs] == [
            (ahead + i, i) for i in range(microbatches - ahead)
        ]
        found = [entry for entry in batches(actions, schedule.paired[rank] if pairs else ())]
        assert [entry for entry in found if isinstance(entry, Pair)] == pairs
        assert peak_in_flight(schedule)[rank] == min(ahead + 1, microbatches)


def test_zb_is_1f1b_that_puts_weights_off():
    """The same order of F and B, I in the place of B, and W in the order of the microbatches."""
    for stages, microbatches in itertools.product(range(2, 9), range(1, 41)):
        whole, split = (build(name, stages, microbatches) for name in ("1f1b", "zb"))
        if microbatches % 8 in (0, 1, 7) or microbatches < 4:  # its two models take the time
            check(split)
        assert peak_in_flight(split) == peak_in_flight(whole)
        assert peak_owed(split) == [min(rank + 1, microbatches) for rank in range(stages)]
        for one in (whole, split):
            limits = held_limits(one.name, stages, microbatches, 1)
            assert peak_held(one) == [set(pairs) for pairs in limits]
        for rank in range(stages):
            order = list(split.computations(rank))
            weights = [a.microbatch for a in order if a.kind is Kind.W]
            assert weights == list(range(microbatches))
            rest = [(a.kind, a.microbatch) for a in order if a.kind is not Kind.W]
            assert rest == [
                (Kind.I if a.kind is Kind.B else a.kind, a.microbatch)
                for a in whole.computations(rank)
            ]


def test_interleaved_keeps_a_bounded_number_whatever_the_microbatches():
    for microbatches in (16, 64, 256):
        assert peak_in_flight(build("interleaved", 4, microbatches, 2)) == [11, 9, 7, 5]


@pytest.mark.parametrize("stages, microbatches", [(2, 2), (2, 6), (4, 4), (4, 9), (5, 7)])
def test_1f1b_computes_in_the_order_of_torch(stages, microbatches):
    schedule = build("1f1b", stages, microbatches)
    for rank in range(stages):
        ahead, same = stages - 1 - rank, dict.fromkeys(range(2 * microbatches), rank).get
        theirs = torch_schedules._get_1f1b_rank_ops(
            1, stages, ahead, microbatches - ahead, ahead, rank, same, same
        )
        assert _computations(schedule, rank) == _from_torch(theirs)


@pytest.mark.parametrize("virtual_stages", [2, 3])
@pytest.mark.parametrize("stages, microbatches", [(2, 2), (2, 6), (4, 3), (4, 8), (4, 10), (3, 5)])
def test_interleaved_computes_in_the_order_of_torch(stages, microbatches, virtual_stages):
    """Torch takes only numbers that divide evenly into groups; these do."""
    schedule = build("interleaved", stages, microbatches, virtual_stages)
    rounds = max(1, microbatches // stages)
    oracle = SimpleNamespace(
        n_local_stages=virtual_stages,
        microbatches_per_round=microbatches // rounds,
        pp_group_size=stages,
        _n_microbatches=microbatches,
    )
    order = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations
    for rank in range(stages):
        assert _computations(schedule, rank) == _from_torch(order(oracle, rank))


def _computations(schedule, rank):
    return [
        (action.kind, schedule.virtual_stage(rank, action.chunk), action.microbatch)
        for action in schedule.computations(rank)
    ]


def _from_torch(actions):
    kinds = {torch_schedules.FORWARD: Kind.F, torch_schedules.FULL_BACKWARD: Kind.B}
    return [(kinds[a.computation_type], a.stage_index, a.microbatch_index) for a in actions if a]


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_receives_are_posted_one_computation_ahead_and_sends_at_once(name):
    """Every message has a computation to hide behind."""
    schedule = build(name, 4, 16)
    for rank, actions in enumerate(schedule.actions):
        order = list(schedule.computations(rank))
        computed = 0
        for action in actions:
            if action.kind.computes:
                computed += 1
                continue
            mine = order.index(action._replace(kind=Kind.F if action.kind.forward else Kind.B))
            if action.kind.sends:
                assert computed == mine + 1, action
            elif action.microbatch < 13:  # at the end of 1F1B a stage only waits for gradients
                assert computed == max(0, mine - 1), action


def test_batches_hold_one_direction_and_at_most_a_send_and_a_receive():
    for rank in range(4):
        actions = build("interleaved", 4, 7, 2).actions[rank]
        entries = list(batches(actions))
        flat = [a for e in entries for a in ([e] if isinstance(e, Action) else e)]
        assert sorted(flat) == sorted(actions)
        for entry in entries:
            if isinstance(entry, list):
                assert len({action.kind.forward for action in entry}) == 1
                assert len({action.kind for action in entry}) == len(entry) <= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("zigzag", 4, 8), "unknown schedule 'zigzag': one of gpipe, 1f1b, interleaved"),
        (("1f1b", 0, 8), "pipeline stages must be at least 1, got 0"),
        (("1f1b", 4, 0), "microbatches must be at least 1, got 0"),
        (("interleaved", 4, 8, -1), "virtual stages must be at least 1, got -1"),
        (("1f1b", 4, 8, 2), "use schedule interleaved or zb, or 1 virtual stage"),
        (("interleaved", 4, 8), "use schedule 1f1b, zb or overlap, or 2 virtual stages"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(UsageError, match=message):
        build(*arguments)


# What check must notice. Each entry plants one fault in a legal schedule.


def _edit(schedule, rank, edit):
    lists = [list(actions) for actions in schedule.actions]
    lists[rank] = edit(lists[rank])
    return dataclasses.replace(schedule, actions=tuple(map(tuple, lists)))


def _move(action, place):
    """An edit: take `action` out and put it in at `place`."""

    def edit(actions):
        rest = [a for a in actions if a != action]
        return [*rest[:place], action, *rest[place:]]

    return edit


def _faults():
    legal = build("1f1b", 3, 4)
    action = Action(Kind.F, 0, 1)
    yield "stands 0 times, not 1", _edit(legal, 1, lambda a: [x for x in a if x != action])
    yield "stands 2 times, not 1", _edit(legal, 1, lambda a: [*a, action])
    yield "stands 1 times, not 0", _edit(legal, 1, lambda a: [*a, Action(Kind.F, 0, 4)])
    yield (
        "B of chunk 0, microbatch 0 stands before its F",
        _edit(legal, 2, _move(Action(Kind.B, 0, 0), 0)),
    )
    send, receive = Action(Kind.SEND_F, 0, 2), Action(Kind.RECV_B, 0, 2)
    yield (
        "SEND_F of chunk 0, microbatch 2 stands 0 times",
        _edit(legal, 0, lambda a: [x for x in a if x != send]),
    )
    yield (
        "SEND_B of chunk 0, microbatch 0 stands 1 times, not 0",
        _edit(legal, 0, lambda a: [*a, Action(Kind.SEND_B, 0, 0)]),
    )
    yield (
        "SEND_F of chunk 0, microbatch 2 stands before its computation",
        _edit(legal, 0, _move(send, 0)),
    )
    yield (
        "stands behind the computation that needs it",
        _edit(legal, 0, _move(receive, len(legal.actions[0]) - 1)),
    )
    yield (
        "2 microbatches in flight, the limit is 1",
        dataclasses.replace(build("1f1b", 3, 4), in_flight_limit=(3, 1, 1)),
    )
    yield (
        "receives posted at RECV_B",
        _edit(legal, 0, _move(Action(Kind.RECV_B, 0, 3), 4)),
    )
    # in GPipe a stage may receive in any order, but not in another than the sender's
    gpipe = build("gpipe", 2, 3)
    f = [Action(kind, 0, m) for kind in (Kind.RECV_F, Kind.F) for m in range(3)]
    swapped = [f[0], f[3], f[2], f[5], f[1], f[4]]
    yield "which receives", _edit(gpipe, 1, lambda a: swapped + a[6:])
    yield "actions for 2", dataclasses.replace(legal, actions=legal.actions[:2])
    split = build("zb", 3, 4)
    yield (
        "I of chunk 0, microbatch 0 stands before its F",
        _edit(split, 2, _move(Action(Kind.I, 0, 0), 0)),
    )
    yield (
        "W of chunk 0, microbatch 0 stands before its I",
        _edit(split, 2, _move(Action(Kind.W, 0, 0), 0)),
    )
    yield "W of chunk 0, microbatch 3 stands 0 times", _edit(split, 2, lambda a: a[:-1])
    yield (
        "W of chunk 0, microbatch 2 stands behind W of chunk 0, microbatch 3",
        _edit(split, 2, lambda a: [*a[:-2], a[-1], a[-2]]),
    )
    yield (
        "B of chunk 0, microbatch 0 stands behind I of chunk 0, microbatch 1",
        _edit(
            dataclasses.replace(build("zb", 1, 2), in_flight_limit=(2,), both_limit=(2,)),
            0,
            lambda a: [*[x for x in a if x.microbatch or x.kind is Kind.F], Action(Kind.B, 0, 0)],
        ),
    )
    yield (
        "B of chunk 0, microbatch 1 stands 1 times, not 0",
        _edit(split, 0, lambda a: [*a, Action(Kind.B, 0, 1)]),
    )
    yield (
        "3 microbatches owe their W, the limit is 2",
        dataclasses.replace(split, owed_limit=(1, 2, 2)),
    )
    yield (
        "8 microbatches between F and their last gradient, the limit is 7",
        dataclasses.replace(build("zb", 4, 8, 2, ALIKE), both_limit=(8, 7, 8, 8)),
    )
    pairs = build("overlap", 1, 3)
    f, b = ([Action(kind, 0, m) for m in range(3)] for kind in (Kind.F, Kind.B))
    wide = dataclasses.replace(pairs, in_flight_limit=(3,), both_limit=(3,))
    yield (
        "B of chunk 0, microbatch 2 of a pair needs its F",
        dataclasses.replace(
            _edit(wide, 0, lambda a: [f[0], f[1], b[0], b[1], f[2], b[2]]),
            paired=(frozenset(f[2:]),),
        ),
    )
    yield (
        "F of chunk 0, microbatch 2 are no pair",
        _edit(wide, 0, lambda a: [*f, *b]),
    )
    yield "a pair's forward stands last", dataclasses.replace(pairs, paired=(frozenset(b[2:]),))
    local = build("interleaved", 1, 1, 2)
    yield "stands before what it needs", _edit(local, 0, _move(Action(Kind.F, 0, 0), 1))
    yield "there is no other stage", _edit(local, 0, lambda a: [*a, Action(Kind.SEND_F, 0, 0)])


@pytest.mark.parametrize("message, schedule", list(_faults()))
def test_check_notices(message, schedule):
    with pytest.raises(ScheduleError, match=message):
        check(schedule)


def test_check_notices_a_deadlock_of_computations():
    """The first stage wants a gradient before it has sent what the gradient depends on."""
    legal = dataclasses.replace(build("interleaved", 2, 2, 2), receive_limit=8)
    order = [(Kind.F, 0, 0), (Kind.RECV_F, 1, 0), (Kind.F, 1, 0)]
    early = [Action(*a) for a in order]
    rest = [a for a in legal.actions[0] if a not in early]
    with pytest.raises(ScheduleError, match="deadlock .hosts.: stage 0 at F of chunk 1"):
        check(dataclasses.replace(legal, actions=((*early, *rest), legal.actions[1])))


def test_check_notices_a_channel_that_blocks_itself():
    """A receive ahead of the send on which it depends: fine under gloo, a deadlock under NCCL."""
    legal = dataclasses.replace(build("interleaved", 2, 2, 2), receive_limit=8)
    early = _edit(legal, 0, _move(Action(Kind.RECV_F, 1, 0), 0))
    with pytest.raises(ScheduleError, match="deadlock .streams.: stage 0 at"):
        check(early)


def test_check_notices_sends_that_find_no_receiver():
    """All microbatches through one chunk, then the next: results return to a stage that sends."""

    def actions(rank):
        for chunk in range(2):
            for microbatch in range(8):
                if (rank, chunk) != (0, 0):
                    yield Action(Kind.RECV_F, chunk, microbatch)
                yield Action(Kind.F, chunk, microbatch)
                if (rank, chunk) != (1, 1):
                    yield Action(Kind.SEND_F, chunk, microbatch)

    chunk_by_chunk = (tuple(actions(0)), tuple(actions(1)))
    with pytest.raises(
        ScheduleError, match="deadlock .hosts.: stage 0 at SEND_F.* stage 1 at SEND_F"
    ):
        check(dataclasses.replace(build("forward", 2, 8, 2), actions=chunk_by_chunk))
