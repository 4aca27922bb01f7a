"""Decoders of transformers as ours: the same architecture, so weights go over one to one.

from moekernels.integrations.families import decoder_spec, load_
model = StageModel(decoder_spec(hf.config), Mesh(Layout()), range(1, n + 1), True, True)
load_(model, hf.state_dict(), "qwen3_moe")

A family is an entry of `FAMILIES`: what our names are called there, how its configuration reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moekernels.errors import UsageError
from moekernels.integrations import _family, _fields
from moekernels.integrations._deepseek import DEEPSEEK
from moekernels.integrations._plain import PLAIN
from moekernels.model.decoder import DecoderSpec
from moekernels.model.tensors import SELECTION_BIAS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = {**PLAIN, **DEEPSEEK}


def family_of(config: PreTrainedConfig) -> str:
    """The family's name in `FAMILIES`; UsageError where there is none."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in FAMILIES:
        raise UsageError(
            f"{kind}: no family of decoders here; use one of {', '.join(sorted(FAMILIES))}"
        )
    return kind


def _experts(config: Any) -> int:
    """Their number, by the first name that the architecture has for it."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def decoder_spec(config: PreTrainedConfig) -> DecoderSpec:
    """Our specification of the same model; UsageError that names a field ours cannot express."""
    kind = family_of(config)
    family = FAMILIES[kind]
    _fields.check(
        config,
        honoured=_family.HONOURED | family.honoured,
        neutral={**family.neutral, "model_type": kind},
        irrelevant=_family.IRRELEVANT | family.irrelevant,
    )
    layers = getattr(config, "layer_types", None) or []
    sliding = [n for n in layers if n != "full_attention"]
    if sliding and kind != "gpt_oss":
        raise UsageError(f"{kind}: layer_types has {sliding[0]!r}; use 'full_attention' alone")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        **_family.rotary(config, head_dim, family.partial),
        "num_experts": _experts(config),
        "top_k": config.num_experts_per_tok,
        "z_coef": 0.0,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    for ours, theirs in (
        ("expert_d_ff", "moe_intermediate_size"),
        ("renormalize", "norm_topk_prob"),
    ):
        if hasattr(config, theirs):
            fields[ours] = getattr(config, theirs)
    return DecoderSpec(**{**fields, **family.spec(config)})


def config_of(spec: DecoderSpec, family: str, **more: Any) -> PreTrainedConfig:
    """The family's configuration of the same model, as far as the family can say it; `more`: fields
    beside, token numbers say."""
    import transformers

    fields = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.kv_heads,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.renormalize,
        "rope_parameters": _family.rope_parameters(spec),
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.init_std,
        **FAMILIES[family].config(spec),
        **more,
    }
    kind = transformers.CONFIG_MAPPING[family]
    if spec.kv_rank == 0:
        fields["head_dim"] = spec.head_dim
    if not hasattr(kind(), "norm_topk_prob"):
        del fields["norm_topk_prob"]
    return kind(**fields)


def their_names(name: str, family: str) -> list[str]:
    """Our full parameter (or selection bias) name -> theirs, whose tensors joined along dimension 0
    are ours; a feed-forward that all tokens visit has a first dimension of one here."""
    prefix, inner = _place(name)
    if not prefix:
        return _family.OUTSIDE[name]
    inside = {**_family.LAYER, **FAMILIES[family].names}[inner]
    return [prefix + theirs for theirs in inside]


def _place(name: str) -> tuple[str, str]:
    """Our full name -> (what begins their names of its layer, our name within it); without a
    prefix what lies outside of the layers."""
    if not name.startswith("layers."):
        return "", name
    _, number, inner = name.split(".", 2)
    return f"model.layers.{int(number) - 1}.", inner


def file_names(name: str, family: str, full_shape: tuple[int, ...]) -> list[list[str]]:
    """Our full name -> the keys in files: for each expert, and once where they are not apart, those
    that lie one behind the other."""
    files, (prefix, inner) = FAMILIES[family].files, _place(name)
    if inner not in files:
        return [their_names(name, family)]
    patterns = [prefix + inside for inside in files[inner]]
    if "{}" not in patterns[0]:
        return [patterns]
    return [[pattern.format(e) for pattern in patterns] for e in range(full_shape[0])]


def form_of(name: str, family: str) -> str:
    """How our tensor lies in theirs; empty: as it is."""
    return FAMILIES[family].forms.get(_place(name)[1], "")


def in_our_shape(parts: list[Tensor], full_shape: tuple[int, ...], form: str = "") -> Tensor:
    """Their tensors as our full one."""
    full = torch.cat(parts)
    if "transposed" in form:
        full = full.mT
    if "interleaved" in form:  # gate and up by turns
        full = torch.cat([full[:, 0::2], full[:, 1::2]], dim=1)
    return full[None] if full_shape[0] == 1 and full.dim() + 1 == len(full_shape) else full


def in_their_form(ours: Tensor, form: str) -> Tensor:
    """The way back."""
    if "interleaved" in form:
        ours = torch.stack(ours.chunk(2, dim=1), dim=2).flatten(1, 2)
    return ours.mT if "transposed" in form else ours


class Chunk(Protocol):
    """What is asked of a `moekernels.nn.transformer.StageModel`."""

    def named_shards(self) -> Iterator[tuple[str, Tensor, Any]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def load_(model: Chunk, state: Mapping[str, Tensor], family: str) -> None:
    """Copy the `state_dict()` of a model of the family into our chunk, each rank its shard."""
    for name, parameter, info in model.named_shards():
        parts = [state[n] for n in their_names(name, family)]
        full = in_our_shape(parts, info.full_shape, form_of(name, family))
        if full.shape != info.full_shape:
            raise UsageError(
                f"{family}: {name} has shape {list(full.shape)} there, {list(info.full_shape)} here"
            )
        parameter.copy_(info.take(full))
    for name, buffer in model.named_buffers():
        if name.endswith(SELECTION_BIAS):
            buffer.copy_(state[their_names(name, family)[0]])
