"""Several devices with memory that they share: who is ordered after whom, by address and scope."""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import ptx_emulator as ptx
from python_tests.support.ptx_ops import kernel

KERNELS = Path(__file__).parent / "kernels"
pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
WIDTH, EXPERTS, EXCHANGES = 32, 2, 2
MODES = [{}, {"lazy": True}, {"schedule": 1}, {"schedule": 2, "lazy": True}]

# In the order of the kernel's enum: what must be said, rows put by bulk copies or plain stores.
BUGS = {
    "flag_before_data": ("race|not waited for", True),
    "relaxed_red": ("race", True),
    "red_of_device": ("race", True),
    "acquire_of_device": ("race", True),
    "relaxed_load": ("race", True),
    "no_wait_group": ("race|not waited for", True),
    "fence_by_one_lane": ("race", False),
    "no_proxy_fence": ("no fence.proxy.async in between", True),
    "slot_not_freed": ("race", True),
    "one_too_few": ("race", True),
    "past_the_cap": ("write of 16 bytes at byte", True),
    "empty_forgotten": ("polls byte", True),
    "idle_rank_returns": ("polls byte", True),
    "counter_reset": ("polls byte|race", True),
    "byte_flags": ("one word of", True),
}


@cache
def module_of_peers() -> ptx.Module:
    return ptx.load(KERNELS / "peers.cu", arch="90a")


def counts_of(peers: int) -> np.ndarray:
    """[P, P*e] rows: rank 1 has no tokens, the last expert gets nothing, the rest are uneven."""
    counts = np.arange(1, peers * peers * EXPERTS + 1).reshape(peers, -1) % 3
    counts[1] = 0
    counts[:, -1] = 0
    return counts.astype(np.int32)


def exchange(peers: int = 2, bug: str = "none", bulk: bool = True, order: str = "put", **how):
    """Two exchanges over one slot: [(what each rank took, what it should have)]."""
    module = module_of_peers()
    numbers = {"none": 0} | {name: i + 1 for i, name in enumerate(BUGS)}
    counts, random = counts_of(peers), np.random.default_rng(0)
    rows = counts.reshape(peers, peers, EXPERTS)
    taken = [int(rows[:, p].sum()) for p in range(peers)]
    cap = max(taken) - (bug == "past_the_cap")
    slabs = [np.zeros(128 + cap * WIDTH * 4, np.uint8) for _ in range(peers)]
    pointers = [s.__array_interface__["data"][0] for s in slabs]
    tickets = [np.zeros(1, np.uint32) for _ in range(peers)]
    launches, results = [], []
    for number in range(1, EXCHANGES + 1):
        x = [random.standard_normal((int(c.sum()), WIDTH)).astype(np.float32) for c in counts]
        x = [np.concatenate([v, np.zeros((1, WIDTH), np.float32)]) for v in x]  # never empty
        for rank in range(peers):
            raw = struct.pack("8q4i", *pointers, *[0] * (8 - peers), rank, peers, numbers[bug], 0)
            own = ptx.Packed(raw, slabs)
            out = np.zeros((cap + 1, WIDTH), np.float32)
            put = [own, x[rank], counts, EXPERTS, number, cap, int(bulk)]
            take = [own, out, counts, tickets[rank], number, cap]
            both = [
                ptx.Launch(rank, module, "put", 2, 64, put, stream=1),
                ptx.Launch(rank, module, "take", EXPERTS, WIDTH, take),
            ]
            launches += both if order == "put" else both[::-1]
            parts = [
                x[s][(at := int(counts[s, : p * EXPERTS + e].sum())) : at + rows[s, p, e]]
                for p in [rank]
                for e in range(EXPERTS)
                for s in range(peers)
            ]
            results.append((out, np.concatenate(parts)))
    ptx.launch_together(launches, **how)
    return [(out[: len(e)], e) for out, e in results]


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("peers", [2, 3])
@pytest.mark.parametrize("how", MODES)
def test_rows_arrive(how, peers, bulk):
    for out, expected in exchange(peers, bulk=bulk, **how):
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug):
    """On at least 3 of 4 schedules."""
    words, bulk = BUGS[bug]
    found = 0
    for how in MODES:
        if found == 3:
            break
        try:
            exchange(3 if bug == "one_too_few" else 2, bug, bulk, **how)
        except ptx.PtxError as error:
            found += 1
            assert re.search(words, str(error)), error
    assert found >= 3, f"{found} of {len(MODES)}"


@pytest.mark.parametrize("how", MODES)
def test_a_launch_that_fills_the_device_starves_what_it_waits_for(how):
    """The put goes first, into a device with room for it and one block more; or it never starts."""
    for out, expected in exchange(resident=3, **how):
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(ptx.Deadlock, match="2 blocks of put have no room on device 0 .resident=2"):
        exchange(order="take", resident=2, **how)


_PLAIN, _FENCE = "st.global.u32 [%rd0], 7;", "fence.acq_rel.sys;"
_POLL = "again: {} setp.eq.u32 %p1, %r1, 0; @%p1 bra again;"
_READ = "ld.global.u32 %r2, [%rd0]; st.global.u32 [%rd2], %r2;"


