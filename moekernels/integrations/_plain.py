"""Grouped-query attention and softmax routing: Qwen3-MoE, Qwen2-MoE, OLMoE, Mixtral, gpt-oss."""

from __future__ import annotations

from typing import Any

from moekernels.errors import UsageError
from moekernels.integrations._family import NEUTRAL, Family, pooled_balance, shared
from moekernels.model.decoder import DecoderSpec

_QWEN = {"decoder_sparse_step": 1, "use_sliding_window": False, **NEUTRAL}
_BALANCE = frozenset({"output_router_logits", "router_aux_loss_coef"})


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, "balance_coef": pooled_balance(config)}


def _of_qwen3(spec: DecoderSpec) -> dict[str, Any]:
    return {"num_experts": spec.num_experts, "moe_intermediate_size": spec.expert_d_ff}


def _qwen2_moe(config: Any) -> dict[str, Any]:
    dense = list(config.mlp_only_layers)
    if dense != list(range(len(dense))):
        raise UsageError(
            f"qwen2_moe: mlp_only_layers is {dense}; only first layers can do without experts, "
            f"as in {list(range(len(dense)))}"
        )
    return {
        "qk_norm": False,
        "qkv_bias": config.qkv_bias,
        "balance_coef": pooled_balance(config),
        "shared_d_ff": config.shared_expert_intermediate_size,
        "shared_gate": True,
        "dense_layers": len(dense),
        "dense_d_ff": config.intermediate_size if dense else 0,
    }


def _of_qwen2(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "num_experts": spec.num_experts,
        "moe_intermediate_size": spec.expert_d_ff,
        "shared_expert_intermediate_size": spec.shared_d_ff,
        "mlp_only_layers": list(range(spec.dense_layers)),
        "intermediate_size": spec.dense_d_ff or spec.expert_d_ff,
        "qkv_bias": spec.qkv_bias,
        "use_sliding_window": False,
    }


def _olmoe(config: Any) -> dict[str, Any]:
    heads, width = config.num_attention_heads, config.hidden_size
    if getattr(config, "head_dim", None) not in (None, width // heads):
        raise UsageError(f"olmoe: head_dim is {config.head_dim}; use {width // heads}")
    return {
        "qk_norm": False,
        "qk_norm_wide": True,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "expert_d_ff": config.intermediate_size,
        "balance_coef": pooled_balance(config),
    }


def _of_olmoe(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "num_experts": spec.num_experts,
        "intermediate_size": spec.expert_d_ff,
        "attention_bias": spec.qkv_bias,
    }


def _mixtral(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": False,
        "renormalize": True,
        "expert_d_ff": config.intermediate_size,
        "window": config.sliding_window or 0,
        "balance_coef": pooled_balance(config),
    }


def _of_mixtral(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "num_local_experts": spec.num_experts,
        "intermediate_size": spec.expert_d_ff,
        "sliding_window": spec.window or None,
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    kinds, layers = list(config.layer_types), config.num_hidden_layers
    full = [n for n, kind in enumerate(kinds, 1) if kind == "full_attention"]
    period = full[0] if full else 0
    regular = [n for n in range(1, layers + 1) if period and n % period == 0]
    if full != regular or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UsageError(
            f"gpt_oss: layer_types is {kinds}; use full_attention in every so-many-th layer and "
            "sliding_attention in the others"
        )
    window = 0 if period == 1 else config.sliding_window or 0
    return {
        "qk_norm": False,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "sinks": True,
        "window": window,
        "window_period": period if window else 0,
        "router_bias": True,
        "score": "softmax_topk",
        "renormalize": False,
        "expert_d_ff": config.intermediate_size,
        "expert_bias": True,
        "activation": "swiglu_oai",
        "activation_alpha": clamped(config, "swiglu_alpha", 1.702),
        "activation_limit": clamped(config, "swiglu_limit", 7.0),
        "balance_coef": pooled_balance(config),
    }


def clamped(config: Any, name: str, fixed: float) -> float:
    """A field of the activation; transformers 5.10's class has none and computes with `fixed`."""
    value = getattr(config, name, fixed)
    if value != fixed and not hasattr(type(config)(), name):
        raise UsageError(
            f"gpt_oss: {name} is {value}, and this transformers computes with {fixed} whatever it "
            "says; use a newer transformers"
        )
    return value


def _of_gpt_oss(spec: DecoderSpec) -> dict[str, Any]:
    layers = range(1, spec.num_layers + 1)
    return {
        "num_local_experts": spec.num_experts,
        "intermediate_size": spec.expert_d_ff,
        "attention_bias": spec.qkv_bias,
        "sliding_window": spec.window or None,
        "layer_types": [
            "sliding_attention" if spec.window_of(n) else "full_attention" for n in layers
        ],
        "swiglu_alpha": spec.activation_alpha,
        "swiglu_limit": spec.activation_limit,
    }


_BLOCK = "block_sparse_moe"
_GPT_OSS = {
    "moe.experts.w1": ["mlp.experts.gate_up_proj"],
    "moe.experts.b1": ["mlp.experts.gate_up_proj_bias"],
    "moe.experts.w2": ["mlp.experts.down_proj"],
    "moe.experts.b2": ["mlp.experts.down_proj_bias"],
}

PLAIN = {
    "qwen3_moe": Family(
        _qwen3_moe,
        _of_qwen3,
        honoured=_BALANCE,
        neutral={**_QWEN, "mlp_only_layers": [], "sliding_window": None},
        irrelevant=frozenset({"intermediate_size"}),  # of layers without experts
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        _of_qwen2,
        names={
            **shared("mlp.shared_expert"),
            "moe.shared.gate": ["mlp.shared_expert_gate.weight"],
        },
        honoured=_BALANCE
        | {
            "intermediate_size",
            "layer_types",
            "mlp_only_layers",
            "qkv_bias",
            "shared_expert_intermediate_size",
        },
        neutral={**_QWEN, "sliding_window": 0},
    ),
    "olmoe": Family(
        _olmoe,
        _of_olmoe,
        honoured=_BALANCE | {"intermediate_size", "attention_bias"},
        neutral={k: v for k, v in NEUTRAL.items() if k != "attention_bias"} | {"clip_qkv": None},
    ),
    "mixtral": Family(
        _mixtral,
        _of_mixtral,
        files={
            "moe.experts.w1": [
                f"{_BLOCK}.experts.{{}}.w1.weight",
                f"{_BLOCK}.experts.{{}}.w3.weight",
            ],
            "moe.experts.w2": [f"{_BLOCK}.experts.{{}}.w2.weight"],
            "moe.router.weight": [f"{_BLOCK}.gate.weight"],
        },
        honoured=_BALANCE | {"intermediate_size", "sliding_window"},
        neutral={**NEUTRAL, "router_jitter_noise": 0.0},
    ),
    "gpt_oss": Family(
        _gpt_oss,
        _of_gpt_oss,
        names={
            **_GPT_OSS,
            "moe.router.weight": ["mlp.router.weight"],
            "moe.router.bias": ["mlp.router.bias"],
        },
        files=_GPT_OSS,
        forms={
            "moe.experts.w1": "transposed interleaved",
            "moe.experts.b1": "interleaved",
            "moe.experts.w2": "transposed",
        },
        honoured=_BALANCE
        | {
            "attention_bias",
            "intermediate_size",
            "layer_types",
            "sliding_window",
            "swiglu_alpha",
            "swiglu_limit",
        },
        neutral={k: v for k, v in NEUTRAL.items() if k != "attention_bias"},
    ),
}
