"""`moekernels info`: what it says of CUDA is what the build and the machine have."""

import pytest
import torch

from moekernels.cli import info
from moekernels.ops._library import raw


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("sm_80, sm_90a, sm_100", (9, 0), True),
        ("sm_80, sm_90a, sm_100", (8, 0), True),
        ("sm_80, sm_90a, sm_100", (8, 9), True),
        ("sm_80, sm_90a, sm_100", (7, 5), False),
        ("sm_80, sm_90a, sm_100", (12, 0), False),
        ("sm_90a", (8, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_103", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_cards_an_arch_runs_on(archs, capability, runs):
    assert info.runs_on(archs, *capability) == runs


def test_ops_with_cuda_kernels_are_those_built():
    named = info.cuda_ops().split(";")[0]
    built = torch._C._dispatch_has_kernel_for_dispatch_key("moekernels::_gate", "CUDA")
    assert ("gate_backward" in named) == built == bool(raw._cuda_archs())
    # There torch's own are taken: varlen_attn, cuBLAS, and a loss in its operations.
    cpu = "attention, attention_backward, cross_entropy_losses_, cross_entropy_sums_, dense"
    lacking = f"; cpu only: {cpu}" if built else ""
    assert info.cuda_ops().endswith(lacking), "an op lacks its CUDA kernels"


class _Card:
    name, major, minor, total_memory = "Old Card", 7, 5, 16 << 30


def test_a_card_without_kernels_is_told_how_to_get_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: _Card)
    (name, facts), *_ = info._gpus()
    assert name == "gpu 0"
    assert "sm_75" in facts and "MOEKERNELS_CUDA_ARCHS=75-real" in facts


def test_no_card_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info._gpus() == [("gpu", "none: this torch is a CPU build")]
