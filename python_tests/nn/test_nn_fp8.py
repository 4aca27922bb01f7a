"""A model whose experts multiply in FP8: what changes, what does not, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.run import files as cfg
from python_tests.support.distributed import RankPool
from python_tests.support.layouts import compare, micro_batches, variant

BATCHES = [[9, 4], [7], [11, 2], [5, 5]]


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2, timeout=120) as pool:
        yield pool


def model_of(config: DecoderSpec, dtype=torch.bfloat16) -> tuple[StageModel, Optimizer]:
    mesh = Mesh(Layout())
    model = StageModel(config, mesh, range(1, config.num_layers + 1), True, True, dtype=dtype)
    return model, Optimizer(model.named_shards(), mesh, AdamWConfig(lr=1e-2, warmup=0))


def trained(config: DecoderSpec, steps: int) -> list[float]:
    model, optimizer = model_of(config)
    found = []
    for _ in range(steps):
        losses = []
        for batch in micro_batches(BATCHES):
            loss = model(batch)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        found.append(sum(losses))
    return found


def test_it_learns_as_it_does_in_16_bits():
    """Twelve steps on the same tokens lower the loss alike, to within two per cent of how far."""
    config = variant(d_model=64, expert_d_ff=64, init_std=0.1)
    plain, fp8 = (trained(replace(config, fp8_experts=on), 12) for on in (False, True))
    assert fp8 != plain
    gained = plain[0] - plain[-1]
    assert gained > 0.3 * plain[0]
    assert abs(plain[-1] - fp8[-1]) < 0.02 * gained, (plain, fp8)


def gradients(config: DecoderSpec) -> dict[str, Tensor]:
    model, _ = model_of(config)
    for batch in micro_batches(BATCHES[:2]):
        model(batch).backward()
    return {name: p.main_grad for name, p, _ in model.named_shards()}


@pytest.mark.parametrize("lifted", [False, True])
def test_gradients_are_as_far_as_fp8_is(lifted):
    config = variant(d_model=64, expert_d_ff=64, init_std=0.1)
    if lifted:
        config = replace(config, expert_d_in=96)
    plain, fp8 = (gradients(replace(config, fp8_experts=on)) for on in (False, True))
    for name, gradient in plain.items():
        apart = float((fp8[name] - gradient).norm() / gradient.norm())
        assert apart < 0.15, (name, apart)
    assert not torch.equal(fp8["layers.1.moe.experts.w1"], plain["layers.1.moe.experts.w1"])


def test_only_the_routed_experts_are_in_fp8(monkeypatch):
    calls = []
    own = ops.experts
    monkeypatch.setattr(ops, "experts", lambda *a, **k: calls.append(k.get("fp8")) or own(*a, **k))
    model, _ = model_of(variant(fp8_experts=True, dense_layers=1, dense_d_ff=16, shared_d_ff=8))
    model(micro_batches([[5]])[0])
    assert sorted(map(str, calls)) == ["None", "None", "True"]


def test_layouts_compute_what_one_process_does(two: RankPool):
    """Rows are quantized alone, so where they are makes no difference."""
    config = variant(fp8_experts=True, d_model=32, expert_d_ff=32)
    uneven = micro_batches([[7, 7, 3], [5], [1, 9, 2], [11]])
    for layout in (Layout(dp=2, ep=2), Layout(tp=2, ep=2)):
        compare(two, layout, config, uneven, dtype=torch.float32, tolerance=2e-3)


@pytest.mark.parametrize(
    "words, text",
    [
        ({"dtype": "fp64"}, "--fp8-experts beside --dtype fp64"),
        ({"etp": 2}, "--fp8-experts scales blocks of 128, and --etp 2 parts 32 hidden units"),
    ],
)
def test_what_is_refused(words, text):
    from moekernels import assembly

    run = cfg.RunConfig()
    run.model = variant(fp8_experts=True, expert_d_ff=32)
    run.layout.tp = run.layout.etp = words.get("etp", 1)
    run.train.dtype = words.get("dtype", "bf16")
    with pytest.raises(UsageError, match=f"^{text}"):
        assembly.layout_of(run)
