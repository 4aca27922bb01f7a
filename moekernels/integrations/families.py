"""Decoders of transformers as ours: the same architecture, so weights go over one to one.

from moekernels.integrations.families import decoder_spec, load_
model = StageModel(decoder_spec(hf.config), Mesh(Layout()), range(1, n + 1), True, True)
load_(model, hf.state_dict(), "qwen3_moe")

A family is an entry of `FAMILIES`: what our names are called there, how its configuration reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moekernels.errors import UsageError
from moekernels.integrations import _fields
from moekernels.model.decoder import DecoderSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    "ffn_norm.weight": ["post_attention_layernorm.weight"],
    "ffn.w1": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w2": ["mlp.down_proj.weight"],
    "moe.router.weight": ["mlp.gate.weight"],
    "moe.router.selection_bias": ["mlp.gate.e_score_correction_bias"],
    "moe.experts.w1": ["mlp.experts.gate_up_proj"],
    "moe.experts.w2": ["mlp.experts.down_proj"],
}
# In files every expert is apart.
_EXPERT = {
    "moe.experts.w1": ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"],
    "moe.experts.w2": ["mlp.experts.{}.down_proj.weight"],
}


def _shared(module: str) -> dict[str, list[str]]:
    return {
        "moe.shared.w1": [f"{module}.gate_proj.weight", f"{module}.up_proj.weight"],
        "moe.shared.w2": [f"{module}.down_proj.weight"],
    }


# Fields of a configuration: carried over below; the value at which one does nothing, or all that
# ours can do; without a meaning where those have that value.
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
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
}
_NEUTRAL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
}
_QWEN = {
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    **_NEUTRAL,
}
_IRRELEVANT = {
    "max_position_embeddings",  # positions are turned as they come
    "max_window_layers",  # of the sliding window
}
_ROPE = {"rope_theta": ..., "rope_type": "default", "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Family:
    """names: our names within a layer beyond `_LAYER`. spec: what a configuration says beyond the
    common fields; config: the way back. The sets are those of `_fields.check`."""

    spec: Callable[[Any], dict[str, Any]]
    config: Callable[[DecoderSpec], dict[str, Any]]
    names: Mapping[str, list[str]] = field(default_factory=dict)
    honoured: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()


def _qwen_balance(config: Any) -> float:
    """The load-balancing coefficient with its meaning: theirs counts every choice of a token, ours
    the mean choice, and theirs pools the layers where ours sums them."""
    coefficient = config.router_aux_loss_coef if config.output_router_logits else 0.0
    return coefficient * config.num_experts_per_tok / config.num_hidden_layers


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, "balance_coef": _qwen_balance(config)}


def _qwen2_moe(config: Any) -> dict[str, Any]:
    dense = list(config.mlp_only_layers)
    if dense != list(range(len(dense))):
        raise UsageError(
            f"qwen2_moe: mlp_only_layers is {dense}; only first layers can do without experts, "
            f"as in {list(range(len(dense)))}"
        )
    return {
        "qk_norm": False,
        "balance_coef": _qwen_balance(config),
        "shared_d_ff": config.shared_expert_intermediate_size,
        "shared_gate": True,
        "dense_layers": len(dense),
        "dense_d_ff": config.intermediate_size if dense else 0,
    }


def _of_qwen3(spec: DecoderSpec) -> dict[str, Any]:
    return {"num_experts": spec.num_experts}


def _of_qwen2(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "num_experts": spec.num_experts,
        "shared_expert_intermediate_size": spec.shared_d_ff,
        "mlp_only_layers": list(range(spec.dense_layers)),
        "intermediate_size": spec.dense_d_ff or spec.expert_d_ff,
        "qkv_bias": False,
        "use_sliding_window": False,
    }


def _of_dots1(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": spec.shared_d_ff // spec.expert_d_ff,
        "first_k_dense_replace": spec.dense_layers,
        "intermediate_size": spec.dense_d_ff or spec.expert_d_ff,
        "routed_scaling_factor": spec.scale,
        "n_group": spec.num_groups,
        "topk_group": spec.groups_kept,
        "sliding_window": None,
    }


def _dots1(config: Any) -> dict[str, Any]:
    dense = config.first_k_dense_replace or 0
    return {
        "qk_norm": True,
        "score": "sigmoid",
        "scale": config.routed_scaling_factor,
        "num_groups": config.n_group,
        "groups_kept": config.topk_group,
        "group_score": "sum2",
        "bias_update_rate": 1e-3,  # of DeepSeek-V3, whose router this is
        "balance_coef": 0.0,
        "shared_d_ff": (config.n_shared_experts or 0) * config.moe_intermediate_size,
        "dense_layers": dense,
        "dense_d_ff": config.intermediate_size if dense else 0,
    }


FAMILIES = {
    "qwen3_moe": Family(
        _qwen3_moe,
        _of_qwen3,
        honoured=frozenset({"output_router_logits", "router_aux_loss_coef"}),
        neutral={**_QWEN, "mlp_only_layers": [], "sliding_window": None},
        irrelevant=frozenset({"intermediate_size"}),  # of layers without experts
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        _of_qwen2,
        names={
            **_shared("mlp.shared_expert"),
            "moe.shared.gate": ["mlp.shared_expert_gate.weight"],
        },
        honoured=frozenset(
            {
                "intermediate_size",
                "layer_types",
                "mlp_only_layers",
                "output_router_logits",
                "router_aux_loss_coef",
                "shared_expert_intermediate_size",
            }
        ),
        neutral={**_QWEN, "sliding_window": 0, "qkv_bias": False},
    ),
    "dots1": Family(
        _dots1,
        _of_dots1,
        names=_shared("mlp.shared_experts"),
        honoured=frozenset(
            {
                "first_k_dense_replace",
                "intermediate_size",
                "layer_types",
                "n_group",
                "n_routed_experts",
                "n_shared_experts",
                "routed_scaling_factor",
                "topk_group",
            }
        ),
        neutral={**_NEUTRAL, "sliding_window": None, "output_router_logits": False},
    ),
}


def family_of(config: PreTrainedConfig) -> str:
    """The family's name in `FAMILIES`; UsageError where there is none."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in FAMILIES:
        raise UsageError(
            f"{kind}: no family of decoders here; use one of {', '.join(sorted(FAMILIES))}"
        )
    return kind


