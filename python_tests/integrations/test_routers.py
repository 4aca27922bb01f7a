"""The fused router is the model's own, and is put nowhere else."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from moekernels.errors import UsageError
from moekernels.integrations.routers import fuse_routers
from python_tests.support.transformers_models import (
    FAMILIES,
    TOLERANCE,
    gradients,
    tiny_model,
    worst,
)


def own_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    logits = model(ids).logits
    return {"logits": logits} | gradients(model, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_logits_and_gradients(family):
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    model = tiny_model(family)
    wanted = own_gradients(model, ids)
    fused = fuse_routers(model)
    layers = [m for name, m in model.named_modules() if name.endswith(("mlp.experts",))]
    assert len(fused) == len(layers) > 0
    error, where = worst(own_gradients(model, ids), wanted)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "DeepseekV3", "GptOss"])
def test_dtypes_are_the_routers_own(family):
    model = tiny_model(family).bfloat16()
    names = fuse_routers(model)
    router = model.get_submodule(names[-1])
    x = torch.randn(9, router.weight.shape[1], dtype=torch.bfloat16)
    fused = router(x)
    del router.forward
    for mine, own in zip(fused, router(x), strict=True):
        assert mine.dtype == own.dtype and mine.shape == own.shape


def test_changed_settings_are_picked_up_and_copies_are_their_own():
    model = tiny_model("Qwen3Moe")
    names = fuse_routers(model)
    other = copy.deepcopy(model)
    router = other.get_submodule(names[0])
    router.top_k, router.norm_topk_prob = 2, False
    x = torch.randn(5, router.weight.shape[1])
    fused = router(x)
    del router.forward
    for mine, own in zip(fused, router(x), strict=True):
        torch.testing.assert_close(mine, own)
    assert model.get_submodule(names[0])(x)[2].shape == (5, 3)


class Routed(nn.Module):
    """A router of its own, in a model."""

    def __init__(self, score) -> None:
        super().__init__()
        self.weight, self.top_k, self.score = nn.Parameter(torch.randn(6, 8)), 2, score

    def forward(self, hidden_states: Tensor) -> tuple:
        logits = F.linear(hidden_states, self.weight)
        weights, ids = self.score(logits).topk(self.top_k)
        return logits, weights, ids


def test_only_what_the_gate_computes_is_replaced():
    model = nn.ModuleDict({"mine": Routed(torch.tanh), "ours": Routed(torch.sigmoid)})
    assert fuse_routers(model) == ["ours"]
    with pytest.raises(UsageError, match=r"what mine \(Routed\) computes is none of its ways"):
        fuse_routers(nn.ModuleDict({"mine": Routed(torch.tanh)}))
    with pytest.raises(UsageError, match="there is no router"):
        fuse_routers(nn.Linear(2, 2))
    model["ours"].extra = 1.0  # may mean anything, and is tried
    model["ours"].score = torch.tanh
    with pytest.raises(UsageError, match="Routed was changed"):
        model["ours"](torch.randn(3, 8))


KNOWN = """
import importlib, sys
import moekernels.integrations
assert "transformers" not in sys.modules

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known
assert known["moekernels"] is not None

known.register("moekernels", None)  # and once more, with transformers imported first
del sys.modules["moekernels.integrations.transformers"]
importlib.reload(moekernels.integrations)
assert known["moekernels"] is not None
"""


def test_importing_the_package_makes_the_experts_known():
    subprocess.run([sys.executable, "-c", KNOWN], check=True)
