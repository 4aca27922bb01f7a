"""Warp collectives, barriers and divergent control flow in the emulator, by hand-written PTX."""

import numpy as np
import pytest

import ptx_emulator as ptx
from python_tests.support.ptx_ops import kernel

SCHEDULES = [None, 0, 4]
RANDOM = np.random.default_rng(3)


def per_thread(body: str, x: np.ndarray, grid=1, schedule=None) -> np.ndarray:
    """Every thread has x in %r1 and leaves its result in %r2."""
    threads = len(x) // grid
    y = np.zeros(len(x), np.uint32)
    module = kernel(
        f"""mov.u32 %r40, %ctaid.x; mov.u32 %r41, %ntid.x; mad.lo.u32 %r42, %r40, %r41, %r0;
        mad.wide.u32 %rd10, %r42, 4, %rd0; mad.wide.u32 %rd11, %r42, 4, %rd1;
        mov.u32 %r43, %laneid; ld.global.u32 %r1, [%rd10];
        {body}
        st.global.u32 [%rd11], %r2;""",
        2,
    )
    module.launch(
        "k", grid, threads, [x.astype(np.uint32), ptx.Uninitialized(y)], schedule=schedule
    )
    return y


def source_lane(mode: str, lane: int, b: int, width: int) -> int | None:
    """The lane that CUDA's __shfl_*_sync(..., width) reads, None when it keeps its own value."""
    first = lane - lane % width
    source = {
        "idx": first + b % width,
        "up": lane - b,
        "down": lane + b,
        "bfly": lane ^ b,
    }[mode]
    if mode == "up":
        return source if source >= first else None
    return source if source < first + width else None


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("varying", [False, True])
def test_shuffles(mode, width, varying):
    x = RANDOM.integers(0, 1 << 32, 64)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    b = "%r43" if varying else "3"
    body = f"""and.b32 %r3, {b}, 7; shfl.sync.{mode}.b32 %r2|%p1, %r1, %r3, {clamp}, -1;
        @!%p1 add.u32 %r2, %r2, 1;"""
    if not varying:
        body = f"shfl.sync.{mode}.b32 %r2|%p1, %r1, 3, {clamp}, -1; @!%p1 add.u32 %r2, %r2, 1;"
    result = per_thread(body, x)
    for t in range(64):
        lane = t % 32
        source = source_lane(mode, lane, lane % 8 if varying else 3, width)
        own = int(x[t]) + 1 & 0xFFFFFFFF
        assert result[t] == (own if source is None else x[t - lane + source])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [64, 40])
