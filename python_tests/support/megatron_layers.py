"""A small Megatron-Core layer, on its own experts and on ours, and what both must have alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moekernels.integrations import megatron

EXPERTS, HIDDEN, WIDTH = 4, 16, 8


def config(**given) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": WIDTH,
            "ffn_hidden_size": WIDTH,
            "moe_router_topk": 2,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "moe_token_dispatcher_type": "allgather",
            "init_method_std": 0.5,
            **given,
        }
    )


def layer(own: bool, seed: int = 0, **given) -> MoELayer:
    torch.manual_seed(seed)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    submodules = MoESubmodules(experts=megatron.experts_spec()) if own else spec.submodules
    return MoELayer(config(**given), submodules, layer_number=1)


def stacked(experts: SequentialMLP, name: str, of=lambda p: p) -> Tensor:
    return torch.stack([of(getattr(e, name).weight) for e in experts.local_experts])


def assert_same_layer(theirs: MoELayer, ours: MoELayer, seed: int = 1) -> None:
    """Initial weights, output, and every gradient."""
    torch.manual_seed(seed)
    x = torch.randn(7, 2, HIDDEN)
    dy = torch.randn(7, 2, HIDDEN)
    found = []
    for moe in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y, _ = moe(leaf)
        y.backward(dy)
        found.append([y, leaf.grad, moe.router.weight.grad])
    experts = theirs.experts
    for i, name in ((1, "linear_fc1"), (2, "linear_fc2")):
        weight = getattr(ours.experts, f"weight{i}")
        assert torch.equal(stacked(experts, name), weight)
        found[0].append(stacked(experts, name, lambda p: p.grad))
        found[1].append(weight.grad)
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
