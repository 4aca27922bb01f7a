"""Tiny random models and experts modules of transformers, for the tests of the integration, and how
they are held to transformers' own eager loop."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moekernels import reference
from moekernels.model.experts import ACTIVATIONS

GATED = [name for name, gated in ACTIVATIONS.items() if gated]
PLAIN = [name for name, gated in ACTIVATIONS.items() if not gated]

_SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_DEEPSEEK = dict(
    num_key_value_heads=4,
    head_dim=4,  # the rotary part
    n_routed_experts=8,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
_OWN: dict[str, dict[str, Any]] = {
    "Qwen3Moe": dict(num_experts=6, num_experts_per_tok=3, norm_topk_prob=True),
    "Qwen2Moe": dict(
        num_experts=6, num_experts_per_tok=3, shared_expert_intermediate_size=20, qkv_bias=False
    ),
    "Dots1": dict(
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        sliding_window=None,
    ),
    "Mixtral": dict(num_local_experts=5, num_experts_per_tok=2),
    "Olmoe": dict(num_experts=7, num_experts_per_tok=4),
    "DeepseekV3": _DEEPSEEK,
    "Glm4Moe": dict(
        n_routed_experts=6,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "DeepseekV2": {
        **{k: v for k, v in _DEEPSEEK.items() if k not in ("head_dim", "n_group", "topk_group")},
        "routed_scaling_factor": 1.5,
    },
    "GptOss": dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=16),
}
FAMILIES = tuple(_OWN)
TOLERANCE = 1e-5
HIDDEN, WIDTH, EXPERTS, TOP_K = 20, 24, 6, 3  # of `tiny_config`
LIMITS, ALPHAS = (0.9, 7.0), (1.3, 1.702)  # `tiny_config`'s and gpt-oss's, which some classes fix


def tiny_model(family: str, **overrides: Any) -> nn.Module:
    """A two-layer fp32 causal language model of the family, biases and norms random too."""
    config_class = getattr(transformers, family + "Config")
    config = config_class(**{**_SMALL, **_OWN[family], **overrides})
    torch.manual_seed(0)
    model_class = getattr(transformers, family + "ForCausalLM")
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    return model


def decorated_experts() -> list[tuple[str, str]]:
    """(model, class name) of every experts class of the installed transformers' registry."""
    root = Path(transformers.__file__).parent / "models"
    pattern = re.compile(
        r"^@use_experts_implementation(?:\([^)]*\))?\n(?:@[^\n]*\n)*class (\w+)", re.MULTILINE
    )
    return [
        (path.parent.name, name)
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    ]


class TinyConfig(SimpleNamespace):
    """A configuration of small sizes. What it does not say is what the class' own configuration
    says by default (`of`), sizes made small, so that a class that reads other names builds too."""

    of: Any = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__.get("of"), name)  # AttributeError where it knows none either
        if type(value) is int and value > 8:
            value = 6 if "expert" in name else 20 if "hidden" in name else 12
        return value


def tiny_config(act: str = "silu", **overrides: Any) -> TinyConfig:
    """The configuration values that experts classes read."""
    values = dict(
        hidden_size=20,
        moe_hidden_size=20,
        moe_latent_size=None,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_experts=6,
        num_local_experts=6,
        n_routed_experts=6,
        moe_num_experts=6,
        num_experts_per_tok=3,
        hidden_act=act,
        hidden_activation=act,
        mlp_hidden_act="relu2" if act == "silu" else act,
        swiglu_limit=0.9,  # small enough that the clamps bite
        swiglu_alpha=1.3,
        mlp_gate_softcap=1.5,
        mlp_up_softcap=1.2,
        post_norm_eps=1e-6,
        _experts_implementation="eager",
    )
    return TinyConfig(**{**values, **overrides})


