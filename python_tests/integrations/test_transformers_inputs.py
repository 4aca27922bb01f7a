"""Experts modules of transformers under any input: sizes, ids, dtypes, autocast, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

from transformers.activations import ACT2FN

import moekernels.integrations.transformers as integration
from moekernels import ops
from moekernels.errors import UsageError
from moekernels.integrations.transformers import epilogue_of
from python_tests.support.transformers_models import (
    EXPERTS,
    HIDDEN,
    TOLERANCE,
    TOP_K,
    WIDTH,
    assert_equal_to_eager,
    decorated_experts,
    gpt_oss,
    gradients,
    qwen3,
    routed_input,
    tiny_config,
    tiny_experts,
    worst,
)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8, 33])
@pytest.mark.parametrize("make", [qwen3, gpt_oss])
def test_any_number_of_tokens(make, tokens):
    module, config = make()
    if tokens:
        assert_equal_to_eager(module, config, tokens)
        return
    config._experts_implementation = "moekernels"
    x, weights = torch.zeros(0, HIDDEN, requires_grad=True), torch.zeros(0, TOP_K)
    y = module(x, torch.zeros(0, TOP_K, dtype=torch.int64), weights)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("sentinel", [EXPERTS, EXPERTS + 7, -1])
@pytest.mark.parametrize(
    "model, name",
    [
        ("qwen3_moe", "Qwen3MoeExperts"),
        ("gpt_oss", "GptOssExperts"),
        ("inkling2", "Inkling2Experts"),
    ],
)
def test_ids_of_experts_elsewhere_contribute_nothing(model, name, sentinel):
    if (model, name) not in decorated_experts():
        pytest.skip(f"no {name} in this transformers")
    config = tiny_config(_experts_implementation="moekernels")
    module = tiny_experts(model, name, config)
    module._is_expert_parallel = True
    x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
    elsewhere = torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)) < 0.4
    elsewhere[0] = True  # a token with no expert here
    y = module(x, torch.where(elsewhere, sentinel, ids), weights)
    ours = {"output": y} | gradients(module, y, x, weights)

    config._experts_implementation = "eager"
    masked = torch.where(elsewhere, 0, weights)
    y = module(x, ids, masked)
    theirs = {"output": y} | gradients(module, y, x, weights)
    error, where = worst(ours, theirs)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"
    assert ours["output"][0].abs().max() == 0
    assert (ours["input 1"][elsewhere] == 0).all()


@pytest.mark.parametrize(
    "weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_of_any_dtype(dtype, weight_dtype):
    module, config = qwen3()
    x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
    exact = module.double()(x.double(), ids, weights.to(weight_dtype).double())
    module.to(dtype)
    config._experts_implementation = "moekernels"
    given = weights.detach().to(weight_dtype).requires_grad_()
    y = module(x.to(dtype), ids, given)
    y.float().sum().backward()
    assert y.dtype == dtype and given.grad.dtype == weight_dtype
    # A bf16 result carries the rounding of x, the weights, H, A and y: a handful of 2^-9 steps.
    assert worst({"": y.double()}, {"": exact})[0] <= (
        TOLERANCE if dtype == torch.float32 else 0.02
    )


def test_input_of_another_dtype_than_the_parameters():
    module, config = qwen3(_experts_implementation="moekernels")
    x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
    y = module.bfloat16()(x, ids, weights)
    assert y.dtype == torch.float32
    exact = module.double()(x.double(), ids, weights.double())
    assert worst({"": y.double()}, {"": exact})[0] <= 0.02


@pytest.mark.parametrize("make", [qwen3, gpt_oss])
def test_autocast_computes_in_its_dtype_and_keeps_the_dtypes_outside(make, monkeypatch):
    # A limit that nothing reaches: at a clamp's edge rounding changes the gradient altogether.
    module, config = make(_experts_implementation="moekernels", swiglu_limit=1e3)
    seen, fused = [], ops.experts
    monkeypatch.setattr(
        ops, "experts", lambda x, *a, **k: seen.append(x.dtype) or fused(x, *a, **k)
    )
    x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, ids, weights)
    grads = gradients(module, y, x, weights)
    assert seen == [torch.bfloat16]
    assert {y.dtype, *(g.dtype for g in grads.values())} == {torch.float32}
    config._experts_implementation = "eager"
    exact = module(x, ids, weights)
    assert worst({"": y} | grads, {"": exact} | gradients(module, exact, x, weights))[0] <= 0.03


def test_flags_that_an_older_transformers_does_not_set():
    module, config = qwen3()
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        delattr(module, flag)
    for flag in ("has_post_expert_norm", "_is_expert_parallel"):
        module.__dict__.pop(flag, None)
    assert_equal_to_eager(module, config)


def test_flags_that_a_newer_transformers_may_set(monkeypatch):
    """One that a class leaves at its default changes nothing; set, it is refused by name."""

    def newer(experts_class=None, *, has_gate=True, has_dropout=False):
        """As `use_experts_implementation` of a release to come."""

    unknown = integration._unknown_flags(newer)
    assert unknown == (("has_dropout", False),)
    monkeypatch.setattr(integration, "_UNKNOWN", unknown)
    module, config = qwen3()
    assert_equal_to_eager(module, config)
    module.has_dropout = True
    config._experts_implementation = "moekernels"
    with pytest.raises(UsageError, match="Experts: has_dropout is True, and what it means"):
        module(*routed_input(5, HIDDEN, EXPERTS, TOP_K))


def test_parametrized_weights_as_peft_makes_them():
    class LowRank(nn.Module):
        def __init__(self, shape: torch.Size) -> None:
            super().__init__()
            experts, out, into = shape
            self.a = nn.Parameter(torch.randn(experts, 2, into) * 0.3)
            self.b = nn.Parameter(torch.randn(experts, out, 2) * 0.3)

        def forward(self, w: Tensor) -> Tensor:
            return w + self.b @ self.a

    module, config = qwen3()
    module.requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name).shape))
    found = []
    for implementation in ("moekernels", "eager"):
        config._experts_implementation = implementation
        x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
        module.zero_grad()
        module(x, ids, weights).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})
    assert len(found[0]) == 4
    assert worst(*found)[0] <= TOLERANCE


def test_two_runs_give_the_same_bits():
    module, config = gpt_oss(_experts_implementation="moekernels")
    found = []
    for _ in range(2):
        x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
        y = module(x, ids, weights)
        found.append([y, *gradients(module, y, x, weights).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- torch.compile


@pytest.mark.parametrize(
    "act, make, tried_before",
    [
        ("silu", qwen3, False),
        ("gelu_pytorch_tanh", qwen3, False),
        ("silu", gpt_oss, False),
        ("silu", gpt_oss, True),
    ],
)
def test_compile_in_one_graph(act, make, tried_before):
    module, config = make(act=act)
    if tried_before:
        epilogue_of(module, WIDTH)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for implementation, run in (("moekernels", compiled), ("eager", module)):
        config._experts_implementation = implementation
        x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
        y = run(x, ids, weights)
        found.append({"output": y} | gradients(module, y, x, weights))
    assert worst(*found)[0] <= TOLERANCE


def test_compiled_module_sees_a_changed_alpha():
    module, config = gpt_oss()
    epilogue_of(module, WIDTH)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for alpha in (1.3, 0.4):
        module.alpha = alpha
        x, ids, weights = routed_input(19, HIDDEN, EXPERTS, TOP_K)
        config._experts_implementation = "moekernels"
        ours = compiled(x, ids, weights)
        config._experts_implementation = "eager"
        assert worst({"": ours}, {"": module(x, ids, weights)})[0] <= TOLERANCE


def test_every_activation_name_of_transformers_is_safe():
    """Whatever `hidden_act` says: fused only where the probe, too, finds the same function."""
    for act in ACT2FN:
        if act == "xielu":
            continue  # asks for a CUDA package on construction
        module, config = qwen3(act)
        if epilogue_of(module, WIDTH).activation is not None:
            assert_equal_to_eager(module, config)
