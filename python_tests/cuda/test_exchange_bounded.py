"""A layer's exchange under a bound: recorded once for all ranks, before anything of it has run, and
run again and again with other routings, as a CUDA graph would be. Whatever the host read of them
would be wrong."""

from __future__ import annotations

import pytest
import torch

from moekernels.parallel import expert
from moekernels.parallel.bound import Bound
from moekernels.parallel.mesh import Group
from python_tests.support import emulated
from python_tests.support.devices import emulated_devices
from python_tests.support.virtual_ranks import MODES, Ranks, SlabsOfDevices, all_ids, same

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
PEERS, EXPERTS = 2, 2


def routings(*names: str) -> list[Ranks]:
    """Of the same numbers of tokens, in two choices each."""
    found = []
    for seed, name in enumerate(names):
        ids = all_ids("ordinary", PEERS, EXPERTS)
        if name == "other":
            ids = [i.flip(0) for i in ids]
        if name == "one_rank":
            ids = [i % EXPERTS for i in ids]
        if name == "dropped":
            for i in ids:
                i[::2, 1] = -1
        found.append(Ranks(ids, EXPERTS, torch.float32))
        found[-1].x = [x + seed for x in found[-1].x]
    return found


@pytest.mark.parametrize("how", [MODES[0], MODES[3]], ids=["in turn", "by chance, late"])
def test_a_bounded_layer_is_recorded_once_for_all_routings(how, monkeypatch) -> None:
    first, *others = routings("ordinary", "dropped", "one_rank", "other")
    rows = max(i.numel() for i in first.ids)
    x, weights, routed = first.x, first.weights, first.routings
    with emulated_devices(**how) as devices, SlabsOfDevices(devices.emulator, PEERS) as slabs:
        groups = [Group(None, p, PEERS, (0, 1), device_memory=slabs.of(p)) for p in range(PEERS)]
        told = []
        for p, group in enumerate(groups):
            bound = Bound(1.5, group, torch.device("cpu"))
            bound.rows = rows
            object.__setattr__(group, "bound", bound)
            monkeypatch.setattr(expert.ops, "route", lambda *_, p=p: routed[p])
            with devices.on(p):
                plan = expert.ExchangePlan.make(first.ids[p], EXPERTS, group)
                come = plan.exchange.post_out(x[p], weights[p], plan).wait()
                home = plan.exchange.post_back(come.rows, None, plan).wait()
            assert plan.exchange.blind and come.rows.shape[0] == bound.room()
            told.append((bound, come, home))
        for number, now in enumerate([first, *others]):
            if number:
                for mine, theirs in (x, now.x), (weights, now.weights), *zip(routed, now.routings):
                    for a, b in zip(mine, theirs):
                        a.copy_(b)
            for bound, _, _ in told:
                bound.fits(0.0), bound.counter.zero_()
            devices.run(again=True)
            lost, most = 0, max(len(e[0]) for e in now.expected())
            for p, (bound, come, home) in enumerate(told):
                room, (here, here_weights, offsets) = bound.room(), now.expected()[p]
                assert bound.counter.item() == most
                assert bound.needed() == (most / rows if most > room else 0)
                same(come[:2], [here[:room], here_weights[:room]])
                assert torch.equal(come.offsets, offsets.clamp(max=room))
                sent = x[p][routed[p].slot_of[: int(routed[p].counts.sum())].long() // 2]
                if most <= room:
                    same([home.rows], [sent])
                else:  # each row came home, or zeros did
                    left_out = (home.rows[: len(sent)] == 0).all(1)
                    assert (left_out | (home.rows[: len(sent)] == sent).all(1)).all()
                    lost += int(left_out.sum())
            assert lost == max(0, most - room)
    assert [len(r) for r in slabs.made] == [PEERS] * 2  # for the counts, and for the rows
