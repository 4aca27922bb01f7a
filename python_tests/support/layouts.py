"""Run the model on a layout and in one process, and compare losses and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import all_reduce
from python_tests.support.distributed import RankPool

TINY = DecoderSpec(
    vocab_size=61,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    num_experts=8,
    top_k=2,
    expert_d_ff=12,
    qk_norm=False,
    renormalize=False,
    balance_coef=0.1,
    z_coef=0.01,
    init_std=0.3,
)


def micro_batches(
    lengths: list[list[int]], *, align: int = 4, vocab: int = 61, seed: int = 0
) -> list[MicroBatch]:
    """One microbatch of random tokens for each list of sequence lengths."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(sum, lengths))

    def sequence(length: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(0, vocab, (length + 1,), generator=generator)
        return text[:-1], text[1:]

    return [
        MicroBatch.pack([sequence(n) for n in one], loss_scale=1 / total, align=align)
        for one in lengths
    ]


def run_model(
    layout: Layout, config: DecoderSpec, batches: list[MicroBatch], options: dict[str, Any]
) -> dict[str, Any]:
    """One step on this rank: dp rank i takes microbatches i, i + dp, ..."""
    mesh = Mesh(layout)
    model = StageModel(config, mesh, range(1, config.num_layers + 1), True, True, **options)
    for parameter in model.parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter.main_grad = torch.zeros_like(parameter, dtype=wide)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches[mesh.dp_index :: layout.dp]:
        share = model(batch)
        share.backward()
        loss += share.detach()
    squares = torch.zeros((), dtype=torch.float64)
    for _, parameter, info in model.named_shards():
        if parameter.grad is not None:  # expert kernels write to main_grad
            parameter.main_grad += parameter.grad
        parameter.main_grad = all_reduce(parameter.main_grad, getattr(mesh, info.reduce_over))
        if getattr(mesh, info.copies).rank == 0:
            squares += parameter.main_grad.double().square().sum()
    loads, losses = model.take_statistics()
    return {
        "loss": loss,
        "dp_index": mesh.dp_index,
        "tp_index": mesh.tp_index,
        "squared_norm": all_reduce(squares, mesh.world),
        "loads": loads,
        "losses": losses,
        "parameters": {n: (p.detach(), info) for n, p, info in model.named_shards()},
        "gradients": {n: (p.main_grad.clone(), info) for n, p, info in model.named_shards()},
    }


def _on_rank(rank: int, *args: Any) -> dict[str, Any]:
    return run_model(*args)


def assemble(results: list[dict[str, Any]], what: str) -> dict[str, Tensor]:
    """Full tensors from every rank's shards; where ranks hold copies, the copies must be equal bit
    for bit.
    """
    full: dict[str, Tensor] = {}
    for result in results:
        for name, (local, info) in result[what].items():
            whole = full.setdefault(name, torch.full(info.full_shape, torch.nan, dtype=local.dtype))
            before = info.take(whole)
            held = before.isnan()
            assert torch.equal(torch.where(held, local, before), local), f"copies of {name} differ"
            info.put(local, whole)
    for name, whole in full.items():
        assert not whole.isnan().any(), f"no rank holds all of {name}"
    return full


def compare(
    pool: RankPool | None,
    layout: Layout,
    config: DecoderSpec,
    batches: list[MicroBatch],
    *,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[dict[str, Any]]:
    """Assert that a layout computes what one process computes; return what its ranks said."""
    one = run_model(Layout(), config, batches, {"dtype": dtype})
    many = pool.run(_on_rank, layout, config, batches, {"dtype": dtype, **options})
    whole = assemble(many, "parameters")
    for name, (parameter, _) in one["parameters"].items():
        assert torch.equal(parameter, whole[name]), f"{name} begins differently"
    loss = sum(r["loss"] for r in many if r["tp_index"] == 0)
    assert abs(loss - one["loss"]) <= tolerance * abs(one["loss"])
    whole = assemble(many, "gradients")
    worst = {}
    for name, (gradient, _) in one["gradients"].items():
        worst[name] = float((whole[name] - gradient).abs().max() / gradient.abs().max())
    name = max(worst, key=worst.get)
    assert worst[name] <= tolerance, f"{name}: {worst[name]:.3g}"
    assert torch.equal(sum(r["loads"] for r in many), one["loads"])
    losses = sum(r["losses"] for r in many if r["tp_index"] == 0)
    torch.testing.assert_close(losses, one["losses"], rtol=1e-6, atol=0)
    for r in many:
        torch.testing.assert_close(r["squared_norm"], one["squared_norm"], rtol=1e-6, atol=0)
    return many


def variant(**changes: Any) -> DecoderSpec:
    return replace(TINY, **changes)
