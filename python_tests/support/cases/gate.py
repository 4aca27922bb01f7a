"""What the contract test knows of gate: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops.gate import _gate, gate
from python_tests.support.spec import Case, OpSpec, nbytes, randn, register, wide


def _logits(dtype: torch.dtype, tokens: int, experts: int, seed: int) -> Tensor:
    """[T, E] values that differ within a row in every dtype: no choice is left to rounding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)
    step = 6 / experts
    return ((order - experts / 2) * step + 0.25 * step * (order % 3)).to(dtype)


def _options() -> Iterator[tuple[str, dict]]:
    bias = randn(torch.float64, 24, seed=3, scale=0.2)
    for score in reference.SCORES:
        yield score, {"score": score}
        yield f"{score}-scaled", {"score": score, "renormalize": True, "scale": 2.5}
        if score != "softmax_topk":
            yield f"{score}-bias", {"score": score, "bias": bias, "renormalize": True}
    groups = {"num_groups": 6, "groups_kept": 2}
    yield "groups", {"score": "sigmoid", **groups}
    yield "groups-bias", {"score": "sigmoid", **groups, "bias": bias, "group_score": "sum2"}


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    x = _logits(dtype, 21, 24, seed=0)
    for name, options in _options():
        if options.get("bias") is not None:
            options = {**options, "bias": options["bias"].to(wide(dtype))}
        yield Case(name, {"logits": x, "top_k": 4, **options})
    everything = {
        "segments": torch.tensor([0, 9, 9, 75, 150]),
        "valid": torch.arange(150) % 7 != 3,
        "score": "sigmoid",
        "renormalize": True,
    }
    x = _logits(dtype, 150, 8, seed=1)
    yield Case("segments", {"logits": x, "top_k": 2, **everything}, False, compile=True)
    gap = {"segments": torch.tensor([2, 5, 8])}
    yield Case("gaps", {"logits": x[:10], "top_k": 2, **gap})
    yield Case("chunks", {"logits": x, "top_k": 2}, gradcheck=False, compile=True)
    yield Case("no_tokens", {"logits": x[:0], "top_k": 2})
    yield Case("one_token", {"logits": x[:1], "top_k": 1})
    yield Case("k_is_e", {"logits": x[:9], "top_k": 8})
    yield Case("one_expert", {"logits": x[:9, :1], "top_k": 1, "renormalize": True})
    nobody = {"valid": torch.zeros(9, dtype=torch.bool)}
    yield Case("none_valid", {"logits": x[:9], "top_k": 2, **nobody})
    yield Case("all_tie", {"logits": torch.zeros(5, 40, dtype=dtype), "top_k": 7}, False)
    yield Case("far", {"logits": _logits(dtype, 7, 24, seed=2) * 8, "top_k": 3}, False)


def _large(dtype: torch.dtype) -> dict:
    segments = torch.tensor([0, 300, 301, 1024])
    return {"logits": _logits(dtype, 1024, 40, seed=4), "top_k": 6, "segments": segments}


def _sized(tokens: int) -> dict:
    segments = torch.tensor([0, tokens // 2, tokens])
    return {"logits": _logits(torch.float32, tokens, 12, seed=0), "top_k": 3, "segments": segments}


def _messages():
    x = torch.zeros(4, 6)
    names = "float32|bfloat16|float16|float64"
    yield lambda: gate(x[0], 2), f"gate: logits must be {names} [T, E], got float32 [6]"
    yield lambda: gate(x.int(), 2), f"gate: logits must be {names} [T, E], got int32 [4, 6]"
    yield lambda: gate(x, 0), "gate: top_k must be in [1, E=6], got 0"
    yield lambda: gate(x, 7), "gate: top_k must be in [1, E=6], got 7"
    yield lambda: gate(x, 2, num_groups=4), "gate: num_groups must divide E=6, got 4"
    yield (
        lambda: gate(x, 2, num_groups=3, groups_kept=4),
        "gate: groups_kept must be in [1, 3], got 4",
    )
    yield (
        lambda: gate(x, 3, num_groups=3, groups_kept=1),
        "gate: the 1 groups kept hold 2 experts, fewer than top_k=3",
    )
    yield (
        lambda: gate(x, 2, bias=torch.zeros(5)),
        "gate: bias must be float32 [E=6], got float32 [5]",
    )
    yield (
        lambda: gate(x, 2, valid=torch.zeros(4)),
        "gate: valid must be bool [T=4], got float32 [4]",
    )
    yield (
        lambda: gate(x, 2, segments=torch.zeros(2, dtype=torch.int32)),
        "gate: segments must be int64 [S+1], got int32 [2]",
    )
    yield (
        lambda: gate(x, 2, score="tanh"),
        f"gate: score must be {'|'.join(reference.SCORES)}, got 'tanh'",
    )
    yield (
        lambda: gate(x, 2, group_score="mean"),
        "gate: group_score must be max|sum2, got 'mean'",
    )
    yield (
        lambda: _gate(x.T, 2, "softmax", None, 1, 1, "max", False, 1.0, None, None),
        "gate: logits must be contiguous, got strides [1, 6]",
    )


def _saved(inputs: dict) -> int:
    tokens = inputs["logits"].shape[0]
    return nbytes(inputs["logits"], inputs.get("segments")) + 4 * tokens * inputs["top_k"]


register(
    OpSpec(
        name="gate",
        fn=gate,
        reference=reference.gate,
        cases=_cases,
        sized=_sized,
        differentiable=("logits",),
        messages=_messages,
        large=_large,
        saved=_saved,
    )
)
