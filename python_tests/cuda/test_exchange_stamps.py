"""Stamps that the kernels of an exchange make, on the clocks of emulated devices: a peer that is
late shows as that, by as much, whatever its clock says; stamps that are wrong do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ptx_emulator as ptx
from moekernels.ops import exchange_clock
from moekernels.parallel import device_exchange, expert
from moekernels.parallel.bound import Bound
from moekernels.parallel.measure import Measure, Times
from moekernels.parallel.mesh import Group
from python_tests.support import emulated, planted
from python_tests.support.devices import Devices, emulated_devices
from python_tests.support.virtual_ranks import Ranks, SlabsOfDevices, all_ids

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
EXPERTS, DELAY = 2, 200_000  # of the emulator's steps, which its clocks count


def clocks(devices: Devices, slabs: SlabsOfDevices, peers: int) -> list[list[int]]:
    """Of each rank: by how much the others' clocks are ahead, and the time."""
    found = []
    for p in range(peers):
        words, addresses = slabs.of(p).allocate(exchange_clock.bytes_of(peers))
        with devices.on(p):
            found.append(exchange_clock.read_clocks(words, addresses, p, 0, None))
    for _ in range(2):  # nothing is reset in between
        devices.run(again=True)
    return [x.tolist() for x in found]


@pytest.mark.parametrize("peers, how", [(2, {}), (3, {"schedule": 3}), (8, {})])
def test_ranks_find_out_what_their_clocks_differ_by(peers, how):
    ahead = {p: (-1) ** p * 10_000_000 * p for p in range(peers)}
    with emulated_devices(**how) as devices, SlabsOfDevices(devices.emulator, peers) as slabs:
        devices.ahead = {p: off + 10**9 for p, off in ahead.items()}
        found = clocks(devices, slabs, peers)
    for p, (*mine, now) in enumerate(found):
        assert mine[p] == 0
        for other, off in enumerate(mine):
            assert off == pytest.approx(ahead[other] - ahead[p], abs=20_000)
            assert off == -found[other][p]
            assert found[other][-1] - off == pytest.approx(now, abs=200_000)


@pytest.mark.parametrize("wrong", ["st.relaxed.sys", "st.release.gpu"])
def test_times_that_nobody_released_are_races(wrong, monkeypatch):
    replaced(monkeypatch, "exchange_clock", "st.release.sys", wrong)
    with emulated_devices() as devices, SlabsOfDevices(devices.emulator, 2) as slabs:
        with pytest.raises(ptx.GlobalRace):
            clocks(devices, slabs, 2)


def replaced(monkeypatch, stem: str, before: str, after: str) -> None:
    text, own = emulated.source(stem), emulated.module
    assert before in text
    wrong = ptx.Module(text.replace(before, after))
    monkeypatch.setattr(emulated, "module", lambda name: wrong if name == stem else own(name))


def measured(monkeypatch, late: str, delay: int, peers: int = 2, **how) -> list[Measure]:
    """Of each rank, behind dispatch and combine of two layers. The last rank is late, before its
    counts, its rows, or its results."""
    ranks = Ranks(all_ids("ordinary", peers, EXPERTS), EXPERTS, torch.float32)
    with emulated_devices(**how) as devices, SlabsOfDevices(devices.emulator, peers) as slabs:
        devices.ahead = {p: 10**12 - 10**10 * p for p in range(peers)}
        every = tuple(range(peers))
        groups = [Group(None, p, peers, every, device_memory=slabs.of(p)) for p in every]
        taken = [Measure(g, None, device_exchange.stamps_of(g)) for g in groups]
        for group in groups:
            bound = Bound(float(peers), group, torch.device("cpu"))
            bound.rows = max(i.numel() for i in ranks.ids)
            object.__setattr__(group, "bound", bound)
        for layer in range(2):
            for p, group in enumerate(groups):
                monkeypatch.setattr(expert.ops, "route", lambda *_, p=p: ranks.routings[p])

                def hold(moment: str, p: int = p, layer: int = layer) -> None:
                    if delay and (moment, layer, p) == (late, 1, peers - 1):
                        devices.delay(p, delay)

                with devices.on(p):
                    hold("counts")
                    plan = expert.ExchangePlan.make(ranks.ids[p], EXPERTS, group, layer=layer)
                    hold("rows")
                    pending = plan.exchange.post_out(ranks.x[p], ranks.weights[p], plan)
                    come = pending.wait()
                    hold("results")
                    plan.exchange.post_back(come.rows, None, plan).wait()
        devices.run()
        found = []
        for p, measure in enumerate(taken):
            with devices.on(p):
                found.append(measure.device.meet())
        devices.run()
        for ahead, measure in zip(found, taken):
            measure.device.copy(ahead)
    return taken


