"""Families of DeepSeek's kind, with shared experts behind dense first layers: dots1, GLM-4.5,
DeepSeek-V3, DeepSeek-V2."""

from __future__ import annotations

from typing import Any

from moekernels.errors import UsageError
from moekernels.integrations._family import NEUTRAL, Family, mscale, shared
from moekernels.model.decoder import DecoderSpec

BIAS_RATE = 1e-3  # of DeepSeek-V3, whose router theirs is


def _layers(config: Any) -> dict[str, Any]:
    """Dense first layers, and the shared expert of the others."""
    dense = config.first_k_dense_replace or 0
    return {
        "balance_coef": 0.0,
        "shared_d_ff": (config.n_shared_experts or 0) * config.moe_intermediate_size,
        "dense_layers": dense,
        "dense_d_ff": config.intermediate_size if dense else 0,
        "scale": config.routed_scaling_factor,
    }


def _biased_sigmoid(config: Any) -> dict[str, Any]:
    """Group-limited sigmoid routing with a selection bias."""
    return {
        **_layers(config),
        "score": "sigmoid",
        "num_groups": config.n_group or 1,
        "groups_kept": config.topk_group or 1,
        "group_score": "sum2",
        "bias_update_rate": BIAS_RATE,
    }


def _of_layers(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "n_routed_experts": spec.num_experts,
        "moe_intermediate_size": spec.expert_d_ff,
        "n_shared_experts": spec.shared_d_ff // spec.expert_d_ff,
        "first_k_dense_replace": spec.dense_layers,
        "intermediate_size": spec.dense_d_ff or spec.expert_d_ff,
        "routed_scaling_factor": spec.scale,
    }


def _of_groups(spec: DecoderSpec) -> dict[str, Any]:
    return {**_of_layers(spec), "n_group": spec.num_groups, "topk_group": spec.groups_kept}


def _dots1(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, **_biased_sigmoid(config)}


def _of_dots1(spec: DecoderSpec) -> dict[str, Any]:
    return {**_of_groups(spec), "sliding_window": None}


def _glm4_moe(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": config.use_qk_norm,
        "qkv_bias": config.attention_bias,
        **_biased_sigmoid(config),
    }


def _of_glm4_moe(spec: DecoderSpec) -> dict[str, Any]:
    return {
        **_of_groups(spec),
        "use_qk_norm": spec.qk_norm,
        "attention_bias": spec.qkv_bias,
        "num_mtp_layers": 0,
    }


def _latent(config: Any) -> dict[str, Any]:
    rope, width = config.rope_parameters, config.qk_nope_head_dim + config.qk_rope_head_dim
    for name, wanted in (("qk_head_dim", width), ("head_dim", config.qk_rope_head_dim)):
        value = getattr(config, name, wanted)  # both follow from others, and need not be there
        if value != wanted:
            raise UsageError(f"{config.model_type}: {name} is {value!r}; use {wanted}")
    scale = width**-0.5
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return {
        "qk_norm": False,
        "head_dim": width,
        "rotary_dim": config.qk_rope_head_dim,
        "score_scale": 0.0 if scale == width**-0.5 else scale,
        "kv_rank": config.kv_lora_rank,
        "q_rank": config.q_lora_rank or 0,
        "value_dim": 0 if config.v_head_dim == width else config.v_head_dim,
    }


def _of_latent(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "kv_lora_rank": spec.kv_rank,
        "q_lora_rank": spec.q_rank or None,
        "qk_rope_head_dim": spec.rotary_dim,
        "qk_nope_head_dim": spec.head_dim - spec.rotary_dim,
        "v_head_dim": spec.v_dim,
    }


def _deepseek_v3(config: Any) -> dict[str, Any]:
    return {
        **_latent(config),
        "rope_pairs": bool(config.rope_interleave),
        **_biased_sigmoid(config),
    }


def _of_deepseek_v3(spec: DecoderSpec) -> dict[str, Any]:
    return {
        **_of_groups(spec),
        **_of_latent(spec),
        "rope_interleave": spec.rope_pairs,
        "num_mtp_layers": 0,
    }


def _deepseek_v2(config: Any) -> dict[str, Any]:
    method, groups = config.topk_method, {}
    if method == "group_limited_greedy":
        groups = {"num_groups": config.n_group, "groups_kept": config.topk_group}
    elif method != "greedy":
        raise UsageError(
            f"deepseek_v2: topk_method is {method!r}; use 'greedy' or 'group_limited_greedy'"
        )
    # Its router takes no heed of norm_topk_prob.
    routing = {"renormalize": False, "group_score": "max", **groups}
    return {**_latent(config), "rope_pairs": True, **_layers(config), **routing}


def _of_deepseek_v2(spec: DecoderSpec) -> dict[str, Any]:
    limited = spec.num_groups > 1
    return {
        **(_of_groups if limited else _of_layers)(spec),
        **_of_latent(spec),
        "topk_method": "group_limited_greedy" if limited else "greedy",
    }


_LAYERS = frozenset(
    {
        "first_k_dense_replace",
        "intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "routed_scaling_factor",
        "topk_group",
    }
)
_LATENT = _LAYERS | {
    "kv_lora_rank",
    "q_lora_rank",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
}
_NEUTRAL = {**NEUTRAL, "output_router_logits": False}
# Modules behind the decoder that guess further tokens; weights of them are refused by their keys.
_AHEAD = frozenset({"num_mtp_layers", "num_nextn_predict_layers"})
_SHARED = shared("mlp.shared_experts")

DEEPSEEK = {
    "dots1": Family(
        _dots1,
        _of_dots1,
        names=_SHARED,
        wide_router=True,
        honoured=_LAYERS | {"layer_types"},
        neutral={**_NEUTRAL, "sliding_window": None},
    ),
    "glm4_moe": Family(
        _glm4_moe,
        _of_glm4_moe,
        names=_SHARED,
        wide_router=True,
        honoured=_LAYERS | {"attention_bias", "use_qk_norm", "partial_rotary_factor"},
        neutral={k: v for k, v in _NEUTRAL.items() if k != "attention_bias"},
        irrelevant=_AHEAD,
        partial=True,
    ),
    "deepseek_v3": Family(
        _deepseek_v3,
        _of_deepseek_v3,
        names=_SHARED,
        wide_router=True,
        honoured=_LATENT | {"rope_interleave"},
        neutral=_NEUTRAL,
        irrelevant=_AHEAD | {"pretraining_tp"},
    ),
    "deepseek_v2": Family(
        _deepseek_v2,
        _of_deepseek_v2,
        names=_SHARED,
        wide_router=True,
        honoured=_LATENT | {"topk_method"},
        neutral={**_NEUTRAL, "mlp_bias": False},
        irrelevant=frozenset({"pretraining_tp", "norm_topk_prob"}),
    ),
}
