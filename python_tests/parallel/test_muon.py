"""Muon against torch's own, against the singular value decomposition, and across layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as by_torch

from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel import muon
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import shard
from moekernels.plan.memory import stage_memory
from moekernels.plan.problem import configured
from moekernels.run import files as cfg
from python_tests.support.distributed import run_ranks

# Halves of all dense and of all expert matrices end within one, as slices of the optimiser do.
SHAPES = {
    "embedding.weight": (40, 24),
    "layers.1.attention.qkv": (32, 24),
    "layers.1.attention.out": (24, 48),
    "layers.1.router.weight": (4, 24),
    "layers.1.norm": (24,),
    "layers.1.experts.w1": (4, 16, 24),
    "layers.1.experts.b1": (4, 16),
    "layers.1.experts.w2": (4, 24, 10),
}
STACKED = {"layers.1.attention.qkv": (16, 8, 8), "layers.1.experts.w1": (8, 8)}
MATRICES = ["attention.qkv", "attention.out", "experts.w1", "experts.w2"]


def draw(name, step):
    seed = 1000 * step + sum(map(ord, name))
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).double()


def config(**changes):
    same = {"lr": 1e-2, "warmup": 2, "steps": 8, "clip": 1.0, "optimizer": "muon"}
    return AdamWConfig(**{**same, **changes})


def plain(name):
    apart = ".experts." in name
    return shard(SHAPES[name], apart=apart, stacked=STACKED.get(name, ()))


def trained(settings, infos, mesh, dtype, steps=4):
    """The optimiser and the parameters, by the same full gradients."""
    shards = [
        (name, torch.nn.Parameter(info.take(draw(name, 0)).to(dtype)), info)
        for name, info in infos.items()
    ]
    optimizer = Optimizer(shards, mesh, settings)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for name, p, info in shards:
            parts = getattr(mesh, info.reduce_over).size
            p.main_grad.add_(info.take(draw(name, step)).to(p.main_grad.dtype) / parts)
        optimizer.reduce()
        optimizer.step()
    return optimizer, shards


def oracle(settings, dtype, steps=4):
    """torch's Muon for every matrix by itself, its AdamW for all else; full tensors."""
    full = {name: draw(name, 0).to(dtype) for name in SHAPES}
    parts, rest = {}, {}
    for name in SHAPES:
        if not name.endswith(tuple(MATRICES)):
            rest[name] = torch.nn.Parameter(full[name])
            continue
        rows = STACKED.get(name, (SHAPES[name][-2],))
        for i, matrix in enumerate(full[name].reshape(-1, *SHAPES[name][-2:])):
            for j, one in enumerate(matrix.split(rows)):
                parts[name, i, j] = torch.nn.Parameter(one.clone())
    decayed = [p for name, p in rest.items() if p.dim() > 1 and "embed" not in name]
    others = [p for name, p in rest.items() if p.dim() == 1 or "embed" in name]
    same = {"weight_decay": settings.weight_decay}
    first = torch.optim.Muon(parts.values(), adjust_lr_fn="match_rms_adamw", **same)
    second = torch.optim.AdamW(
        [{"params": decayed, **same}, {"params": others, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for step in range(1, steps + 1):
        for group in first.param_groups + second.param_groups:
            group["lr"] = settings.lr_at(step)
        for name, p in rest.items():
            p.grad = draw(name, step).to(dtype)
        for (name, i, j), p in parts.items():
            rows = STACKED.get(name, (SHAPES[name][-2],))
            matrix = draw(name, step).to(dtype).reshape(-1, *SHAPES[name][-2:])[i]
            p.grad = matrix.split(rows)[j].clone()
        everything = [*parts.values(), *rest.values()]
        torch.nn.utils.clip_grad_norm_(everything, settings.clip)
        first.step(), second.step()
    for name in SHAPES:
        if name in rest:
            full[name] = rest[name].data
            continue
        count = full[name].reshape(-1, *SHAPES[name][-2:]).shape[0]
        rows = len(STACKED.get(name, (0,)))
        each = [torch.cat([parts[name, i, j] for j in range(rows)]) for i in range(count)]
        full[name] = torch.stack(each).detach().view(SHAPES[name])
    return full


def test_which_parameters_it_takes():
    taken = [name for name in SHAPES if muon.takes(name, plain(name))]
    assert [name.split(".", 2)[2] for name in taken] == MATRICES
    assert not muon.takes("head.weight", shard((40, 24)))
    assert not muon.takes("layers.1.shared.gate", shard((1, 24)))
    assert muon.takes("layers.1.ffn.w1", shard((1, 48, 24)))


def test_matrices_of_every_family_are_told_from_vectors():
    """Of a real model: all that is two-dimensional but embedding, head and router."""
    model = cfg.resolve("tiny", None, {}).model
    chunk = StageModel(model, Mesh(Layout()), range(1, 3), True, True)
    taken = {name for name, _, info in chunk.named_shards() if muon.takes(name, info)}
    kinds = {name.split(".", 2)[2] for name in taken}
    assert kinds == {
        "attention.qkv", "attention.out", "moe.experts.w1", "moe.experts.w2",
        "moe.experts.w_in", "moe.experts.w_out",
    }  # fmt: skip
    for name, _, info in chunk.named_shards():
        if info.stacked:
            assert sum(info.stacked) == info.full_shape[-2], name


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (1, 8, 8), (2, 1, 5)], ids=str)
def test_orthogonalised_is_a_polynomial_of_the_singular_values(shape):
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = muon.COEFFICIENTS
    for _ in range(muon.STEPS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(muon.orthogonalised(x), (u * s[:, None]) @ v, rtol=1e-9, atol=1e-9)
    assert not muon.orthogonalised(torch.zeros(shape)).any(), "no division by a norm of 0"


@pytest.mark.parametrize("shape", [(3, 16, 24), (2, 48, 16), (1, 32, 32)], ids=str)
def test_orthogonalised_has_torchs_bits(shape):
    x = torch.randn(shape)
    a, b, c = muon.COEFFICIENTS
    wanted = torch.stack([by_torch(one, (a, b, c), muon.STEPS, muon.LEAST) for one in x])
    got = muon.orthogonalised(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    for i in range(len(x)):  # whatever lies beside it
        assert torch.equal(muon.orthogonalised(x[i : i + 1])[0], got[i])


def test_a_run_equals_torchs_muon_and_adamw():
    settings, infos = config(), {name: plain(name) for name in SHAPES}
    _, shards = trained(settings, infos, Mesh(Layout()), torch.float32)
    wanted = oracle(settings, torch.float32)
    for name, p, _ in shards:
        moved = (wanted[name] - draw(name, 0)).abs().max()
        assert (p.data - wanted[name]).abs().max() < 5e-3 * moved, name


def test_large_tensors_go_in_parts(monkeypatch):
    x = torch.randn(7, 6, 5, dtype=torch.float64)
    whole = muon.scaled_step(x, (2, 4))
    monkeypatch.setattr(muon, "AT_A_TIME", 70)
    assert torch.equal(muon.scaled_step(x, (2, 4)), whole)
    rms = muon.scaled_step(torch.randn(1, 64, 256, dtype=torch.float64)).square().mean().sqrt()
    assert 0.1 < rms < 0.3, "as large as AdamW's"


def test_one_moment_and_none_for_what_is_adamws():
    infos = {name: plain(name) for name in SHAPES}
    optimizer, _ = trained(config(), infos, Mesh(Layout()), torch.float32, 1)
    kinds = {}
    for key, _, _ in optimizer.state():
        kind, _, name = key.partition(".")
        kinds.setdefault(name, []).append(kind)
    for name, found in kinds.items():
        matrix = name.endswith(tuple(MATRICES))
        assert found == ["master", "exp_avg"] + ["exp_avg_sq"] * (not matrix), name


def test_bf16_momentum_follows_fp32():
    infos = {name: plain(name) for name in SHAPES}
    wide, narrow = (
        trained(config(state_dtype=state), infos, Mesh(Layout()), torch.float32)
        for state in (torch.float32, torch.bfloat16)
    )
    for (name, p, _), (_, other, _) in zip(wide[1], narrow[1]):
        moved = (p.data - draw(name, 0)).abs().mean()
        assert 0 < (p.data - other.data).abs().mean() < 0.05 * moved, name
    held = {x.dtype for key, x, _ in narrow[0].state() if key.startswith("exp_avg.")}
    assert held == {torch.bfloat16}


def on_layout(rank, layout, settings, dtype):
    mesh = Mesh(layout)
    tp, e = mesh.tp, 4 // layout.ep
    experts = {0: [(mesh.ep_index * e, (mesh.ep_index + 1) * e)]}
    q, kv, o = 16 // tp.size, 8 // tp.size, 48 // tp.size
    mine = [
        (tp.rank * q, (tp.rank + 1) * q),
        (16 + tp.rank * kv, 16 + (tp.rank + 1) * kv),
        (24 + tp.rank * kv, 24 + (tp.rank + 1) * kv),
    ]
    infos = {}
    for name, shape in SHAPES.items():
        more = {"stacked": STACKED.get(name, ())}
        if ".experts." in name:
            more |= {"ranges": experts, "reduce_over": "edp", "copies": "edp", "apart": True}
        elif name.endswith("qkv"):
            more["ranges"] = {0: mine}
        elif name.endswith("out"):
            more["ranges"] = {1: [(tp.rank * o, (tp.rank + 1) * o)]}
        else:
            more |= {"reduce_over": "stage", "copies": "stage"}
        infos[name] = shard(shape, **more)
    here = [name for i, name in enumerate(SHAPES) if i % layout.pp == mesh.pp_index]
    _, shards = trained(settings, {name: infos[name] for name in here}, mesh, dtype)
    return [(name, p.data, info) for name, p, info in shards]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, ep=2), Layout(dp=2), Layout(tp=2, dp=2, ep=2), Layout(pp=2)],
    ids=str,
)
def test_every_layout_takes_the_same_steps(layout, sharded):
    """In fp64, in which matrices are orthogonalised then: whatever is split is put together."""
    settings = config(shard_optimizer=sharded)
    infos = {name: plain(name) for name in SHAPES}
    _, shards = trained(settings, infos, Mesh(Layout()), torch.float64)
    wanted = {name: p.data for name, p, _ in shards}
    for rank in run_ranks(layout.world, on_layout, layout, settings, torch.float64):
        for name, p, info in rank:
            torch.testing.assert_close(p, info.take(wanted[name]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype, state", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_the_planner_counts_its_state(dtype, state):
    run = cfg.resolve("tiny", None, {})
    run.layout = cfg.RunConfig().layout
    run.train.dtype, run.train.optimizer_state, run.train.optimizer = dtype, state, "muon"
    from moekernels import assembly

    mesh = Mesh(Layout())
    run.model = replace(run.model, num_layers=2)
    (chunk,) = assembly.build_chunks(run, mesh)
    optimizer = assembly.build_optimizer(run, mesh, [chunk])
    counted = stage_memory(run.model, configured(run), 0, 512)
    norms = sum(
        p.numel() for name, p, _ in chunk.named_shards() if "q_norm" in name or "k_norm" in name
    )
    narrower = {"fp32": 4, "bf16": 2}[state]  # norms within attention count as the rest of it
    assert counted.state == optimizer.bytes() - norms * narrower