def held(taken: list[Measure], late: str, delay: int) -> list[Times]:
    """What the stamps of such a run must say."""
    times = [measure.take() for measure in taken]
    for rank, (measure, mine) in enumerate(zip(taken, times)):
        labels = [s.label for s in measure.stamps]
        assert labels == [-2, 0, 1, -2, 4, 5]
        for s in measure.stamps:
            assert max(s.post, s.last) <= s.ready and s.need <= s.got and 0 <= s.moving < delay
        ordered = [s.need for s in measure.stamps]
        assert ordered == sorted(ordered)
        assert all(s.ready < s.got + 0.2 * delay for s in measure.stamps[:3])
        at = {"counts": 3, "rows": 4, "results": 5}[late]
        own = measure.stamps[at].need - measure.stamps[at - 1].got  # passed meanwhile
        wanted = 0 if rank == len(taken) - 1 else delay - own
        for found in (1e9 * mine.skew, measure.stamps[at].late):
            assert found == pytest.approx(wanted, abs=0.1 * delay)
        assert 1e9 * mine.flight < 0.5 * delay and 1e9 * mine.hidden < 0.1 * delay
    return times


@pytest.mark.parametrize(
    "late, peers, how",
    [
        ("counts", 2, {}),
        ("rows", 3, {"schedule": 1}),
        ("results", 2, {"schedule": 2, "lazy": True}),
    ],
)
def test_a_late_peer_is_skew_and_nothing_else(late, peers, how, monkeypatch):
    held(measured(monkeypatch, late, DELAY, peers, **how), late, DELAY)


# Lines of the kernels that are exchanged, and who is late where it shows.
_WAIT = """\
          wait(peers, counter, before + static_cast<uint32_t>((end - begin) * args.units));
"""
PLANTED = {
    "asked_behind_the_wait": (
        "rows",
        "          const int64_t now = peers.stamped() ? nanoseconds() : 0;\n" + _WAIT,
        _WAIT + "          const int64_t now = peers.stamped() ? nanoseconds() : 0;\n",
    ),
    "began_when_it_ended": (
        "rows",
        "*peers.stamps(to).began(peers.rank) = Record::early(*stamps.sending());",
        "*peers.stamps(to).began(peers.rank) = nanoseconds() + 60000;",
    ),
    "counts_stamped_here_alone": (
        "counts",
        "const Record there = peers.stamps(threadIdx.x);",
        "const Record there = peers.stamps(rank);",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_stamps_that_are_wrong_are_found(bug, monkeypatch, tmp_path: Path):
    late, right, wrong = PLANTED[bug]
    planted.copy_headers(emulated.ROOT, tmp_path)
    shutil.copy(emulated.ROOT / "csrc" / "cuda" / "exchange.cu", tmp_path)
    planted.plant(tmp_path, "exchange.cu", (right, wrong))
    module, own = ptx.Module(emulated.compiled(tmp_path / "exchange.cu")), emulated.module
    monkeypatch.setattr(emulated, "module", lambda s: module if s == "exchange" else own(s))
    with pytest.raises((AssertionError, ptx.GlobalRace)):
        held(measured(monkeypatch, late, DELAY), late, DELAY)