def tiny_experts(model: str, name: str, config: TinyConfig) -> nn.Module:
    """One experts module, fp32, random parameters."""
    stem = f"transformers.models.{model}.modeling_{model}"
    file = importlib.import_module(stem)
    made_by = getattr(file, name)
    own = made_by.__init__.__annotations__.get("config")
    own = getattr(file, own, None) if isinstance(own, str) else own
    config.of = own() if isinstance(own, type) else None
    module = made_by(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def routed_input(
    tokens: int, hidden: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], distinct ids [T, K] that leave one expert empty, routing weights [T, K]."""
    torch.manual_seed(2)
    x = torch.randn(tokens, hidden, requires_grad=True)
    scores = torch.rand(tokens, num_experts)
    scores[:, num_experts // 2] = -1
    ids = scores.topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, requires_grad=True)
    return x, ids, weights


def gradients(module: nn.Module, output: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the output, by parameter name and input."""
    torch.manual_seed(3)
    named = dict(module.named_parameters())
    named |= {f"input {i}": x for i, x in enumerate(inputs)}
    seed = torch.randn_like(output)
    found = torch.autograd.grad(output, list(named.values()), seed, allow_unused=True)
    return {name: grad for name, grad in zip(named, found) if grad is not None}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest max|a-b| / max|b| over the tensors, and its name; both name the same ones."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    errors = {
        name: ((ours[name] - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for name, b in theirs.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def both(module: nn.Module, config, tokens: int = 19) -> list[dict[str, Tensor]]:
    """(outputs and gradients through our function, the same through the class' own loop)."""
    found = []
    for implementation in ("moekernels", "eager"):
        config._experts_implementation = implementation
        x, ids, weights = routed_input(tokens, HIDDEN, EXPERTS, TOP_K)
        y = module(x, ids, weights)
        found.append({"output": y} | gradients(module, y, x, weights))
    return found


def assert_equal_to_eager(module: nn.Module, config, tokens: int = 19) -> None:
    error, where = worst(*both(module, config, tokens))
    assert error <= TOLERANCE, f"{where}: {error:.1e}"


def own_activations(module: nn.Module, config: SimpleNamespace) -> set[str]:
    """The activations of ours with which the class' own loop agrees, judged by its output alone:
    its two products around each, written here in plain torch."""
    gated, flipped = getattr(module, "has_gate", True), getattr(module, "is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"
    w1, w2 = getattr(module, first), module.down_proj
    b1, b2 = (getattr(module, f"{name}_bias", None) for name in (first, "down_proj"))
    if flipped:
        w1, w2 = w1.mT, w2.mT
    config._experts_implementation = "eager"
    x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
    x = 2 * x  # so that wide clamps show, too
    w1, b1, w2, b2 = (None if p is None else p.detach()[ids] for p in (w1, b1, w2, b2))
    with torch.no_grad():
        wanted = module(x, ids, weights)

    def product(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """rows [T, K, I], w [T, K, O, I] -> [T, K, O]; no matrix product: those start threads."""
        y = (w * rows[..., None, :]).sum(-1)
        return y if b is None else y + b

    @torch.no_grad()
    def agrees(**epilogue: Any) -> bool:
        a = reference.activate(h.flatten(0, 1), **epilogue).unflatten(0, ids.shape)
        y = (product(a, w2, b2) * weights[..., None]).sum(1)
        return worst({"": y}, {"": wanted})[0] <= TOLERANCE

    h = product(x[:, None].expand(-1, TOP_K, -1), w1, b1)
    if not gated:
        return {name for name in PLAIN if agrees(activation=name)}
    found = set()
    for name, interleaved in itertools.product(GATED, (False, True)):
        for limit in LIMITS if "clamped" in name or "oai" in name else LIMITS[:1]:
            for alpha in ALPHAS if "oai" in name else ALPHAS[:1]:
                how = dict(limit=limit, alpha=alpha, interleaved=interleaved)
                if agrees(activation=name, **how):
                    found.add(name)
    return found


def gpt_oss(**overrides):
    config = tiny_config(**overrides)
    return tiny_experts("gpt_oss", "GptOssExperts", config), config


def qwen3(act: str = "silu", **overrides):
    config = tiny_config(act, **overrides)
    return tiny_experts("qwen3_moe", "Qwen3MoeExperts", config), config
