"""The model in narrow dtypes, against itself in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from python_tests.support.layouts import micro_batches, variant

CONFIG = variant(expert_d_in=24, qk_norm=True, init_std=0.1)


def gradients(config: DecoderSpec, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    """Accumulated over two microbatches in the optimiser's main gradients; experts chosen as fp64
    chooses.
    """
    torch.manual_seed(0)
    mesh = Mesh(Layout())
    model = StageModel(config, mesh, range(1, 3), True, True, dtype=dtype)
    exact = StageModel(config, mesh, range(1, 3), True, True, dtype=torch.float64)
    Optimizer(model.named_shards(), mesh, AdamWConfig())
    chosen: list[Tensor] = []
    exact.route_hook = lambda batch, layer, logits, ids: chosen.append(ids)
    model.route_hook = lambda batch, layer, logits, ids: chosen.pop(0)
    for batch in micro_batches([[9, 4], [7]]):
        exact(batch)
        (model(batch) * scale).backward()
    return {name: p.main_grad.double() / scale for name, p, _ in model.named_shards()}


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 1.0, 1e-4), (torch.bfloat16, 1.0, 0.1), (torch.float16, 64.0, 0.02)],
)
def test_gradients_in_narrow_dtypes(dtype: torch.dtype, scale: float, tolerance: float) -> None:
    # The auxiliary losses are not scaled: leave them out where the loss is.
    config = CONFIG if scale == 1.0 else variant(balance_coef=0.0, z_coef=0.0)
    narrow, exact = gradients(config, dtype, scale), gradients(config, torch.float64)
    for name, gradient in exact.items():
        error = (narrow[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error:.3g}"


def test_main_gradients_accumulate_in_fp32() -> None:
    """Every parameter's, also where an expert kernel writes them and autograd adds nothing."""
    mesh = Mesh(Layout())
    model = StageModel(CONFIG, mesh, range(1, 3), True, True, dtype=torch.bfloat16)
    Optimizer(model.named_shards(), mesh, AdamWConfig())
    batch = micro_batches([[9, 4]])[0]
    model(batch).backward()
    once = {name: p.main_grad.clone() for name, p, _ in model.named_shards()}
    model(batch).backward()
    for name, p, _ in model.named_shards():
        assert p.grad is None and p.main_grad.dtype == torch.float32
        assert once[name].count_nonzero() > 0
        assert torch.equal(p.main_grad, once[name] * 2), name
