"""The transformers integration against transformers' own eager loop: models, and every class."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moekernels.integrations.transformers as integration
from python_tests.support.transformers_models import (
    FAMILIES,
    TOLERANCE,
    assert_equal_to_eager,
    decorated_experts,
    gradients,
    own_activations,
    tiny_config,
    tiny_experts,
    tiny_model,
    worst,
)

# ---- the registry


def test_import_registers_and_registering_again_changes_nothing():
    before = dict(ALL_EXPERTS_FUNCTIONS)
    assert before["moekernels"] is integration.experts_forward
    integration.register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


@pytest.mark.parametrize("model, name", decorated_experts())
def test_every_class_equals_its_own_loop_and_is_fused_where_a_kernel_has_its_epilogue(
    model, name, fused_calls
):
    for act in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu"):
        config = tiny_config(act)
        module = tiny_experts(model, name, config)
        ours = own_activations(module, config)
        del fused_calls[:]
        assert_equal_to_eager(module, config)
        assert not ours or fused_calls[:1] == sorted(ours), f"{act}: {ours} ran as {fused_calls}"


# ---- whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_model_equals_eager(family, fused_calls):
    model = tiny_model(family)
    tokens = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(4))
    found = []
    for implementation in ("moekernels", "eager"):
        model.set_experts_implementation(implementation)
        out = model(tokens, labels=tokens)
        found.append({"logits": out.logits, "loss": out.loss} | gradients(model, out.logits))
    assert fused_calls
    error, where = worst(*found)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family):
    model = tiny_model(family).eval()
    prompt = torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(5))
    found = []
    for implementation in ("moekernels", "eager"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        found.append(model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None))
    assert found[0].shape == (2, 13)
    assert torch.equal(*found)


def test_saved_model_loads_with_the_implementation(tmp_path):
    model = tiny_model("Mixtral").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moekernels")
    tokens = torch.arange(3, 12)[None]
    assert worst({"": loaded(tokens).logits}, {"": model(tokens).logits})[0] <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*checkpointing_.*deprecated:FutureWarning")  # a newer name
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    model = tiny_model(family, use_cache=False)
    model.set_experts_implementation("moekernels")
    tokens = torch.arange(3, 20)[None]
    found = []
    for checkpointing in (
        True,
        False,
    ):  # first with it: the gate is then tried inside the checkpoint
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        model.train()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert worst(*found)[0] <= TOLERANCE
