"""transformers' Qwen3-MoE as our decoder: the same architecture, so weights go over one to one.

from moekernels.integrations.qwen3_moe import load_, model_config
model = StageModel(model_config(hf.config), Mesh(Layout()), range(1, n + 1), True, True)
load_(model, hf.state_dict())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekernels.errors import UsageError
from moekernels.integrations import _fields
from moekernels.nn.config import ExpertSpec, ModelConfig, RouterConfig
from moekernels.nn.transformer import StageModel

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig

# Our name within a layer (or outside of any) -> theirs; several of theirs lie one behind the other.
_OUTSIDE = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
_LAYER = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.out": ["self_attn.o_proj.weight"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "moe_norm.weight": ["post_attention_layernorm.weight"],
    "moe.router.weight": ["mlp.gate.weight"],
    "moe.experts.w1": ["mlp.experts.gate_up_proj"],
    "moe.experts.w2": ["mlp.experts.down_proj"],
}

# Fields of their configuration: carried over below; the value at which one does nothing, or all
# that ours can do; without a meaning where those have that value.
_HONOURED = {
    "head_dim",
    "hidden_size",
    "initializer_range",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "output_router_logits",
    "rms_norm_eps",
    "rope_parameters",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "vocab_size",
}
_NEUTRAL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "sliding_window": None,
    "use_sliding_window": False,
}
_IRRELEVANT = {
    "intermediate_size",  # of layers without experts
    "max_position_embeddings",  # positions are turned as they come
    "max_window_layers",  # of the sliding window
}
_ROPE = {"rope_theta": ..., "rope_type": "default", "partial_rotary_factor": 1.0}


def model_config(config: Qwen3MoeConfig) -> ModelConfig:
    """Our configuration of the same model; what ours cannot express is a UsageError.

    The load-balancing coefficient is carried over with its meaning: theirs counts every choice of
    a token, ours the mean choice, and theirs pools the layers where ours sums them.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind != "qwen3_moe":
        raise UsageError(f"qwen3_moe: the configuration is of {kind!r}; of 'qwen3_moe' would do")
    _fields.check(config, honoured=_HONOURED, neutral=_NEUTRAL, irrelevant=_IRRELEVANT)
    rope = config.rope_parameters
    _fields.check_inside(kind, "rope_parameters", rope, _ROPE)
    heads = config.num_attention_heads
    coefficient = config.router_aux_loss_coef if config.output_router_logits else 0.0
    return ModelConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert=ExpertSpec(
            config.hidden_size, config.hidden_size, config.moe_intermediate_size, gated=True
        ),
        router=RouterConfig(
            renormalize=config.norm_topk_prob,
            balance_coef=coefficient * config.num_experts_per_tok / config.num_hidden_layers,
        ),
        qk_norm=True,
        rope_theta=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def their_names(name: str) -> list[str]:
    """Our full parameter name -> theirs, whose tensors joined along dimension 0 are ours."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, number, rest = name.split(".", 2)
    return [f"model.layers.{int(number) - 1}.{theirs}" for theirs in _LAYER[rest]]


@torch.no_grad()
def load_(model: StageModel, state: Mapping[str, Tensor]) -> None:
    """Copy the `state_dict()` of a Qwen3MoeForCausalLM into our chunk, each rank its shard."""
    for name, parameter, info in model.named_shards():
        full = torch.cat([state[theirs] for theirs in their_names(name)])
        if full.shape != info.full_shape:
            raise UsageError(
                f"qwen3_moe: {name} has shape {list(full.shape)} there; "
                f"{list(info.full_shape)} would do"
            )
        parameter.copy_(info.take(full))
