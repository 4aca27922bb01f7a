"""What the contract test knows of quantize: cases and messages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moekernels import reference
from moekernels.ops.quantize import quantize
from python_tests.support.spec import Case, OpSpec, randn, register

# Blocks that are whole, cut short, and both; widths that vectors of four divide, and do not.
ROWS = {
    "ordinary": (9, 256),
    "odd": (5, 131),
    "narrow": (7, 3),
    "no_rows": (0, 128),
    "no_columns": (3, 0),
    "short_block": (4, 132),
}
TILES = {
    "tile": (1, 128, 128),
    "two_experts": (2, 132, 260),
    "odd": (2, 130, 129),
    "small": (3, 5, 7),
    "no_experts": (0, 4, 4),
}


def _spread(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers over six decades, whose blocks so hold subnormal ones; zeros and signed zeros."""
    x = randn(torch.float64, *shape) * 10.0 ** (3 * randn(torch.float64, *shape, seed=1)).clamp(
        -3, 3
    )
    x[..., ::7] = 0
    x[..., ::14] = -0.0
    return x.to(dtype)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, shape in ROWS.items():
        yield Case(name, {"x": _spread(dtype, *shape)}, compile=name == "ordinary")
    for name, tiled in TILES.items():
        for transposed in (False, True):
            inputs = {"x": _spread(dtype, *tiled), "tiles": True, "transposed": transposed}
            suffix = "_transposed" if transposed else ""
            yield Case(f"tiles_{name}{suffix}", inputs, compile=name == "odd" and transposed)
    yield Case("zeros", {"x": torch.zeros(3, 200, dtype=dtype)})
    yield Case("tiny", {"x": _spread(dtype, 3, 200) * torch.finfo(dtype).tiny})
    large = torch.finfo(dtype).max
    yield Case("large", {"x": _spread(dtype, 3, 200).clamp(-1, 1) * large})


def _messages():
    x = torch.zeros(3, 4)
    yield (
        lambda: quantize(x.double()),
        "quantize: x must be float32|bfloat16|float16 [R, I], got float64 [3, 4]",
    )
    yield (
        lambda: quantize(x, tiles=True),
        "quantize: x must be float32|bfloat16|float16 [E, O, I], got float32 [3, 4]",
    )
    yield (
        lambda: quantize(x, transposed=True),
        "quantize: transposed needs tiles, whose scales are of both axes",
    )
    yield (
        lambda: quantize(x.requires_grad_()),
        "quantize: not differentiable (it rounds); give detached tensors",
    )


register(
    OpSpec(
        name="quantize",
        fn=quantize,
        reference=reference.quantize,
        cases=_cases,
        sized=lambda tokens: {"x": randn(torch.float32, tokens, 140)},
        exact=True,
        messages=_messages,
        large=lambda dtype: {"x": _spread(dtype, 700, 300)},
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
)
