"""A Megatron-Core layer on our experts, held to the same layer on its own, in one CPU process."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs megatron-core (pip install --no-deps will do)")

from megatron.core import activations, parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP

from moekernels.errors import UsageError
from moekernels.integrations import megatron, transformer_engine
from python_tests.support.megatron_layers import (
    EXPERTS,
    HIDDEN,
    assert_same_layer,
    config,
    layer,
    stacked,
)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles its activations
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Megatron's router moves its weight to the current GPU, and asks for TransformerEngine's GEMM
    without looking whether that is there."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(activation_func=F.gelu),
        dict(activation_func_clamp_value=0.5),
        dict(
            activation_func=activations.quick_gelu,
            glu_linear_offset=1.0,
            activation_func_clamp_value=0.5,
        ),
        dict(activation_func=activations.quick_gelu, glu_linear_offset=1.0),
        dict(gated_linear_unit=False, activation_func=activations.squared_relu),
        dict(gated_linear_unit=False, activation_func=F.gelu),
    ],
    ids=lambda given: "-".join(getattr(v, "__name__", f"{k}={v}") for k, v in given.items()),
)
def test_experts_are_megatrons(given):
    assert_same_layer(layer(False, **given), layer(True, **given))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_whole_layer_on_our_ops(score):
    """Router, auxiliary loss, dispatcher and experts; the loss is strong enough to be seen."""
    given = dict(moe_router_score_function=score, moe_aux_loss_coeff=10.0)
    given |= dict(moe_router_load_balancing_type="aux_loss")
    theirs = layer(False, **given)
    undo = transformer_engine.patch_megatron()
    try:
        ours = layer(True, moe_permute_fusion=True, moe_router_fusion=True, **given)
        # Only the fused layer calls what is patched in.
        assert_same_layer(theirs, ours)
    finally:
        undo()


def test_fused_accumulation_adds_to_main_grad():
    theirs, ours = layer(False), layer(True)
    for p in ours.experts.parameters():
        p.main_grad = torch.ones_like(p)
    ours.experts.config.gradient_accumulation_fusion = True
    x = torch.randn(5, 1, HIDDEN)
    for moe in (theirs, ours):
        moe(x)[0].sum().backward()
    for i, name in ((1, "linear_fc1"), (2, "linear_fc2")):
        weight = getattr(ours.experts, f"weight{i}")
        wanted = 1 + stacked(theirs.experts, name, lambda p: p.grad)
        torch.testing.assert_close(weight.main_grad, wanted, rtol=1e-5, atol=1e-5)
        assert weight.grad_added_to_main_grad and not weight.grad.any()


def test_main_grads_are_left_alone_without_fusion():
    ours = layer(True)
    for p in ours.experts.parameters():
        p.main_grad = torch.zeros_like(p)
    ours(torch.randn(5, 1, HIDDEN))[0].sum().backward()
    for p in ours.experts.parameters():
        assert p.grad.any() and not p.main_grad.any()


class Group:
    """One rank of a group, where nothing is sent."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("gated", [True, False])
def test_checkpoints_hold_what_megatrons_do(gated):
    """Each of four ranks, two by expert and two by width, writes the same tensors to the same
    places, and puts together again what it reads from there."""
    given = dict(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    given |= dict(expert_tensor_parallel_size=2, sequence_parallel=True)
    if not gated:
        given |= dict(gated_linear_unit=False, activation_func=F.gelu)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS)
    for ep, tp in itertools.product(range(2), repeat=2):
        groups = SimpleNamespace(ep=Group(ep, 2), expt_tp=Group(tp, 2), expt_dp=Group(0, 1))
        found = []
        for kind in (SequentialMLP, megatron.Experts):
            torch.manual_seed(ep)
            submodules = spec.submodules.experts.submodules if kind is SequentialMLP else None
            module = kind(2, config(**given), submodules, pg_collection=groups)
            state = module.sharded_state_dict("experts.", (), {"dp_cp_group": groups.expt_dp})
            found.append(boxes(state))
        theirs, ours = found
        assert theirs.keys() == ours.keys() and len(theirs) == (6 if gated else 4)
        for key, value in theirs.items():
            assert torch.equal(value, ours[key]), key
        if gated:
            factory = state["experts.weight1"]
            read = factory.merge_fn([part.data for part in factory.build()])
            assert torch.equal(read, module.weight1)
        written = {k.removeprefix("experts."): torch.zeros(()) for k in state if "_extra" in k}
        module.load_state_dict({**module.state_dict(), **written})


def boxes(state: dict) -> dict:
    """(key, global shape, place) of every expert's tensor -> its values."""
    found = {}
    for shard in state.values():
        if not hasattr(shard, "data") or not isinstance(shard.data, Tensor):
            continue
        for part in shard.build() if hasattr(shard, "build") else [shard]:
            local = part.data if part.data.ndim == 3 else part.data[None]
            first, *place = part.global_offset
            for e, values in enumerate(local):
                found[part.key, part.global_shape, first + e, *place] = values
    return found


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(add_bias_linear=True), "add_bias_linear is True"),
        (dict(activation_func=F.relu, activation_func_clamp_value=1.0), "activation_func relu"),
        (dict(glu_linear_offset=1.0), "glu_linear_offset 1.0"),
        (
            dict(moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True),
            "moe_apply_probs_on_input is True",
        ),
    ],
)
def test_what_is_not_here_is_refused(given, named):
    groups = SimpleNamespace(ep=Group(0, 1), expt_tp=Group(0, 1), expt_dp=Group(0, 1))
    with pytest.raises(UsageError, match=named):
        megatron.Experts(EXPERTS, config(**given), pg_collection=groups)
