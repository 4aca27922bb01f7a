"""A share of the optimiser's state in the host's memory: the same bits, whatever the share, and
whenever copies are made."""

import pytest
import torch

from moekernels.model.layout import Layout
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.offload import KINDS, Held, OneLane, Streamed
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import shard
from python_tests.support.distributed import run_ranks

SHAPES = {"embed.weight": (40, 24), "layers.1.norm": (23,), "layers.1.w1": (4, 11, 24)}
SHARES = (0.0, 0.3, 0.5, 1.0)


class LateLanes:
    """Two streams that put all off until somebody waits for it: what is not waited for happens
    last."""

    def __init__(self):
        self.queues = {"in": [], "out": []}

    def do(self, lane, work, after):
        self.queues[lane].append((work, list(after)))
        return lane, self.queues[lane][-1]

    def mark(self):
        return None

    def wait(self, event):
        if event is None:
            return
        lane, entry = event
        while any(waiting is entry for waiting in self.queues[lane]):
            work, after = self.queues[lane].pop(0)
            for earlier in after:
                self.wait(earlier)
            work()

    def settle(self):
        for queue in self.queues.values():
            while queue:
                work, after = queue.pop(0)
                for earlier in after:
                    self.wait(earlier)
                work()


@pytest.mark.parametrize("lanes", [OneLane, LateLanes])
def test_chunks_come_and_go_in_order(lanes):
    """Of several buckets, again and again, with more chunks than buffers."""
    streamed = Streamed(torch.device("cpu"), lanes())
    far = [[torch.arange(n).float(), torch.arange(n).double() * 2] for n in (70, 9, 33)]
    expected = [[x * 9 + 4 for x in pair] for pair in far]
    for _ in range(2):
        for pair in far:
            spans = [(a, min(a + 8, len(pair[0]))) for a in range(0, len(pair[0]), 8)]
            for here in streamed.brought(spans, pair):
                for x in here:
                    x.mul_(3).add_(1)
    streamed.lanes.settle()
    for pair, wanted in zip(far, expected):
        assert all(torch.equal(x, y) for x, y in zip(pair, wanted))
    assert streamed.bytes == 2 * 8 * (4 + 8), "two chunks and no more"


def test_parts_of_what_is_held():
    held = Held(torch.arange(5), torch.arange(5, 9))
    for begin in range(10):
        for end in range(begin, 10):
            found = [(a, b, x.tolist()) for (a, b), x in held.parts(begin, end)]
            assert [n for _, _, x in found for n in x] == list(range(begin, min(end, 9)))
            assert all(len(x) == min(b, 9) - a for a, b, x in found)


def trained(share, mesh, *, dtype=torch.float32, state=torch.float32, late=False, **more):
    """An optimiser behind three steps, and its parameters."""
    generator = torch.Generator().manual_seed(1)
    shards = []
    for name, shape in SHAPES.items():
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        apart = name.endswith("w1")
        shards.append((name, p, shard(shape, apart=apart)))
    settings = AdamWConfig(
        lr=1e-2, steps=8, clip=0.5, state_dtype=state, offload_optimizer=share, **more
    )
    optimizer = Optimizer(shards, mesh, settings)
    if late:
        optimizer._streamed.lanes = LateLanes()
    for step in (1, 2, 3):
        optimizer.zero_grad()
        for _, p, _ in shards:
            generator.manual_seed(step)
            p.main_grad.add_(torch.randn(p.shape, generator=generator))
        optimizer.reduce()
        optimizer.step()
    return optimizer, [(name, p.data, info) for name, p, info in shards]


def whole_state(optimizer):
    """The state of one rank by key, put together."""
    found = {}
    for key, x, info in optimizer.state():
        info.put(x, found.setdefault(key, torch.full(info.full_shape, torch.nan, dtype=x.dtype)))
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("moekernels.parallel.offload.CHUNK", 64)
    monkeypatch.setattr("moekernels.parallel.optimizer.CHUNK", 80)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_bit_hangs_on_the_share(dtype, state, small_chunks):
    mesh, seen = Mesh(Layout()), []
    for share in SHARES:
        for late in (False, True) if share else (False,):
            optimizer, parameters = trained(share, mesh, dtype=dtype, state=state, late=late)
            seen.append((parameters, whole_state(optimizer)))
            total = sum(len(b.weights) for b in optimizer.buckets)
            away = sum(len(b.exp_avg.far) for b in optimizer.buckets)
            assert abs(away - share * total) <= 8 * len(optimizer.buckets), "to a line of each"
            held = sum(getattr(b, k).far.nbytes for b in optimizer.buckets for k in KINDS)
            assert optimizer.host_bytes() == held and (held > 0) == (share > 0)
    for parameters, state_ in seen[1:]:
        for (name, p, _), (_, q, _) in zip(seen[0][0], parameters):
            assert torch.equal(p, q), name
        for key, x in seen[0][1].items():
            assert not x.isnan().any() and torch.equal(x, state_[key]), key


def test_a_state_moves_between_shares():
    """As through a checkpoint, and as experts of one slot each."""
    mesh = Mesh(Layout())
    whole, _ = trained(0.0, mesh, dtype=torch.bfloat16)
    split, _ = trained(0.4, mesh, dtype=torch.bfloat16)
    begun = {name: p.clone() for name, (p, _) in split.parameters.items()}
    source = whole_state(whole)
    for key, x, info in split.state():
        x.copy_(info.take(source[key]) * 2)
    split.loaded(5)
    for name, (p, _) in split.parameters.items():
        assert torch.equal(p, (source[f"master.{name}"] * 2).bfloat16())
        assert not torch.equal(p, begun[name])
    for (key, experts), (_, others) in zip(whole.expert_state(), split.expert_state()):
        assert len(experts) == 4 and all(len(parts) == 1 for parts in experts)
        for parts, split_parts in zip(experts, others):
            assert torch.equal(parts[0] * 2, torch.cat(split_parts)), key
    assert any(len(parts) == 2 for _, experts in split.expert_state() for parts in experts)


def sharded(rank, shares):
    return [
        (parameters, [(k, x.clone(), i) for k, x, i in optimizer.state()])
        for share in shares
        for optimizer, parameters in [trained(share, Mesh(Layout(dp=2)), shard_optimizer=True)]
    ]


def test_slices_of_ranks_are_split_as_well():
    """Every element of the state is one rank's, in one box of it."""
    ranks = run_ranks(2, sharded, (0.0, 0.5))
    for results in ranks:
        (whole, _), (split, _) = results
        assert all(torch.equal(p, q) for (_, p, _), (_, q, _) in zip(whole, split))
    full = []
    for number in range(2):
        full.append({})
        for results in ranks:
            for key, x, info in results[number][1]:
                ones = torch.zeros(info.full_shape)
                info.put(torch.ones_like(x), ones)
                value, seen = full[-1].setdefault(
                    key, (torch.zeros(info.full_shape), torch.zeros(info.full_shape))
                )
                info.put(x, value)
                seen.add_(ones)
    for key, (value, seen) in full[0].items():
        assert (seen == 1).all() and (full[1][key][1] == 1).all()
        assert torch.equal(value, full[1][key][0]), key
