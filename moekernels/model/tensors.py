"""Every tensor of a decoder, by its full name and shape: what checkpoints hold and weights of
elsewhere are taken for, without a module being built."""

from __future__ import annotations

from moekernels.model.decoder import DecoderSpec, layer_parts
from moekernels.model.spec import Shape

SELECTION_BIAS = "selection_bias"  # moved by a rule, by no gradient: no parameter


def parameters(spec: DecoderSpec) -> dict[str, Shape]:
    """Full name -> full shape of each parameter, in the order of the layers."""
    wide = (spec.vocab_size, spec.d_model)
    found: dict[str, Shape] = {"embedding.weight": wide}
    for layer in range(1, spec.num_layers + 1):
        found |= {f"layers.{layer}.{k}": shape for k, shape in _layer(spec, layer).items()}
    found["norm.weight"] = (spec.d_model,)
    if not spec.tie_embeddings:
        found["head.weight"] = wide
    return found


def biases(spec: DecoderSpec) -> dict[str, Shape]:
    """The same of the routers' selection biases."""
    if not spec.bias_update_rate:
        return {}
    layers = range(spec.dense_layers + 1, spec.num_layers + 1)
    return {f"layers.{n}.moe.router.{SELECTION_BIAS}": (spec.num_experts,) for n in layers}


def _layer(spec: DecoderSpec, layer: int) -> dict[str, Shape]:
    """By the parts' order, each with its norm before it where it has one."""
    found: dict[str, Shape] = {}
    for part, counts in layer_parts(spec, layer):
        if part in NORMS:
            found[f"{NORMS[part]}.weight"] = (spec.d_model,)
        found |= {f"{_home(part)}.{key}": shape for key, shape in counts.shapes(spec).items()}
    return found


NORMS = {"attention": "attention_norm", "dense": "ffn_norm", "router": "moe_norm"}


def _home(part: str) -> str:
    """Where a block has a part."""
    return {"attention": part, "dense": "ffn"}.get(part, f"moe.{part}")
