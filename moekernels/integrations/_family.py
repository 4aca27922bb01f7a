"""What a family of decoders is made of: names, fields, and how its configuration reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekernels.errors import UsageError
from moekernels.integrations import _fields
from moekernels.model.decoder import DecoderSpec

# Our name within a layer (or outside of any) -> theirs; several of theirs lie one behind the other.
OUTSIDE = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
LAYER = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.qkv_bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "attention.out": ["self_attn.o_proj.weight"],
    "attention.out_bias": ["self_attn.o_proj.bias"],
    "attention.sinks": ["self_attn.sinks"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.q": ["self_attn.q_proj.weight"],
    "attention.q_a": ["self_attn.q_a_proj.weight"],
    "attention.q_a_norm.weight": ["self_attn.q_a_layernorm.weight"],
    "attention.q_b": ["self_attn.q_b_proj.weight"],
    "attention.kv_a": ["self_attn.kv_a_proj_with_mqa.weight"],
    "attention.kv_a_norm.weight": ["self_attn.kv_a_layernorm.weight"],
    "attention.kv_b": ["self_attn.kv_b_proj.weight"],
    "moe_norm.weight": ["post_attention_layernorm.weight"],
    "ffn_norm.weight": ["post_attention_layernorm.weight"],
    "ffn.w1": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w2": ["mlp.down_proj.weight"],
    "moe.router.weight": ["mlp.gate.weight"],
    "moe.router.selection_bias": ["mlp.gate.e_score_correction_bias"],
    "moe.experts.w1": ["mlp.experts.gate_up_proj"],
    "moe.experts.w2": ["mlp.experts.down_proj"],
}
# In files every expert is apart.
EXPERT = {
    "moe.experts.w1": ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"],
    "moe.experts.w2": ["mlp.experts.{}.down_proj.weight"],
}


def shared(module: str) -> dict[str, list[str]]:
    """The names of a shared expert."""
    return {
        "moe.shared.w1": [f"{module}.gate_proj.weight", f"{module}.up_proj.weight"],
        "moe.shared.w2": [f"{module}.down_proj.weight"],
    }


# Fields of a configuration: carried over; the value at which one does nothing, or all that ours can
# do; without a meaning where those have that value.
HONOURED = {
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
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
}
NEUTRAL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
}
IRRELEVANT = {
    "max_position_embeddings",  # positions are turned as they come
    "max_window_layers",  # of the sliding window
}


@dataclass(frozen=True)
class Family:
    """names: our names within a layer beyond `LAYER`, and theirs in memory. files: the same for the
    experts in files, in place of `EXPERT`. forms: how a tensor of ours lies in theirs (see
    `families.in_our_shape`), where not as it is. spec: what a configuration says beyond the common
    fields; config: the way back. The sets are those of `_fields.check`. partial: whether a part of
    a head may turn alone. wide_router: whether the router is in fp32 whatever the rest is in."""

    spec: Callable[[Any], dict[str, Any]]
    config: Callable[[DecoderSpec], dict[str, Any]]
    names: Mapping[str, list[str]] = field(default_factory=dict)
    files: Mapping[str, list[str]] = field(default_factory=lambda: EXPERT)
    forms: Mapping[str, str] = field(default_factory=dict)
    honoured: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    partial: bool = False
    wide_router: bool = False


def pooled_balance(config: Any) -> float:
    """The load-balancing coefficient with its meaning: theirs counts every choice of a token, ours
    the mean choice, and theirs pools the layers where ours sums them."""
    coefficient = config.router_aux_loss_coef if config.output_router_logits else 0.0
    return coefficient * config.num_experts_per_tok / config.num_hidden_layers


_ALL = {"rope_theta": ..., "rope_type": ...}
_SCALED = {
    "default": _ALL,
    "linear": {**_ALL, "factor": ...},
    "llama3": {
        **_ALL,
        "factor": ...,
        "low_freq_factor": ...,
        "high_freq_factor": ...,
        "original_max_position_embeddings": ...,
    },
    "yarn": {
        **_ALL,
        "factor": ...,
        "beta_fast": ...,
        "beta_slow": ...,
        "original_max_position_embeddings": ...,
        "attention_factor": ...,
        "mscale": ...,
        "mscale_all_dim": ...,
        "truncate": ...,
    },
}


def rotary(config: Any, head_dim: int, partial: bool) -> dict[str, Any]:
    """The fields of `RotarySpec` that rope_parameters say; UsageError for what ours has not, or,
    but where a family is `partial`, theirs takes no heed of."""
    kind, rope = config.model_type, config.rope_parameters
    scaling = rope.get("rope_type", "default")
    if scaling not in _SCALED:
        raise UsageError(
            f"{kind}: rope_parameters['rope_type'] is {scaling!r}; use one of {', '.join(_SCALED)}"
        )
    known = {**_SCALED[scaling], "partial_rotary_factor": ... if partial else 1.0}
    _fields.check_inside(kind, "rope_parameters", rope, known)
    share = rope.get("partial_rotary_factor", 1.0)
    if getattr(config, "partial_rotary_factor", share) != share:
        raise UsageError(
            f"{kind}: partial_rotary_factor is {config.partial_rotary_factor}, and "
            f"rope_parameters, which counts, says {share}; use the same in both"
        )
    turning = int(head_dim * share)
    fields = {
        "rope_theta": rope["rope_theta"],
        "rotary_dim": 0 if turning == head_dim else turning,
        "rope_scaling": "none" if scaling == "default" else scaling,
    }
    if scaling == "default":
        return fields
    factor = rope["factor"]
    if factor is None:
        factor = config.max_position_embeddings / rope["original_max_position_embeddings"]
    fields["rope_factor"] = factor
    if scaling == "linear":
        return fields
    fields["rope_context"] = rope["original_max_position_embeddings"]
    if scaling == "llama3":
        fast, slow = rope["high_freq_factor"], rope["low_freq_factor"]
        return {**fields, "rope_fast": fast, "rope_slow": slow}
    return {
        **fields,
        "rope_fast": rope.get("beta_fast") or 32.0,
        "rope_slow": rope.get("beta_slow") or 1.0,
        "rope_whole": rope.get("truncate", True),
        "rope_magnitude": _magnitude(rope, factor),
    }


def _magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """Of yarn's turned queries and keys."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(factor, rope["mscale"]) / mscale(factor, rope["mscale_all_dim"])
    return mscale(factor)


def mscale(factor: float, times: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0


def rope_parameters(spec: DecoderSpec) -> dict[str, Any]:
    """The way back."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    turning = spec.turning(spec.head_dim)
    if turning != spec.head_dim and not spec.kv_rank:
        rope["partial_rotary_factor"] = turning / spec.head_dim
    if spec.rope_scaling == "none":
        return rope
    rope |= {"rope_type": spec.rope_scaling, "factor": spec.rope_factor}
    if spec.rope_scaling == "linear":
        return rope
    rope["original_max_position_embeddings"] = spec.rope_context
    if spec.rope_scaling == "llama3":
        return {**rope, "high_freq_factor": spec.rope_fast, "low_freq_factor": spec.rope_slow}
    return {
        **rope,
        "beta_fast": spec.rope_fast,
        "beta_slow": spec.rope_slow,
        "truncate": spec.rope_whole,
        "attention_factor": spec.rope_magnitude,
    }