@pytest.mark.parametrize(
    "writes, reads, devices, ordered",
    [
        ("st.release.sys.global.u32", "ld.acquire.sys.global.u32", 2, True),
        ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32", 1, True),
        ("st.release.cta.global.u32", "ld.acquire.gpu.global.u32", 1, False),
        ("st.release.gpu.global.u32", "ld.acquire.sys.global.u32", 2, False),
        ("st.release.sys.global.u32", "ld.volatile.global.u32", 2, False),
        ("st.volatile.global.u32", "ld.acquire.sys.global.u32", 2, False),
        (_FENCE + "st.relaxed.sys.global.u32", "ld.acquire.sys.global.u32", 2, True),
        ("fence.acq_rel.gpu; st.relaxed.sys.global.u32", "ld.acquire.sys.global.u32", 2, False),
        ("membar.sys; st.volatile.global.u32", "ld.volatile.global.u32", 2, None),
        ("red.release.sys.global.add.u32", "ld.acquire.sys.global.u32", 2, True),
        ("red.relaxed.sys.global.add.u32", "ld.acquire.sys.global.u32", 2, False),
    ],
)
@pytest.mark.parametrize("how", MODES)
def test_a_message_is_ordered_by_both_scopes(writes, reads, devices, ordered, how):
    """None: by a fence of the reader's as well."""
    write = kernel(f"mov.u32 %r1, 1; {_PLAIN} {writes} [%rd1], %r1;", 2)
    data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))

    def run(fence):
        flag[:] = data[:] = 0
        read = kernel(_POLL.format(f"{reads} %r1, [%rd1];") + fence + _READ, 3)
        launches = [
            ptx.Launch(0, write, "k", 1, 1, [data, flag], stream=1),
            ptx.Launch(devices - 1, read, "k", 1, 1, [data, flag, out]),
        ]
        ptx.launch_together(launches, **how)
        assert out[0] == 7

    if ordered is None:
        run(_FENCE)
    if ordered:
        run("")
    else:
        with pytest.raises(ptx.GlobalRace):
            run("")


def test_a_stream_orders_its_launches_and_an_atomic_carries_on_what_came_before():
    write = kernel(_PLAIN, 1)
    signal = kernel("mov.u32 %r1, 1; red.release.sys.global.add.u32 [%rd1], %r1;", 2)
    relay = kernel("mov.u32 %r1, 2; red.relaxed.sys.global.add.u32 [%rd1], %r1;", 2)
    poll = "again: ld.acquire.sys.global.u32 %r1, [%rd1]; setp.lt.u32 %p1, %r1, 3; @%p1 bra again;"
    read = kernel(poll + _READ, 3)
    for how in MODES:
        data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
        launches = [
            ptx.Launch(0, write, "k", 1, 1, [data]),
            ptx.Launch(0, signal, "k", 1, 1, [data, flag]),
            ptx.Launch(1, relay, "k", 1, 1, [data, flag]),
            ptx.Launch(2, read, "k", 1, 1, [data, flag, out]),
        ]
        ptx.launch_together(launches, **how)
        assert out[0] == 7 and flag[0] == 3


def test_lanes_that_add_to_one_word_in_one_instruction_are_awaited_together():
    """And the one that comes last is behind the others, whoever that is."""
    add = kernel(
        """mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.u32 [%rd10], %r0; mov.u32 %r1, 1;
        red.release.sys.global.add.u32 [%rd1], %r1;
        atom.acq_rel.gpu.global.add.u32 %r2, [%rd2], 1; setp.lt.u32 %p1, %r2, 63; @%p1 ret;
        st.global.u32 [%rd2], 0;""",
        3,
    )
    read = kernel(
        """again: ld.acquire.sys.global.u32 %r1, [%rd1]; setp.lt.u32 %p1, %r1, 64; @%p1 bra again;
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r2, [%rd10];
        mad.wide.u32 %rd10, %r0, 4, %rd2; st.global.u32 [%rd10], %r2;""",
        3,
    )
    for how in MODES:
        data, out = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
        flag, ticket = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        launches = [
            ptx.Launch(0, add, "k", 1, 64, [data, flag, ticket]),
            ptx.Launch(1, read, "k", 1, 64, [data, flag, out]),
        ]
        ptx.launch_together(launches, **how)
        assert out.tolist() == list(range(64)) and ticket[0] == 0


def test_one_word_is_signalled_in_one_size():
    both = "ld.relaxed.sys.global.u32 %r1, [%rd0]; ld.relaxed.sys.global.u8 %r2, [%rd0+1];"
    with pytest.raises(ptx.GlobalRace, match="one word of 1 bytes here, and of 4 bytes elsewhere"):
        ptx.launch_together([ptx.Launch(0, kernel(both, 1), "k", 1, 1, [np.zeros(1, np.uint32)])])


def test_too_many_threads_to_follow():
    spin = kernel("", 1)
    with pytest.raises(ptx.PtxError, match="32768 threads run together, at most 16384 can"):
        ptx.launch_together([ptx.Launch(0, spin, "k", 32, 1024, [np.zeros(1, np.uint32)])])
