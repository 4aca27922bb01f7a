"""Every tensor of a decoder, by its full name and shape: what checkpoints hold and weights of
elsewhere are taken for, without a module being built.

Legend: E experts, H hidden, I expert input width, F hidden of an FFN, V vocabulary.
"""

from __future__ import annotations

from moekernels.model.decoder import DecoderSpec

Shape = tuple[int, ...]
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
    hidden = spec.d_model
    found = {"attention_norm.weight": (hidden,), **_attention(spec)}
    if layer <= spec.dense_layers:
        ffn = _ffn(spec, "ffn", spec.dense_d_ff)
        return {**found, "ffn_norm.weight": (hidden,), **ffn}
    experts, d_in, f = spec.num_experts, spec.d_in, spec.expert_d_ff
    found |= {
        "moe_norm.weight": (hidden,),
        "moe.router.weight": (experts, hidden),
        **({"moe.router.bias": (experts,)} if spec.router_bias else {}),
        "moe.experts.w1": (experts, spec.up_rows * f, d_in),
        "moe.experts.w2": (experts, d_in, f),
    }
    if spec.expert_bias:
        found["moe.experts.b1"] = (experts, spec.up_rows * f)
        found["moe.experts.b2"] = (experts, d_in)
    if spec.lifted:
        found["moe.experts.w_in"] = (experts, d_in, hidden)
        found["moe.experts.w_out"] = (experts, hidden, d_in)
    if spec.shared_d_ff:
        found |= _ffn(spec, "moe.shared", spec.shared_d_ff)
        if spec.shared_gate:
            found["moe.shared.gate"] = (1, hidden)
    return found


def _attention(spec: DecoderSpec) -> dict[str, Shape]:
    heads, kv, hd = spec.num_heads, spec.kv_heads, spec.head_dim
    if spec.kv_rank:
        return _latent_attention(spec)
    rows = (heads + 2 * kv) * hd
    found: dict[str, Shape] = {
        "attention.qkv": (rows, spec.d_model),
        "attention.out": (spec.d_model, heads * hd),
    }
    if spec.qkv_bias:
        found["attention.qkv_bias"] = (rows,)
    if spec.out_bias:
        found["attention.out_bias"] = (spec.d_model,)
    if spec.sinks:
        found["attention.sinks"] = (heads,)
    if spec.qk_norm or spec.qk_norm_wide:
        widths = (hd, hd) if spec.qk_norm else (heads * hd, kv * hd)
        found |= {f"attention.{x}_norm.weight": (width,) for x, width in zip("qk", widths)}
    return found


def _latent_attention(spec: DecoderSpec) -> dict[str, Shape]:
    heads, hd, rank, hidden = spec.num_heads, spec.head_dim, spec.kv_rank, spec.d_model
    made = hd - spec.rotary_dim + spec.v_dim
    found: dict[str, Shape] = {}
    if spec.q_rank:
        found["attention.q_a"] = (spec.q_rank, hidden)
        found["attention.q_b"] = (heads * hd, spec.q_rank)
    else:
        found["attention.q"] = (heads * hd, hidden)
    found |= {
        "attention.kv_a": (rank + spec.rotary_dim, hidden),
        "attention.kv_b": (heads * made, rank),
        "attention.out": (hidden, heads * spec.v_dim),
    }
    if spec.q_rank:
        found["attention.q_a_norm.weight"] = (spec.q_rank,)
    return {**found, "attention.kv_a_norm.weight": (rank,)}


def _ffn(spec: DecoderSpec, name: str, d_ff: int) -> dict[str, Shape]:
    return {
        f"{name}.w1": (1, spec.up_rows * d_ff, spec.d_model),
        f"{name}.w2": (1, spec.d_model, d_ff),
    }
