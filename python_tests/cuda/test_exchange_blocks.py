"""Rows that come home, counted by blocks: those of a block are taken when it is here, whatever is
still on its way; and a count that is wrong is found. The routings of `test_exchange_emulated.py`
and `test_exchange_products.py` with many rows hold the bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ptx_emulator as ptx
from moekernels.ops import exchange, exchange_clock
from python_tests.support import emulated, planted
from python_tests.support.virtual_ranks import MODES, Ranks, aligned, same

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
BLOCK = 64


def ranks_of(own: int, far: int) -> Ranks:
    """Two, an expert each; of each one's rows `own` are for its own, `far` for the other's."""
    ids = [[[p]] * own + [[1 - p]] * far for p in range(2)]
    return Ranks([torch.tensor(i, dtype=torch.int32) for i in ids], 1, torch.float32)


def test_a_late_peer_holds_up_its_own_blocks_alone():
    """Rank 0's first block of results is its own; the peer's, behind it, comes late."""
    delay, waited = 100_000, []
    ranks = ranks_of(BLOCK, 2)
    width = exchange_clock.record_words(2)
    records = [aligned(8 * width) for _ in range(2)]
    addresses = tuple(r.data_ptr() for r in records)
    with ranks.devices() as devices:
        for memory in records:
            devices.emulator.know(memory, lasts=True)
        ranks.gather(devices)
        outputs, home = [], []
        for p in range(2):
            with devices.on(p):
                ranks.put(p, ranks.x[p], None)
                outputs.append(ranks.take(p, BLOCK + 2, False)[0])
        devices.run()
        for p in range(2):
            slabs = ranks.slabs[p]._replace(record=addresses)
            with devices.on(p):
                if p == 1:
                    devices.delay(p, delay)
                exchange.push(outputs[p], None, ranks.known[p], slabs, 0)
                like, size = outputs[p], BLOCK + 2
                home.append(
                    exchange.take_home(like, ranks.known[p], slabs, 0, size, weighted=False)
                )
        devices.run()
        for memory in records:
            del devices.emulator.lasting[memory.data_ptr()]
    for p in range(2):
        same([home[p][0]], [ranks.x[p][ranks.routings[p].slot_of.long()]])
        readers, total = records[p].view(torch.int64)[[4, 3]].tolist()
        assert readers == 9  # warps, of 8 rows each: the last has the second block's two
        waited.append(total)
    assert waited[0] == pytest.approx(delay, rel=0.2)
    assert waited[1] < 0.2 * delay


# Lines that are exchanged, and what is said; both ways of a wait that nobody ends are told apart.
PLANTED = {
    "one_short": (
        "common/home.cuh",
        "rows_of_block(block, begin, count) * units)",
        "rows_of_block(block, begin, count) * units - (block == 1))",
        ptx.Deadlock,
    ),
    "another_block": (
        "common/home.cuh",
        "owner.returned(slot, block)",
        "owner.returned(slot, block ^ 1)",
        (ptx.Deadlock, ptx.GlobalRace),
    ),
    "all_in_the_first": (
        "common/home.cuh",
        "block * kHomeRows < begin + count; ++block",
        "block == begin / kHomeRows; ++block",
        ptx.Deadlock,
    ),
    "waits_for_the_block_before": (
        "exchange.cu",
        "args.back ? own.returned(args.slot, group) :",
        "args.back ? own.returned(args.slot, group > 0 ? group - 1 : 0) :",
        ptx.GlobalRace,
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_counts_that_are_wrong_are_found(bug, monkeypatch, tmp_path: Path):
    """On at least 3 of 4 schedules."""
    file, right, wrong, error = PLANTED[bug]
    planted.copy_headers(emulated.ROOT, tmp_path)
    shutil.copy(emulated.ROOT / "csrc" / "cuda" / "exchange.cu", tmp_path)
    planted.plant(tmp_path, file, (right, wrong))
    module, own = ptx.Module(emulated.compiled(tmp_path / "exchange.cu")), emulated.module
    monkeypatch.setattr(emulated, "module", lambda s: module if s == "exchange" else own(s))
    found = 0
    for how in MODES:
        late = bug == "waits_for_the_block_before"  # the second block, a peer's
        ranks = ranks_of(BLOCK, 2) if late else ranks_of(5, BLOCK)
        size = len(ranks.ids[0])
        with ranks.devices(**how) as devices:
            ranks.gather(devices)
            for p in range(2):
                with devices.on(p):
                    ranks.put(p, ranks.x[p], None)
                    rows, _ = ranks.take(p, size, False)
                    known, slabs = ranks.known[p], ranks.slabs[p]
                    if late and p == 1:
                        devices.delay(p, 20_000)
                    exchange.push(rows, None, known, slabs, 0)
                    exchange.take_home(rows, known, slabs, 0, size, weighted=False)
            try:
                devices.run()
            except error:
                found += 1
        if found == 3:
            return
    raise AssertionError(f"found on {found} of {len(MODES)} schedules")
