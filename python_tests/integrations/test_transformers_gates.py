"""The epilogue is what the class does, not what its config says."""

from __future__ import annotations

import copy
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekernels.integrations.transformers import Epilogue, epilogue_of
from python_tests.support.transformers_models import (
    EXPERTS,
    HIDDEN,
    TOLERANCE,
    TOP_K,
    WIDTH,
    assert_equal_to_eager,
    both,
    gpt_oss,
    qwen3,
    routed_input,
    tiny_config,
    tiny_experts,
    worst,
)


@pytest.mark.parametrize(
    "act, fused",
    [
        ("silu", "swiglu"),
        ("swish", "swiglu"),
        ("gelu", "geglu"),
        ("gelu_python", "geglu"),
        ("relu", "reglu"),
        ("gelu_pytorch_tanh", None),
        ("gelu_new", None),
        ("gelu_fast", None),
        ("quick_gelu", None),
        ("gelu_10", None),  # equals gelu up to 10
        ("mish", None),
        ("relu2", None),
        ("tanh", None),
    ],
)
def test_activations_are_told_apart(act, fused):
    module, config = qwen3(act)
    assert epilogue_of(module, WIDTH).activation == fused
    assert_equal_to_eager(module, config)


def test_changed_alpha_and_limit_are_picked_up():
    module, config = gpt_oss()
    module.alpha, module.limit = 1.3, 0.9
    assert_equal_to_eager(module, config)
    assert epilogue_of(module, WIDTH) == Epilogue("swiglu_oai", True, 1.3, 0.9)
    module.alpha, module.limit = 0.7, 0.25
    assert epilogue_of(module, WIDTH) == Epilogue("swiglu_oai", True, 0.7, 0.25)
    assert_equal_to_eager(module, config)


def test_limit_read_from_the_config_at_run_time_is_picked_up():
    module, config = qwen3()

    def gate(self, h: Tensor) -> Tensor:
        left, right = h.chunk(2, dim=-1)
        limit = self.config.swiglu_limit
        return F.silu(left.clamp(max=limit)) * right.clamp(-limit, limit)

    module._apply_gate = MethodType(gate, module)
    for limit in (0.9, 3):
        config.swiglu_limit = limit
        assert epilogue_of(module, WIDTH).limit == limit


def test_interleaved_and_concatenated_are_told_apart_whatever_the_flag():
    module, config = gpt_oss()
    other = tiny_experts("openai_privacy_filter", "OpenAIPrivacyFilterExperts", tiny_config())
    for flag in (False, True):
        for experts in (module, other):
            experts.is_concatenated = flag
            experts.__dict__.pop("_moekernels_epilogue", None)
        assert epilogue_of(module, WIDTH).interleaved
        assert not epilogue_of(other, WIDTH).interleaved
    assert_equal_to_eager(module, config)


def test_default_gate_splits_in_halves_whatever_the_flag():
    module, config = qwen3()
    module.is_concatenated = False
    assert not epilogue_of(module, WIDTH).interleaved
    assert_equal_to_eager(module, config)


def _swapped(self, h: Tensor) -> Tensor:
    up, left = h.chunk(2, dim=-1)
    return F.silu(left) * up


def _clamped_far_out(self, h: Tensor) -> Tensor:
    left, up = h.chunk(2, dim=-1)
    return F.silu(left) * up.clamp(-1000, 1000)


def _straight_through(self, h: Tensor) -> Tensor:  # the value is swiglu's, the gradient is not
    left, up = h.chunk(2, dim=-1)
    return F.silu(left) * up + (h.detach() - h).sum(-1, keepdim=True)


def _slightly_other(self, h: Tensor) -> Tensor:
    left, up = h.chunk(2, dim=-1)
    return left * torch.sigmoid(1.001 * left) * up


def _noisy(self, h: Tensor) -> Tensor:
    left, up = h.chunk(2, dim=-1)
    return F.dropout(F.silu(left) * up, 0.1, self.training)


@pytest.mark.parametrize(
    "gate", [_swapped, _clamped_far_out, _straight_through, _slightly_other, _noisy]
)
def test_gates_that_are_nearly_a_fused_one_stay_unfused(gate):
    module, _ = qwen3()
    module._apply_gate = MethodType(gate, module)
    assert epilogue_of(module, WIDTH).activation is None


def test_gate_that_depends_on_the_mode_is_tried_in_each():
    module, _ = qwen3()
    module._apply_gate = MethodType(_noisy, module)
    assert epilogue_of(module, WIDTH).activation is None
    assert epilogue_of(module.eval(), WIDTH).activation == "swiglu"
    assert epilogue_of(module.train(), WIDTH).activation is None


def test_patched_gate_and_replaced_activation_are_picked_up(monkeypatch):
    module, config = qwen3()
    assert epilogue_of(module, WIDTH).activation == "swiglu"
    module.act_fn = nn.GELU()
    assert epilogue_of(module, WIDTH).activation == "geglu"
    module.act_fn = nn.GELU("tanh")
    assert epilogue_of(module, WIDTH).activation is None
    assert_equal_to_eager(module, config)
    module.act_fn = nn.SiLU()
    monkeypatch.setattr(type(module), "_apply_gate", _swapped)
    assert epilogue_of(module, WIDTH).activation is None
    x, ids, weights = routed_input(9, HIDDEN, EXPERTS, TOP_K)
    found = [
        ALL_EXPERTS_FUNCTIONS[name](module, x, ids, weights)
        for name in ("moekernels", "grouped_mm")
    ]
    assert worst({"": found[0]}, {"": found[1]})[0] <= TOLERANCE


def test_learned_slope_is_never_fused_even_where_it_starts_as_silu():
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    module, config = qwen3()
    module.act_fn = Swish()
    assert epilogue_of(module, WIDTH).activation is None
    assert_equal_to_eager(module, config)
    assert "act_fn.beta" in both(module, config)[0]


def test_hooked_activation_is_unfused_so_that_the_hook_sees_it():
    module, config = qwen3()
    seen = []
    module.act_fn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    config._experts_implementation = "moekernels"
    module(*routed_input(9, HIDDEN, EXPERTS, TOP_K))
    assert seen


def test_answer_is_not_copied_or_pickled_with_the_module():
    module, config = gpt_oss()
    epilogue_of(module, WIDTH)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.__dict__["_moekernels_epilogue"] is None
        assert epilogue_of(twin, WIDTH) == epilogue_of(module, WIDTH)


def test_tried_under_any_mode():
    for mode in (
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        module, _ = gpt_oss()
        with mode:
            assert epilogue_of(module, WIDTH).activation == "swiglu_oai"
