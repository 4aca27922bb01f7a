"""AdamW over flat buffers against torch's own, and the norm across layouts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moekernels.model.layout import Layout
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import boxes, even_range, shard
from moekernels.parallel.tensor import begin_reduce_scatter, in_rank_order
from python_tests.support.distributed import run_ranks

SHAPES = {
    "embed.weight": (40, 24),
    "layers.1.w": (24, 36),
    "layers.1.norm": (24,),
    "layers.1.w1": (4, 12, 24),
}


def model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradient(name, step):
    return torch.randn(
        SHAPES[name], generator=torch.Generator().manual_seed(100 * step + len(name))
    )


def whole(parameters):
    return [(name, p, shard(p.shape)) for name, p in parameters.items()]


def config(**changes):
    return AdamWConfig(
        **{"lr": 1e-2, "warmup": 2, "steps": 8, "clip": 1.0, "weight_decay": 0.1, **changes}
    )


def train(optimizer, parameters, steps):
    out = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for name, p in parameters.items():
            # Twice half a gradient, as two microbatches give it; autograd adds the second to the
            # first.
            for _ in range(2):
                (p * (gradient(name, step) / 2).to(p.dtype)).sum().backward()
        optimizer.reduce()
        out.append(optimizer.step())
    return out


def by_torch(settings, steps, dtype=torch.float32):
    parameters = model(dtype)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters["layers.1.w"], parameters["layers.1.w1"]],
                "weight_decay": settings.weight_decay,
            },
            {
                "params": [parameters["embed.weight"], parameters["layers.1.norm"]],
                "weight_decay": 0.0,
            },
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    norms = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        for name, p in parameters.items():
            p.grad = gradient(name, step).to(dtype)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip).item())
        optimizer.step()
    return parameters, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(dtype):
    settings, parameters = config(), model(dtype)
    steps = train(Optimizer(whole(parameters), Mesh(Layout()), settings), parameters, 8)
    expected, norms = by_torch(settings, 8, dtype)
    torch.testing.assert_close([norm.item() for norm, _ in steps], norms, rtol=1e-6, atol=0)
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, expected[name].data, rtol=1e-5, atol=1e-6)


def test_bf16_parameters_follow_their_fp32_masters():
    settings, parameters = config(clip=0.0), model(torch.bfloat16)
    start = {name: p.detach().float() for name, p in parameters.items()}
    optimizer = Optimizer(whole(parameters), Mesh(Layout()), settings)
    train(optimizer, parameters, 8)
    masters = {key: x for key, x, _ in optimizer.state() if key.startswith("master.")}
    for name, p in parameters.items():
        master = masters[f"master.{name}"]
        assert p.dtype == torch.bfloat16 and p.main_grad.dtype == master.dtype == torch.float32
        assert torch.equal(p.data, master.bfloat16()) and not torch.equal(master, start[name])
        assert p.grad is None, "autograd's own gradient went into main_grad"


def test_bf16_moments_follow_fp32_ones():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = model()
        optimizer = Optimizer(whole(parameters), Mesh(Layout()), config(state_dtype=dtype))
        train(optimizer, parameters, 8)
        assert {x.dtype for key, x, _ in optimizer.state() if key.startswith("exp")} == {dtype}
        results.append((parameters, optimizer.bytes()))
    moved = {name: (p - model()[name]).abs().mean() for name, p in results[0][0].items()}
    for name, p in results[1][0].items():
        assert (p - results[0][0][name]).abs().mean() < 0.02 * moved[name]
    assert results[1][1] == results[0][1] * 12 // 16


@pytest.mark.parametrize("betas", [(0.99, 0.999), (0.999, 0.9999)])
def test_slow_bf16_moments_follow_fp32_ones(betas):
    """Half way to where they will be; rounded to nearest they would stand still there."""
    start, steps, states = {"exp_avg.w": 0.15, "exp_avg_sq.w": 0.5}, 100, []
    for dtype in (torch.float32, torch.bfloat16):
        p, generator = torch.nn.Parameter(torch.zeros(16, 256)), torch.Generator().manual_seed(0)
        settings = config(state_dtype=dtype, beta1=betas[0], beta2=betas[1], steps=steps)
        optimizer = Optimizer([("w", p, shard(p.shape))], Mesh(Layout()), settings)
        state = {key: x for key, x, _ in optimizer.state()}
        for key, value in start.items():
            state[key].fill_(value)
        for _ in range(steps):
            p.main_grad.normal_(0.3, generator=generator)
            optimizer.step(norm=torch.ones((), dtype=torch.float64))
        states.append({key: x.double() for key, x in state.items()})
    for key, value in start.items():
        exact, got = states[0][key], states[1][key]
        moved = (exact.mean() - value).abs()
        assert (got.mean() - exact.mean()).abs() < 0.1 * moved, key
        assert (got - exact).square().mean().sqrt() < 0.04 * exact.square().mean().sqrt(), key


def test_kernels_that_know_main_grad_and_autograd_write_to_one_place():
    parameters = model()
    optimizer = Optimizer(whole(parameters), Mesh(Layout()), config())
    p = parameters["layers.1.w"]
    (p * 2).sum().backward()
    p.main_grad.add_(1.0)
    assert torch.equal(p.grad, torch.full_like(p, 3.0)) and torch.equal(p.main_grad, p.grad)
    optimizer.zero_grad()
    assert not p.grad.any() and p.grad.data_ptr() == p.main_grad.data_ptr()


def test_learning_rate():
    c = AdamWConfig(lr=1.0, min_lr_ratio=0.1, warmup=4, steps=20)
    assert [c.lr_at(s) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert c.lr_at(12) == pytest.approx(0.55) and c.lr_at(20) == pytest.approx(0.1) == c.lr_at(30)
    for kind in ("linear", "wsd", "constant"):
        other = replace(c, lr_schedule=kind, decay_steps=8)
        assert [other.lr_at(s) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
        rates = {
            "linear": {12: 0.55, 20: 0.1, 30: 0.1},
            "wsd": {12: 1.0, 16: 0.55, 20: 0.1, 30: 0.1},
            "constant": {12: 1.0, 20: 1.0, 30: 1.0},
        }[kind]
        assert {s: other.lr_at(s) for s in rates} == pytest.approx(rates)
    assert replace(c, lr_schedule="wsd").lr_at(16) == 1.0  # a fifth, unless told otherwise
    assert AdamWConfig.of({"lr": 2.0, "keep": 3}, seed=4) == AdamWConfig(lr=2.0, seed=4)
    rates = [c.lr_at(s) for s in range(4, 21)]
    assert rates == sorted(rates, reverse=True)


def on_layout(layout, settings):
    """The same full gradients, cut and shared as the layout wants: (the optimiser after two steps,
    the norm, its parameters)."""
    mesh = Mesh(layout)
    tp, e = mesh.tp, SHAPES["layers.1.w1"][0] // layout.ep
    mine = (mesh.ep_index * e, (mesh.ep_index + 1) * e)
    infos = {
        "embed.weight": shard(SHAPES["embed.weight"], {0: [even_range(40, tp.rank, tp.size)]}),
        "layers.1.w": shard(SHAPES["layers.1.w"], {1: [even_range(36, tp.rank, tp.size)]}),
        "layers.1.norm": shard(SHAPES["layers.1.norm"], reduce_over="stage", copies="stage"),
        "layers.1.w1": shard(
            SHAPES["layers.1.w1"], {0: [mine]}, reduce_over="edp", copies="edp", apart=True
        ),
    }
    full = model()
    # Stage p holds the parameters of its number, so that each rank's norm is a part only.
    here = [name for i, name in enumerate(SHAPES) if i % layout.pp == mesh.pp_index]
    shards = [
        (name, torch.nn.Parameter(infos[name].take(full[name].data)), infos[name]) for name in here
    ]
    optimizer = Optimizer(shards, mesh, settings)
    for step in (1, 2):
        optimizer.zero_grad()
        for name, p, info in shards:
            parts = getattr(mesh, info.reduce_over).size
            p.main_grad.add_(info.take(gradient(name, step)) / parts)
        optimizer.reduce()
        norm, _ = optimizer.step()
    return optimizer, norm.item(), shards


def layout_norm(rank, layout, settings):
    """The norm, and the pieces of updated full tensors."""
    _, norm, shards = on_layout(layout, settings)
    return norm, [(name, p.data, info) for name, p, info in shards]


@pytest.mark.parametrize("shard_optimizer", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, ep=2),
        Layout(pp=2),
        Layout(dp=2),
        Layout(dp=2, ep=2),
        Layout(tp=2, dp=2, ep=2),
        Layout(2, 1, 2),
    ],
    ids=str,
)
def test_every_layout_has_one_norm_and_one_update(layout, shard_optimizer):
    expected, norms = by_torch(config(), 2)
    settings = config(shard_optimizer=shard_optimizer)
    results = run_ranks(layout.world, layout_norm, layout, settings)
    assert len({norm for norm, _ in results}) == 1, "ranks disagree on the norm"
    assert math.isclose(results[0][0], norms[1], rel_tol=1e-6)
    for _, shards in results:
        for name, p, info in shards:
            torch.testing.assert_close(p, info.take(expected[name].data), rtol=1e-5, atol=1e-6)


def begun_early(rank, mode, early):
    """Two chunks, whose sums begin before or behind the last one's gradients: the gradients'
    norm and the parameters after two steps, and what was drawn of the sums."""
    mesh, full = Mesh(Layout(dp=3), exchange_mode=mode), model()
    assert (mesh.dp.memory is None) == (mode == "collective")
    shards = [(name, p, shard(p.shape)) for name, p in full.items()]
    chunk_of = {name: int("layers" not in name) for name in full}
    settings = config(shard_optimizer=True)
    optimizer, norms = Optimizer(shards, mesh, settings, chunk_of), []
    for step in (1, 2):
        optimizer.zero_grad()
        for chunk in (1, 0):
            for name, p in full.items():
                if chunk_of[name] == chunk:
                    p.main_grad.add_(gradient(name, step + rank) / 3)
            if early:
                optimizer.sums.begin(chunk)
        optimizer.reduce()
        norms.append(optimizer.step()[0].item())
    return norms, [p.data for p in full.values()], optimizer.sums.flights(0.0)


@pytest.mark.parametrize("mode", ["shared", "collective"])
def test_sums_that_begin_early_have_the_same_bits(mode):
    first, early = (run_ranks(3, begun_early, mode, early) for early in (False, True))
    for (norms, parameters, _), (others, begun, flights) in zip(first, early):
        assert norms == others and all(map(torch.equal, parameters, begun))
        assert flights.keys() == {0, 1} and flights[1].start < flights[0].start < flights[1].end
        assert flights[1].size >= 4 * 40 * 24


def sums_without_the_others(rank, mode):
    """Rank 1 begins only when rank 0 has, and has gone on: a sum that waited would never come."""
    mesh, x = Mesh(Layout(dp=2), exchange_mode=mode), torch.full((8,), float(rank + 1))
    ready = torch.zeros(1)
    if rank == 0:
        wait = begin_reduce_scatter(x, mesh.dp, 5)
        dist.send(ready, 1)
    else:
        dist.recv(ready, 0)
        wait = begin_reduce_scatter(x, mesh.dp, 5)
    return wait()


@pytest.mark.parametrize("mode", ["shared", "collective"])
def test_a_sum_begins_without_the_others(mode):
    for part in run_ranks(2, sums_without_the_others, mode, timeout=30):
        assert torch.equal(part, torch.full((4,), 3.0))


def tied_ends(rank, layout, settings):
    """A table at both ends of a pipeline, each rank with a part of its gradient: the norm, the
    table after two steps, and its state."""
    mesh = Mesh(layout, ends=True)
    rows = {0: [even_range(40, mesh.tp.rank, mesh.tp.size)]}
    info = shard(SHAPES["embed.weight"], rows, reduce_over="ends", copies="ends")
    shards = []
    if mesh.pp_index in (0, layout.pp - 1):
        table = torch.nn.Parameter(info.take(model()["embed.weight"].data))
        shards.append(("embed.weight", table, info))
    optimizer = Optimizer(shards, mesh, settings)
    for step in (1, 2):
        optimizer.zero_grad()
        for name, p, _ in shards:
            p.main_grad.add_(info.take(gradient(name, step)) / mesh.ends.size)
        optimizer.reduce()
        norm, _ = optimizer.step()
    state = [(key, x.clone(), i, getattr(mesh, i.copies).rank) for key, x, i in optimizer.state()]
    return norm.item(), [(p.data, i) for _, p, i in shards], state


@pytest.mark.parametrize("shard_optimizer", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "layout", [Layout(pp=2), Layout(pp=3), Layout(dp=2, pp=2), Layout(tp=2, pp=2)], ids=str
)
def test_a_table_at_both_ends_is_one_parameter(layout, shard_optimizer):
    """Summed over both, counted once in the norm, saved once, and the same bits at both."""
    alone = run_ranks(1, tied_ends, Layout(), config())
    settings = config(shard_optimizer=shard_optimizer)
    results = run_ranks(layout.world, tied_ends, layout, settings)
    (norm, [(expected, _)], _) = alone[0]
    seen = torch.zeros(SHAPES["embed.weight"])
    for got, tables, state in results:
        assert got == pytest.approx(norm, rel=1e-6)
        for table, info in tables:
            torch.testing.assert_close(table, info.take(expected), rtol=1e-5, atol=1e-6)
        for key, x, info, speaker in state:
            if key == "exp_avg.embed.weight" and speaker == 0:
                count = torch.zeros(info.full_shape)
                info.put(torch.ones_like(x), count)
                seen += count
    assert (seen == 1).all(), "every element is written by one rank"
    held = [table for _, tables, _ in results for table, _ in tables]
    assert len(held) == 2 * layout.dp * layout.tp
    for i, table in enumerate(held):  # tp ranks are neighbours
        assert torch.equal(table, held[i % layout.tp])


def sharded_state(rank, layout, state):
    """What each rank keeps, sharded and not, without a clip: its bits hang on the norm's."""
    kept = []
    for split in (False, True):
        settings = config(clip=0.0, shard_optimizer=split, state_dtype=state)
        optimizer, _, _ = on_layout(layout, settings)
        spoken = [
            (name, x.clone(), info, getattr(optimizer.mesh, info.copies).rank == 0)
            for name, x, info in optimizer.state()
        ]
        kept.append((spoken, optimizer.bytes()))
    return kept


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout", [Layout(dp=2), Layout(tp=2, dp=2, ep=2), Layout(tp=2, dp=2)], ids=str
)
def test_slices_of_all_ranks_are_the_whole_state_bit_for_bit(layout, state):
    full = [{}, {}]
    results = run_ranks(layout.world, sharded_state, layout, state)
    for whole, split in results:
        for place, (spoken, _) in zip(full, (whole, split)):
            for name, x, info, speaks in spoken:
                assert tuple(x.shape) == info.local_shape
                if speaks:
                    value = place.setdefault(name, torch.zeros(info.full_shape))
                    seen = place.setdefault("seen " + name, torch.zeros(info.full_shape))
                    info.put(x.float(), value)
                    count = torch.zeros(info.full_shape)
                    info.put(torch.ones_like(x, dtype=torch.float32), count)
                    seen += count
    assert full[0].keys() == full[1].keys()
    for name, x in full[0].items():
        assert torch.equal(x, full[1][name]), name
        if name.startswith("seen"):
            assert (x == 1).all(), "every element is written by one rank"
    state_bytes = [[kept for _, kept in rank] for rank in results]
    assert all(split < whole for whole, split in state_bytes)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_a_range_of_elements_inboxes(shape):
    x = torch.arange(math.prod(shape)).view(shape or (1,))
    for begin in range(x.numel() + 1):
        for end in range(begin, x.numel() + 1):
            found = []
            for at, size in boxes(tuple(x.shape), begin, end):
                box = x[tuple(slice(a, a + n) for a, n in zip(at, size))]
                assert box.numel() and box.flatten().diff().eq(1).all()
                found += box.flatten().tolist()
            assert found == list(range(begin, end))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_hangs_on_where_an_expert_lies(state, monkeypatch):
    """Norm, parameters and moments, with experts of an odd number of elements and of all sizes,
    in chunks that hold a part of one; a clip that is reached."""
    monkeypatch.setattr("moekernels.parallel.optimizer.CHUNK", 40)
    shape, layout = (13, 3, 7), Layout()
    sizes = torch.logspace(0, -3, 13)[:, None, None]
    full = {name: torch.randn(shape) * sizes for name in ("layers.1.w1", "layers.2.w1")}
    seen = []
    for order in (range(13), [*range(12, -1, -1)], [*range(6, 13), *range(6)]):
        ranges = {0: [(x, x + 1) for x in order]}
        info = shard(shape, ranges, reduce_over="edp", copies="edp", apart=True)
        assert info.held() == list(order)
        shards = [(name, torch.nn.Parameter(info.take(x)), info) for name, x in full.items()]
        optimizer = Optimizer(shards, Mesh(layout), config(state_dtype=state, clip=0.5))
        norms = []
        for step in (1, 2, 3):
            optimizer.zero_grad()
            for name, p, _ in shards:
                p.main_grad.add_(info.take(full[name] * step))
            norms.append(optimizer.step()[0].item())
        kept = {name: x.float().new_empty(shape) for name, x, _ in optimizer.state()}
        for name, x, _ in optimizer.state():
            info.put(x.float(), kept[name])
        seen.append((norms, kept))
    for norms, kept in seen[1:]:
        assert norms == seen[0][0]
        for name, x in kept.items():
            assert torch.equal(x, seen[0][1][name]), name


def add_up(rank, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(rank))
    group = Mesh(Layout(dp=3)).dp
    return in_rank_order(x, group), in_rank_order(x.flip(0), group).flip(0)


def test_a_sum_over_ranks_does_not_hang_on_the_place():
    """More elements than what one message to every peer is used for."""
    results = run_ranks(3, add_up, 70001)
    parts = [torch.randn(70001, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    for there, flipped in results:
        assert torch.equal(there, flipped)
        assert torch.equal(there, parts[0] + parts[1] + parts[2])
