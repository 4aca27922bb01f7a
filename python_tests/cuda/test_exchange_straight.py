"""A layer's experts in one go between the two ways of an exchange (`parallel/straight.py`) under a
bound, as GPUs would run it: recorded once for all ranks, forward and backward, nothing read by the
host, in the bits of the steps one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.parallel import device_exchange, expert, straight
from moekernels.parallel.bound import Bound
from moekernels.parallel.mesh import Group
from python_tests.support import emulated
from python_tests.support.counting import HostReads
from python_tests.support.devices import Devices, emulated_devices
from python_tests.support.exchanges import in_steps
from python_tests.support.spec import randn
from python_tests.support.virtual_ranks import MODES, Ranks, SlabsOfDevices

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
HIDDEN, WIDTH, EXPERTS = 16, 24, 2


def parameters(p: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"w1": (2 * WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
    return {
        name: randn(dtype, EXPERTS, *shape, seed=100 * p + i, scale=0.3).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


class Recorded:
    """The layer of all ranks. The weights' own gradients, which torch's kernels gather, are left
    out: those would run while the rest is recorded."""

    def __init__(self, devices: Devices, slabs: SlabsOfDevices, layer, ranks: Ranks, monkeypatch):
        peers, reads = ranks.peers, HostReads()
        every = tuple(range(peers))
        groups = [Group(None, p, peers, every, device_memory=slabs.of(p)) for p in every]
        self.x = [x.clone().requires_grad_() for x in ranks.x]
        self.dout = [randn(ranks.dtype, *x.shape, seed=7 + p) for p, x in enumerate(ranks.x)]
        self.learnt = [parameters(p, ranks.dtype) for p in every]
        self.out: list[Tensor] = []
        for p, group in enumerate(groups):
            bound = Bound(1.0, group, torch.device("cpu"))
            bound.rows = max(i.numel() for i in ranks.ids)
            object.__setattr__(group, "bound", bound)
            device_exchange.stamps_of(group)
            monkeypatch.setattr(expert.ops, "route", lambda *_, p=p: ranks.routings[p])
            with devices.on(p), reads:
                plan = expert.ExchangePlan.make(ranks.ids[p], EXPERTS, group)
                self.out.append(layer(self.x[p], ranks.weights[p], plan, **self.learnt[p]))
        self.grads = []
        for p in every:
            with devices.on(p), reads:  # not accumulated: that would copy what is not there yet
                wanted = [self.x[p], *self.learnt[p].values()]
                self.grads.append(torch.autograd.grad(self.out[p], wanted, self.dout[p]))
        self.reads = reads.reads

    def found(self) -> list[list[Tensor]]:
        return [[out.detach(), *grads] for out, grads in zip(self.out, self.grads)]


def even(peers: int) -> list[Tensor]:
    """Both experts of the ranks in turn: as many rows come to each rank as it sends, and a bound of
    1 leaves none unwritten."""
    first = [EXPERTS * (torch.arange(2 * peers) + p) % (EXPERTS * peers) for p in range(peers)]
    return [torch.stack([f, f + 1], 1).int() for f in first]


@pytest.mark.parametrize("how", [MODES[3]], ids=["by chance, late"])
def test_nothing_is_read_by_the_host_and_the_bits_are_those_of_the_steps(how, monkeypatch):
    results, peers = [], 2
    for layer in (in_steps, straight.experts):
        ranks = Ranks(even(peers), EXPERTS, torch.float32, HIDDEN)
        with emulated_devices(**how) as devices, SlabsOfDevices(devices.emulator, peers) as slabs:
            recorded = Recorded(devices, slabs, layer, ranks, monkeypatch)
            assert recorded.reads == []
            devices.run()
            results.append(recorded.found())
    for mine, theirs in zip(*results):
        assert all(map(torch.equal, mine, theirs)) and all(t.any() for t in mine)


def test_a_read_by_the_host_is_counted():
    x = torch.arange(3.0)
    with HostReads() as counted:
        x.sum().item(), x.cpu(), x.nonzero(), x[x > 1], bool(x[0])
        assert len({*counted.reads}) >= 4
    before = list(counted.reads)
    x.sum().item()
    assert counted.reads == before