def decoder_spec(config: PreTrainedConfig) -> DecoderSpec:
    """Our specification of the same model; what ours cannot express is a UsageError that names the
    field."""
    kind = family_of(config)
    family = FAMILIES[kind]
    _fields.check(
        config,
        honoured=_HONOURED | family.honoured,
        neutral={**family.neutral, "model_type": kind},
        irrelevant=_IRRELEVANT | family.irrelevant,
    )
    sliding = [n for n in getattr(config, "layer_types", None) or [] if n != "full_attention"]
    if sliding:
        raise UsageError(f"{kind}: layer_types has {sliding[0]!r}; use 'full_attention' alone")
    rope = config.rope_parameters
    _fields.check_inside(kind, "rope_parameters", rope, _ROPE)
    heads = config.num_attention_heads
    return DecoderSpec(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        num_experts=config.num_local_experts
        if hasattr(config, "n_routed_experts")
        else config.num_experts,
        top_k=config.num_experts_per_tok,
        expert_d_ff=config.moe_intermediate_size,
        renormalize=config.norm_topk_prob,
        z_coef=0.0,
        rope_theta=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
        **family.spec(config),
    )


def config_of(spec: DecoderSpec, family: str, **more: Any) -> PreTrainedConfig:
    """The family's configuration of the same model, as far as the family can say it; `more`: fields
    beside, token numbers say."""
    import transformers

    return transformers.CONFIG_MAPPING[family](
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        num_experts_per_tok=spec.top_k,
        moe_intermediate_size=spec.expert_d_ff,
        norm_topk_prob=spec.renormalize,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        initializer_range=spec.init_std,
        **FAMILIES[family].config(spec),
        **more,
    )


def their_names(name: str, family: str) -> list[str]:
    """Our full parameter (or selection bias) name -> theirs, whose tensors joined along dimension 0
    are ours; a feed-forward that all tokens visit has a first dimension of one here."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, number, rest = name.split(".", 2)
    inside = {**_LAYER, **FAMILIES[family].names}[rest]
    return [f"model.layers.{int(number) - 1}.{theirs}" for theirs in inside]


def file_names(name: str, family: str, full_shape: tuple[int, ...]) -> list[list[str]]:
    """Our full name -> the keys in files: for each expert, and once where there are none, those
    that lie one behind the other."""
    _, _, rest = name.partition(".")[2].partition(".") if name.startswith("layers.") else ("",) * 3
    if rest not in _EXPERT:
        return [their_names(name, family)]
    layer = int(name.split(".")[1]) - 1
    patterns = [f"model.layers.{layer}.{inside}" for inside in _EXPERT[rest]]
    return [[pattern.format(e) for pattern in patterns] for e in range(full_shape[0])]


def in_our_shape(parts: list[Tensor], full_shape: tuple[int, ...]) -> Tensor:
    """Their tensors as our full one."""
    full = torch.cat(parts)
    return full[None] if full_shape[0] == 1 and full.dim() + 1 == len(full_shape) else full


class Chunk(Protocol):
    """What is asked of a `moekernels.nn.transformer.StageModel`."""

    def named_shards(self) -> Iterator[tuple[str, Tensor, Any]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def load_(model: Chunk, state: Mapping[str, Tensor], family: str) -> None:
    """Copy the `state_dict()` of a model of the family into our chunk, each rank its shard."""
    for name, parameter, info in model.named_shards():
        full = in_our_shape([state[n] for n in their_names(name, family)], info.full_shape)
        if full.shape != info.full_shape:
            raise UsageError(
                f"{family}: {name} has shape {list(full.shape)} there, {list(info.full_shape)} here"
            )
        parameter.copy_(info.take(full))
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(state[their_names(name, family)[0]])
