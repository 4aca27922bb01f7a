"""Says in words how a result differs from what it should be: which rows, columns and tiles, and of
an operand that was read in another order, which order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ladder.kit import RungFailed, require

LINE = 128  # bytes: 64 elements of 16 bits


def swizzled(lines: np.ndarray, span: int = 128) -> np.ndarray:
    """[n, 64] 16-bit lines -> the bytes that a box of them has in shared memory."""
    flat = np.ascontiguousarray(lines).view(np.uint8).reshape(-1, 16)
    at = np.arange(len(flat)) * 16
    if span:
        at ^= ((at >> 7) & (span // 16 - 1)) << 4
    out = np.empty_like(flat)
    out[at // 16] = flat
    return out.reshape(-1)


def named_runs(values: np.ndarray) -> str:
    """Numbers as ranges: 0-63, 128."""
    values = np.unique(values)
    parts = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    text = [f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts[:6]]
    return ", ".join(text) + (", ..." if len(parts) > 6 else "")


def where(wrong: np.ndarray) -> str:
    """Which rows and columns of a [rows, columns] mask are wrong, and what they have in common."""
    wrong = wrong.reshape(-1, wrong.shape[-1]) if wrong.ndim != 1 else wrong[:, None]
    rows, columns = np.nonzero(wrong)
    if not len(rows):
        return "nowhere"
    text = [f"{len(rows)} of {wrong.size} elements, rows {named_runs(rows)}"]
    text.append(f"columns {named_runs(columns)}")
    for what, at in (("row", rows), ("column", columns)):
        for modulus in (8, 16, 64, 128):
            seen = np.unique(at % modulus)
            if len(np.unique(at)) > len(seen) and len(seen) <= modulus // 2:
                text.append(f"{what} % {modulus} in {{{named_runs(seen)}}}")
                break
    return "; ".join(text)


def close(name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 4) -> float:
    """Holds every element to |ours - exact| <= factor eps (|exact| + its rms); the worst share.

    A wrong layout is off by the rms itself, a hundred times the bound. dtype: the rounding's.
    """
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    require(ours.shape == exact.shape, f"{name} is {tuple(ours.shape)}, not {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    rms = exact.square().mean().sqrt()
    allowed = factor * torch.finfo(dtype).eps * (exact.abs() + rms) + 1e-30
    share = (ours - exact).abs() / allowed
    wrong = ~(share <= 1)  # what is not a number is wrong as well
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise RungFailed(
            f"{name} is wrong at {where(wrong.numpy())}; "
            f"at {first} {ours[first]:.6g} stands for {exact[first]:.6g}"
        )
    return share.max().item()


def same(name: str, first: Tensor, second: Tensor) -> None:
    """Holds two results to the same bits."""
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    if not torch.equal(a, b):
        item = first.element_size()
        wrong = (a != b).view(-1, item).any(1).view(first.shape).numpy()
        raise RungFailed(f"{name} has other bits: {where(wrong)}")


def explain_box(found: np.ndarray, lines: np.ndarray) -> str:
    """Which other layout than the 128-byte swizzle the bytes of a box are in."""
    for span, text in ((0, "no swizzle"), (64, "a 64-byte swizzle"), (32, "a 32-byte swizzle")):
        if (found == swizzled(lines, span)).all():
            return f"the box lies in {text}"
    if lines.shape == (64, 64) and (found == swizzled(lines.T)).all():
        return "the box is transposed: rows and columns of its coordinates are exchanged"
    wrong = (found != swizzled(lines)).reshape(-1, LINE)
    return f"bytes in no layout known: {where(wrong)}"


def explain_order(what: str, along: str, first: np.ndarray, second: np.ndarray) -> str:
    """How an operand was read: first, second [extent, 64] are the place (M or N, K) whose element
    came where (M or N, K) was asked for."""
    extent, depth = first.shape
    right = (first == np.arange(extent)[:, None]) & (second == np.arange(depth)[None, :])
    if right.all():
        return ""
    text = [f"{what} is read in another order, {where(~right)}"]
    for e in range(0, extent, 8):
        for k in range(0, depth, 8):
            if not right[e, k] and len(text) < 6:
                text.append(
                    f"({along} {e}, k {k}) holds what lies at ({along} {first[e, k]:g}, "
                    f"k {second[e, k]:g})"
                )
    return "; ".join(text)
