"""transformers' expert parallelism over our exchange, against its own over all-to-all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip(
    "transformers.distributed.expert_parallel",
    reason="transformers has a registry of expert parallelism since 5.23",
)

import transformers.modeling_utils
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import (
    EPImplementationInterface,
    apply_expert_parallelism,
)

import moekernels.integrations.transformers
from python_tests.support.distributed import RankPool
from python_tests.support.transformers_models import tiny_model

EXPERTS, TOP_K, HIDDEN = 8, 2, 16


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def parted(how: str, alike: bool, experts: str = "eager") -> nn.Module:
    """A model whose experts lie on two ranks; `alike`: both are given the same tokens."""
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    model = tiny_model("Qwen3Moe", **sizes).double()
    model.set_experts_implementation(experts)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "one"))
    plan = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            plan |= {f"{name}.{p}": "grouped_gemm" for p, _ in module.named_parameters()}
            plan[name] = "ep_dispatch_experts"  # behind them: it reads how many experts are left
    assert plan
    tp = mesh["ep"] if alike else mesh["one"]
    return apply_expert_parallelism(model, mesh["ep"], tp, plan, ep_implementation=how)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.items()}


def routed(name: str, rank: int, alike: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K] and weights [T, K], T differs by rank where it can."""
    generator = torch.Generator().manual_seed(0 if alike else rank)
    tokens = 7 if alike or rank else 4
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    most = EXPERTS // 2 if name == "all to the first" else EXPERTS
    drawn = [torch.randperm(most, generator=generator)[:TOP_K] for _ in range(tokens)]
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    return x, torch.stack(drawn), weights


def _layer(rank: int, how: str, alike: bool, name: str, experts: str) -> dict[str, Tensor]:
    model = parted(how, alike, experts)
    module = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    x, ids, weights = routed(name, rank, alike)
    x.requires_grad_()
    weights.requires_grad_()
    out = module(x, ids, weights)
    (out * torch.arange(HIDDEN)).sum().backward()
    return {"out": out.detach(), "dx": x.grad, "dweights": weights.grad} | gradients(module)


@pytest.mark.parametrize("experts", ["eager", "moekernels"])
@pytest.mark.parametrize("alike", [False, True], ids=["a batch each", "one batch"])
def test_a_layer_is_that_of_transformers_own_exchange(two, alike: bool, experts: str) -> None:
    for name in ("even", "all to the first"):
        wanted = two.run(_layer, "all_to_all", alike, name, "eager")
        for ours, theirs in zip(two.run(_layer, "moekernels", alike, name, experts), wanted):
            for key in ("out", "dx", "dweights"):
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)
            assert theirs.keys() == ours.keys() and len(ours) == 5
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-12)


def _model(rank: int, how: str, alike: bool) -> dict[str, Tensor]:
    model = parted(how, alike, "moekernels" if how == "moekernels" else "eager")
    seed = 4 if alike else 4 + rank
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(seed))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients(model)


@pytest.mark.parametrize("alike", [False, True], ids=["a batch each", "one batch"])
def test_a_model_is_that_of_transformers_own_exchange(two: RankPool, alike: bool) -> None:
    for ours, theirs in zip(
        two.run(_model, "moekernels", alike), two.run(_model, "all_to_all", alike)
    ):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-12)


def _how(rank: int) -> tuple[bool, int]:
    """Whether rows travel through shared memory; how many stamps a layer leaves behind."""
    from moekernels.integrations.expert_parallel import group_of

    model = parted("moekernels", True)
    group = group_of(init_device_mesh("cpu", (2,)))
    x, ids, weights = routed("even", rank, True)
    module = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    with torch.no_grad():
        module(x, ids, weights)
    return group.memory is not None, len(group.memory.host.take_stamps())


def test_rows_travel_through_shared_memory_and_leave_nothing(two: RankPool) -> None:
    assert two.run(_how) == [(True, 0)] * 2


def _loaded(rank: int, path: str, how: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    # Without accelerate transformers refuses a device; a whole model on one is all that it does.
    transformers.modeling_utils.check_and_set_device_map = lambda device: {"": device}
    config = DistributedConfig(ep_size=2, ep_implementation=how, **sizes)
    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, dtype=torch.float64
    )
    model.set_experts_implementation("moekernels" if how == "moekernels" else "eager")
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(4))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return {"logits": out.logits.detach().clone()} | gradients(model)


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}], ids=["tp", "fsdp"])
def test_a_model_that_from_pretrained_parts_is_that_of_their_exchange(sizes, tmp_path) -> None:
    config = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    tiny_model("Qwen3Moe", **config).double().save_pretrained(tmp_path)
    with RankPool(2) as pool:  # of its own: their loading changes the process
        results = [pool.run(_loaded, str(tmp_path), h, sizes) for h in ("moekernels", "all_to_all")]
    for ours, theirs in zip(*results):
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-12)


def test_it_is_registered_with_the_experts() -> None:
    before = dict(EPImplementationInterface())
    assert "moekernels" in before
    moekernels.integrations.transformers.register()
    assert dict(EPImplementationInterface()) == before
