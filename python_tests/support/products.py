"""Inputs of the grouped products and of the experts, of chosen widths and alignment."""

from __future__ import annotations

import torch

from moekernels import reference
from python_tests.support.spec import randn, random_ids


def offsets_of(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def product(dtype, width: int, out: int, *counts: int, transposed=False, unused=0, shift=0) -> dict:
    """Inputs of grouped_gemm; `shift`: arrays begin that many elements off their alignment."""
    rows, experts = sum(counts) + unused, len(counts)
    shape = (experts, width, out) if transposed else (experts, out, width)
    size = experts * width * out
    return {
        "rows": randn(dtype, rows * width + shift)[shift:].view(rows, width),
        "w": randn(dtype, size + shift, seed=1)[shift:].view(shape),
        "offsets": offsets_of(*counts),
        "transposed": transposed,
    }


def ffn(dtype, hidden: int, width: int, tokens: int, experts: int, top_k: int, **options) -> dict:
    """Inputs of experts, rows seen through a routing with unused rows."""
    routing = reference.route(random_ids(tokens, experts, top_k), experts, alignment=4)
    rows = routing.token_of.shape[0]
    gates = 1 if options.get("activation") in reference.UNGATED else 2
    w1 = randn(dtype, experts, gates * width, hidden, seed=1, scale=hidden**-0.5)
    w2 = randn(dtype, experts, hidden, width, seed=2, scale=width**-0.5)
    if options.get("transposed"):
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    return {
        "x": randn(dtype, tokens, hidden),
        "weights": randn(torch.float32, rows, seed=3),
        "w1": w1,
        "w2": w2,
        "offsets": routing.offsets,
        "token_of": routing.token_of,
        "row_of": routing.row_of,
        "b1": randn(dtype, experts, gates * width, seed=4),
        "b2": randn(dtype, experts, hidden, seed=5),
        **options,
    }
