"""What the contract test knows of experts: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops.experts import experts
from python_tests.support.spec import (
    Case,
    OpSpec,
    large_routing,
    nbytes,
    randn,
    random_ids,
    register,
    routed,
    routing_cases,
    wide,
)


def _case(
    dtype: torch.dtype,
    routing: reference.Routing,
    tokens: int,
    *,
    num_experts: int,
    hidden: int = 6,
    ffn: int = 5,
    view: bool = True,
    weighted: bool = True,
    bias: bool = False,
    **options,
) -> dict:
    activation, transposed = options.get("activation", "swiglu"), options.get("transposed", False)
    width = ffn * (2 if activation in reference.GATED else 1)
    rows = routing.token_of.shape[0]
    w1 = randn(dtype, num_experts, width, hidden, seed=1, scale=0.5)
    w2 = randn(dtype, num_experts, hidden, ffn, seed=2, scale=0.5)
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    inputs = {
        "x": randn(dtype, tokens if view else rows, hidden),
        "weights": randn(wide(dtype), rows, seed=3) if weighted else None,
        "w1": w1,
        "w2": w2,
        "offsets": routing.offsets,
        **options,
    }
    if view:
        inputs |= {"token_of": routing.token_of, "row_of": routing.row_of}
    if bias:
        inputs["b1"] = randn(dtype, num_experts, width, seed=4)
        inputs["b2"] = randn(dtype, num_experts, hidden, seed=5)
    return inputs


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, experts_, routing in routing_cases():
        inputs = _case(dtype, routing, ids.shape[0], num_experts=experts_)
        yield Case(name, inputs, compile=name == "ordinary")
        inputs = _case(
            dtype, routing, ids.shape[0], num_experts=experts_, view=False, weighted=False
        )
        yield Case(name + "_rows", inputs, gradcheck=name == "ordinary")
    ids = random_ids(13, 3, 2)
    routing = reference.route(ids, 3, alignment=4)
    kinks = ("reglu", "relu2", "swiglu_oai", "swiglu_clamped")
    for activation in (*reference.GATED, *reference.UNGATED):
        inputs = _case(
            dtype, routing, 13, num_experts=3, activation=activation, limit=0.8, bias=True
        )
        yield Case(activation, inputs, gradcheck=activation not in kinks)
    for flags in ({"interleaved": True}, {"transposed": True}, {"recompute": True}):
        inputs = _case(dtype, routing, 13, num_experts=3, bias=True, **flags)
        yield Case(next(iter(flags)), inputs)
    inputs = _case(
        dtype,
        routing,
        13,
        num_experts=3,
        bias=True,
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        hidden=33,
        ffn=47,
    )
    yield Case("gpt_oss", inputs, gradcheck=False)


def _large(dtype: torch.dtype) -> dict:
    routing = large_routing(tokens=300, experts=6, top_k=2)
    return _case(dtype, routing, 300, num_experts=6, hidden=64, ffn=40, bias=True)


def _sized(tokens: int) -> dict:
    return _case(torch.float32, routed(tokens), tokens, num_experts=5, bias=True)


def _messages():
    x, weights, offsets = torch.zeros(6, 4), torch.zeros(6), torch.tensor([0, 2, 6])
    w1, w2 = torch.zeros(2, 10, 4), torch.zeros(2, 4, 5)
    names = [*reference.GATED, *reference.UNGATED]
    yield (
        lambda: experts(x, weights, w1, w2, offsets, activation="tanh"),
        f"experts: activation must be {'|'.join(names)}, got 'tanh'",
    )
    yield (
        lambda: experts(x, weights, w1[:, :9], w2, offsets),
        "experts: w1 must be float32 [E=2, 2F=10, H=4], got float32 [2, 9, 4]",
    )
    yield (
        lambda: experts(x, weights, w1, torch.zeros(2, 3, 5), offsets),
        "experts: w2 must be float32 [E, H=4, F], got float32 [2, 3, 5]",
    )
    yield (
        lambda: experts(x, weights[:5], w1, w2, offsets),
        "experts: weights must be float32 [R=6], got float32 [5]",
    )
    yield (
        lambda: experts(x, weights, w1, w2, offsets, b2=torch.zeros(2, 5)),
        "experts: b2 must be float32 [E=2, H=4], got float32 [2, 5]",
    )
    yield (
        lambda: experts(
            x.requires_grad_(), weights, w1, w2, offsets, token_of=torch.zeros(6).int()
        ),
        "experts: x seen through token_of needs row_of for its gradient",
    )


def _saved(inputs: dict) -> int:
    h_elements = inputs["w1"].shape[2 if inputs.get("transposed") else 1]
    rows = len(inputs["token_of"] if inputs.get("token_of") is not None else inputs["x"])
    h_bytes = 0 if inputs.get("recompute") else rows * h_elements * inputs["x"].element_size()
    return h_bytes + nbytes(*[t for t in inputs.values() if isinstance(t, Tensor)])


register(
    OpSpec(
        name="experts",
        fn=experts,
        reference=reference.experts,
        cases=_cases,
        sized=_sized,
        differentiable=("x", "weights", "w1", "w2", "b1", "b2"),
        messages=_messages,
        large=_large,
        saved=_saved,
    )
)