def test_votes_matches_and_reductions_under_two_masks(threads, schedule):
    """Even and odd lanes form two groups with masks of their own; the last warp may be short."""
    x = RANDOM.integers(0, 4, threads)
    lanes = min(threads - 32, 32)
    setup = f"""and.b32 %r3, %r43, 1; setp.eq.u32 %p1, %r3, 1;
        selp.b32 %r4, 0xAAAAAAAA, 0x55555555, %p1; shr.u32 %r5, %r0, 5;
        setp.eq.u32 %p2, %r5, 1; mov.u32 %r6, {(1 << lanes) - 1}; and.b32 %r6, %r4, %r6;
        selp.b32 %r4, %r6, %r4, %p2; setp.gt.u32 %p3, %r1, 1;"""
    groups = {}
    for t in range(threads):
        groups.setdefault((t // 32, t % 2), []).append(t)
    members = [groups[t // 32, t % 2] for t in range(threads)]

    def bits(chosen):
        return sum(1 << m % 32 for m in chosen)

    expected = {
        "vote.sync.ballot.b32 %r2, %p3, %r4;": [bits(m for m in g if x[m] > 1) for g in members],
        "vote.sync.any.pred %p4, %p3, %r4; selp.u32 %r2, 1, 0, %p4;": [
            int(any(x[m] > 1 for m in g)) for g in members
        ],
        "vote.sync.all.pred %p4, %p3, %r4; selp.u32 %r2, 1, 0, %p4;": [
            int(all(x[m] > 1 for m in g)) for g in members
        ],
        "match.any.sync.b32 %r2, %r1, %r4;": [
            bits(m for m in g if x[m] == x[t]) for t, g in enumerate(members)
        ],
        "redux.sync.add.u32 %r2, %r1, %r4;": [sum(int(x[m]) for m in g) for g in members],
        "redux.sync.max.u32 %r2, %r1, %r4;": [max(int(x[m]) for m in g) for g in members],
        "redux.sync.min.s32 %r2, %r1, %r4;": [min(int(x[m]) for m in g) for g in members],
        "redux.sync.xor.b32 %r2, %r1, %r4;": [
            int(np.bitwise_xor.reduce(x[g])) for g in map(np.array, members)
        ],
        "elect.sync %r7|%p4, %r4; selp.u32 %r2, 100, %r7, %p4;": [
            100 if t == g[0] else g[0] % 32 for t, g in enumerate(members)
        ],
    }
    for body, values in expected.items():
        assert per_thread(setup + body, x, schedule=schedule).tolist() == values, body


def test_match_all():
    x = np.concatenate([np.full(32, 5), np.arange(32)])
    body = "match.all.sync.b32 %r3|%p1, %r1, -1; selp.u32 %r2, %r3, 7, %p1;"
    assert per_thread(body, x).tolist() == [0xFFFFFFFF] * 32 + [7] * 32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loops_of_different_lengths(schedule):
    """Collatz: every lane leaves the loop at its own time."""
    x = RANDOM.integers(1, 500, 96)
    body = """mov.u32 %r2, 0;
    again: setp.eq.u32 %p1, %r1, 1; @%p1 bra done;
        and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra even;
        mad.lo.u32 %r1, %r1, 3, 1; bra.uni next;
    even: shr.u32 %r1, %r1, 1;
    next: add.u32 %r2, %r2, 1; bra again;
    done: """

    def steps(v):
        return 0 if v == 1 else 1 + steps(v // 2 if v % 2 == 0 else 3 * v + 1)

    expected = [steps(int(v)) for v in x]
    assert per_thread(body, x, grid=3, schedule=schedule).tolist() == expected


def test_jump_tables_and_guarded_exits():
    x = RANDOM.integers(0, 3, 64)
    body = """targets: .branchtargets one, two, three;
        mov.u32 %r2, 0; brx.idx %r1, targets;
    one: mov.u32 %r2, 11; bra end;
    two: mov.u32 %r2, 22; bra end;
    three: mov.u32 %r2, 33;
    end: """
    assert per_thread(body, x).tolist() == [[11, 22, 33][v] for v in x]
    leave = "mov.u32 %r2, 5; setp.eq.u32 %p1, %r1, 1; st.global.u32 [%rd11], %r2; @%p1 exit;"
    result = per_thread(leave + "mov.u32 %r2, 6;", x)
    assert result.tolist() == [5 if v == 1 else 6 for v in x]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_shuffle_behind_a_branch_waits_for_both_sides(schedule):
    """The two sides of a branch call collectives of their own, then meet in one."""
    x = np.arange(64)
    body = """setp.lt.u32 %p1, %r43, 16; @%p1 bra low;
        redux.sync.add.u32 %r2, %r1, 0xFFFF0000; bra both;
    low: redux.sync.add.u32 %r2, %r1, 0x0000FFFF;
    both: shfl.sync.bfly.b32 %r2, %r2, 16, 31, -1;"""
    sums = x.reshape(2, 2, 16).sum(2)
    expected = np.repeat(sums[:, ::-1].reshape(-1), 16)
    np.testing.assert_array_equal(per_thread(body, x, schedule=schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_barriers_meet_from_different_instructions(schedule):
    body = """setp.lt.u32 %p1, %r43, 16; @%p1 bra low;
        bar.warp.sync -1; mov.u32 %r2, 1; bra end;
    low: bar.warp.sync -1; mov.u32 %r2, 2;
    end: """
    expected = [2 if t % 32 < 16 else 1 for t in range(64)]
    assert per_thread(body, np.zeros(64), schedule=schedule).tolist() == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_of_many_blocks(schedule):
    """Some blocks go round the barrier more often than others."""
    x = np.repeat(np.arange(6), 64)
    body = """mov.u32 %r2, 0; mov.u32 %r3, 0;
    again: setp.gt.u32 %p1, %r3, %r1; @%p1 bra end;
        setp.gt.u32 %p2, %r43, 9; bar.red.popc.u32 %r4, 0, %p2; add.u32 %r2, %r2, %r4;
        add.u32 %r3, %r3, 1; bra again;
    end: """
    result = per_thread(body, x, grid=6, schedule=schedule)
    np.testing.assert_array_equal(result, (x + 1) * 44)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cluster_barriers_of_a_single_block(schedule):
    body = """mov.u64 %rd12, buffer; mad.wide.u32 %rd13, %r0, 4, %rd12; st.shared.u32 [%rd13], %r1;
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        cvt.u32.u64 %r3, %rd12; mapa.shared::cluster.u32 %r3, %r3, 0;
        sub.u32 %r4, 95, %r0; mad.lo.u32 %r3, %r4, 4, %r3; ld.shared::cluster.u32 %r2, [%r3];"""
    x = RANDOM.integers(0, 1 << 32, 96)
    shared = ".shared .align 4 .b8 buffer[384];\n"
    np.testing.assert_array_equal(per_thread(shared + body, x, schedule=schedule), x[::-1])


def test_partial_warps_may_not_multiply():
    body = """setp.gt.u32 %p1, %r43, 3;
        @%p1 bra end; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];
    end: """
    with pytest.raises(ptx.MaskError, match="has exited"):
        per_thread(body + "mov.u32 %r2, 0;", np.zeros(32))


def test_special_registers():
    for name, expected in (
        ("%laneid", lambda t: t % 32),
        ("%warpid", lambda t: t % 64 // 32),
        ("%lanemask_lt", lambda t: (1 << t % 32) - 1),
        ("%lanemask_ge", lambda t: 0xFFFFFFFF & ~((1 << t % 32) - 1)),
        ("%lanemask_eq", lambda t: 1 << t % 32),
        ("%ctaid.x", lambda t: t // 64),
        ("%nctaid.x", lambda t: 2),
        ("%ntid.y", lambda t: 1),
    ):
        result = per_thread(f"mov.u32 %r2, {name};", np.zeros(128), grid=2)
        assert result.tolist() == [expected(t) for t in range(128)], name


def test_blocks_of_three_dimensions():
    y = np.zeros((2, 3, 4, 2, 5), np.uint32)  # grid z is 1: [grid y, grid x, z, y, x]
    body = """mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.z;
        mov.u32 %r4, %tid.y; mov.u32 %r5, %tid.x;
        mad.lo.u32 %r6, %r1, 3, %r2; mad.lo.u32 %r6, %r6, 4, %r3; mad.lo.u32 %r6, %r6, 2, %r4;
        mad.lo.u32 %r6, %r6, 5, %r5; mad.wide.u32 %rd10, %r6, 4, %rd0;
        st.global.u32 [%rd10], %r6;"""
    kernel(body, 1).launch("k", (3, 2), (5, 2, 4), [y])
    np.testing.assert_array_equal(y.reshape(-1), np.arange(y.size))
