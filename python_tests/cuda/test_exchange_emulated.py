"""The exchange through memory that devices share: virtual ranks in the emulator, held bit for bit
to the exchange over packed messages and to the one of ranks on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import ptx_emulator as ptx
from moekernels.ops import exchange
from moekernels.parallel.expert import ExchangePlan
from moekernels.parallel.mesh import Group
from moekernels.parallel.peers import PeerMemory
from python_tests.support import emulated
from python_tests.support.devices import Devices
from python_tests.support.virtual_ranks import (
    HIDDEN,
    MODES,
    ROUTINGS,
    Ranks,
    all_ids,
    arrived,
    same,
)

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
DTYPES = (torch.float32, torch.bfloat16)
CASES = [(2, name, dtype) for name in ROUTINGS for dtype in DTYPES]
CASES += [(p, "many", DTYPES[p % 2]) for p in (2, 3, 8)]
CASES += [(p, name, DTYPES[(i + p) % 2]) for p in (3, 8) for i, name in enumerate(ROUTINGS)]


@pytest.mark.parametrize("peers, name, dtype", CASES)
def test_rows_go_where_the_exchange_of_messages_takes_them(peers, name, dtype):
    """Out, then back with other rows: every schedule is one of the routings'."""
    experts = 1 if peers == 8 else 2
    ranks = Ranks(all_ids(name, peers, experts), experts, dtype)
    how = MODES[(*ROUTINGS, "many").index(name) % len(MODES)]
    expected = ranks.expected()
    with ranks.devices(**how) as devices:
        ranks.gather(devices)
        outputs = []
        for p in range(peers):
            with devices.on(p):
                ranks.put(p, ranks.x[p], ranks.weights[p])
                outputs.append(arrived(ranks, p, len(expected[p][0]) + 3))
        devices.run()
        for p in range(peers):
            same(outputs[p], expected[p])
            most = [max(len(e[0]) for e in expected), max(int(c.sum()) for c in ranks.counts)]
            assert ranks.known[p].needed.tolist() == most
        # Home: what the rows' owners sent, but with the rank that had them added to it.
        home = []
        for p in range(peers):
            with devices.on(p):
                rows, weights = outputs[p][0], outputs[p][1] + p
                exchange.push(rows, weights, ranks.known[p], ranks.slabs[p], 0)
                size = ranks.ids[p].numel()
                home.append(
                    exchange.take_home(rows, ranks.known[p], ranks.slabs[p], 0, size, weighted=True)
                )
        devices.run()
    for p in range(peers):
        slots = ranks.routings[p].slot_of.long()
        of = torch.arange(peers).repeat_interleave(ranks.counts[p].view(peers, -1).sum(1))
        used = int(ranks.counts[p].sum())
        x = ranks.x[p][slots[:used] // max(ranks.ids[p].shape[1], 1)]
        same(home[p], [x, ranks.weights[p].flatten()[slots[:used]] + of])


def test_the_exchange_of_ranks_on_a_cpu_gives_the_same_bits():
    ranks = Ranks(all_ids("dropped", 3, 2), 2, torch.float32)
    with ranks.devices(schedule=3) as devices:
        ranks.gather(devices)
        outputs = []
        for p in range(3):
            with devices.on(p):
                ranks.put(p, ranks.x[p], ranks.weights[p])
                outputs.append(arrived(ranks, p, 40))
        devices.run()
    memories = [PeerMemory(range(3), p, space=1 << 24) for p in range(3)]
    for memory in memories:
        memory.connect([os.getpid()] * 3, [m.host.fd for m in memories])
    groups = [Group(None, p, 3, (0, 1, 2), memory) for p, memory in enumerate(memories)]
    plans = [ExchangePlan.make(ids, 2, group) for ids, group in zip(ranks.ids, groups)]
    posted = [
        plan.exchange.post_out(x, weights, plan)
        for plan, x, weights in zip(plans, ranks.x, ranks.weights)
    ]
    for p, pending in enumerate(posted):
        same(outputs[p], pending.wait())
        assert torch.equal(ranks.known[p].came, plans[p].came(plans[p].whole))


def record(
    ranks: Ranks, devices: Devices, exchanges: int, slots: int = 1, home: bool = True
) -> list[list[Tensor]]:
    """Everything of `exchanges`, out and home without weights, before any of it runs: what each
    brings home to each rank. The n-th sends x + n."""
    ranks.gather(devices)
    came_home: list[list[Tensor]] = []
    for number in range(exchanges):
        came_home.append([])
        for p in range(ranks.peers):
            slot, known, slabs = number % slots, ranks.known[p], ranks.slabs[p]
            with devices.on(p):
                ranks.put(p, ranks.sent[number][p], None, slot)
                rows, _ = ranks.take(p, ranks.shape.rows, False, slot)
                if not home:
                    continue
                exchange.push(rows, None, known, slabs, slot)
                size = ranks.ids[p].numel()
                back = exchange.take_home(rows, known, slabs, slot, size, weighted=False)
                came_home[-1].append(back[0])
    return came_home


def check_home(ranks: Ranks, home: list[list[Tensor]]) -> None:
    for number, at_ranks in enumerate(home):
        for p, mine in enumerate(at_ranks):
            used = int(ranks.counts[p].sum())
            token = ranks.routings[p].slot_of[:used].long() // max(ranks.ids[p].shape[1], 1)
            same([mine], [ranks.sent[number][p][token]])


@pytest.mark.parametrize(
    "peers, slots, how", [(2, 1, MODES[0]), (3, 2, MODES[1]), (2, 1, MODES[2]), (3, 2, MODES[3])]
)
def test_slots_are_used_again_when_they_have_been_read(peers, slots, how):
    ranks = Ranks(all_ids("dropped", peers, 2), 2, torch.float32, slots=slots)
    with ranks.devices(**how) as devices:
        home = record(ranks, devices, 3, slots)
        devices.run()
    check_home(ranks, home)


def test_what_was_recorded_can_be_run_again():
    """As a CUDA graph is: the same launches on other rows, nothing read back in between."""
    ranks = Ranks(all_ids("ordinary", 2, 2), 2, torch.float32)
    with ranks.devices(schedule=5) as devices:
        home = record(ranks, devices, 2)
        for _ in range(2):
            for x in (x for sent in ranks.sent for x in sent):
                x.mul_(-2)
            devices.run(again=True)
            check_home(ranks, home)


def test_rows_beyond_the_bound_are_not_written_and_everybody_knows():
    """Then the same with room ends in the same bits; no wait hangs on what was left out."""
    ids = all_ids("one_rank", 3, 2)
    whole = Ranks(ids, 2, torch.float32)
    bound = whole.shape.rows - 7
    ranks = Ranks(ids, 2, torch.float32, rows=bound)
    guard = [m.clone() for m in ranks.memory]
    with ranks.devices(schedule=4) as devices:
        for _ in range(2):
            outputs = []
            ranks.gather(devices)
            for p in range(3):
                with devices.on(p):
                    ranks.put(p, ranks.x[p], ranks.weights[p])
                    outputs.append(ranks.take(p, bound))
            devices.run()
            assert [int(k.needed[0]) for k in ranks.known] == [whole.shape.rows] * 3
            rows, weights, _ = ranks.expected()[1]
            same(outputs[1], [rows[:bound], weights[:bound]])
    # Behind the rows of the slot lie those of the way back, which nobody used.
    line = HIDDEN * 4 * ranks.shape.back
    for before, after in zip(guard, ranks.memory):
        assert torch.equal(before[-line:], after[-line:])


def test_a_wait_that_lasts_says_for_what():
    ranks = Ranks(all_ids("ordinary", 2, 2), 2, torch.float32)
    stuck = torch.zeros(4, dtype=torch.int64)
    slabs = ranks.slabs[0]._replace(patience=200, stuck=stuck)
    with ranks.devices() as devices:
        devices.emulator.know(stuck)
        with devices.on(0):
            exchange.gather_counts(ranks.counts[0], slabs)
        with pytest.raises(ptx.Trap):
            devices.run()
    assert exchange.describe_wait(slabs) == (
        "rank 0 of the exchange waits for the counts of peer 1: the counter is 0, not 1"
    )


# What a text of the kernels' PTX is turned into; all are races.
PLANTED = {
    "relaxed_add": ("red.release.sys", "red.relaxed.sys"),
    "add_of_the_device": ("red.release.sys", "red.release.gpu"),
    "wait_of_the_device": ("ld.acquire.sys", "ld.acquire.gpu"),
    "wait_without_acquiring": ("ld.acquire.sys", "ld.relaxed.sys"),
    "relaxed_store": ("st.release.sys", "st.relaxed.sys"),
    "lanes_not_gathered": ("bar.warp.sync", "// bar.warp.sync"),
    "relaxed_ticket": ("atom.acq_rel.gpu", "atom.relaxed.gpu"),
}


@pytest.mark.parametrize("bug", [*PLANTED, "not_freed", "one_row_too_few"])
def test_bugs_in_the_kernels_are_found(bug, monkeypatch):
    """On at least 3 of 4 schedules: in their text, or in the words that they count by."""
    before, after = PLANTED.get(bug, ("", ""))
    text = emulated.source("exchange")
    assert before in text
    wrong, own = ptx.Module(text.replace(before, after)), emulated.module
    monkeypatch.setattr(emulated, "module", lambda stem: wrong if stem == "exchange" else own(stem))
    found = 0
    ids = all_ids("ordinary", 2, 2)
    if bug == "one_row_too_few":  # rows come one by one
        ids = [torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)] * 2
    for how in MODES:
        if found == 3:
            break
        ranks = Ranks(ids, 2, torch.float32, rows=130)
        for memory in ranks.memory:
            words = memory.view(torch.int32)
            if bug == "one_row_too_few":
                words[640 // 4 + 8 :][:3] = -1  # of the slot's expected: as if one had come
            if bug == "not_freed":
                words[384 // 4 + 3 :][:4] = 9  # of the slot's freed: as if read that often
        with ranks.devices(**how) as devices:
            record(ranks, devices, 2, home=bug != "not_freed")
            try:
                devices.run()
            except ptx.GlobalRace:
                found += 1
    assert found >= 3
