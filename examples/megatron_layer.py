"""A Megatron-Core MoE layer on these kernels: router, dispatcher and experts, without
TransformerEngine; needs megatron-core 0.16.

    python examples/megatron_layer.py

The same layer is built twice, once of Megatron's own parts, and both make one training step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moekernels.integrations.megatron import experts_spec
from moekernels.integrations.transformer_engine import patch_megatron

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_ffn_hidden_size": 48, "num_layers": 1}


def layer(ours: bool) -> MoELayer:
    config = TransformerConfig(
        **SIZES,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_token_dispatcher_type="allgather",
        moe_permute_fusion=ours,
        moe_router_fusion=ours,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        init_method_std=0.2,
    )
    own = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False).submodules
    torch.manual_seed(0)  # the same weights
    experts = MoESubmodules(experts=experts_spec()) if ours else own
    return MoELayer(config, experts, layer_number=1).to(DEVICE)


def main() -> float:
    undo = patch_megatron()  # moe_permute_fusion and moe_router_fusion call ours from here on
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    current_device = torch.cuda.current_device
    if DEVICE == "cpu":  # where Megatron's router would move its weight
        torch.cuda.current_device = lambda: torch.device("cpu")
    try:
        x = torch.randn(20, 2, 32, device=DEVICE)  # [sequence, batch, hidden]
        results = []
        for ours in (False, True):
            moe = layer(ours)
            y, _ = moe(x)
            y.square().mean().backward()
            results.append((y, moe.router.weight.grad))
    finally:
        torch.cuda.current_device = current_device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        undo()
    error = max((a - b).abs().max().item() for a, b in zip(*results))
    print(
        f"largest difference from Megatron's own parts, output and router's gradient: {error:.1e}"
    )
    return error


if __name__ == "__main__":
    main()
