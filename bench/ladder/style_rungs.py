"""Rungs 7 to 10 of the styles that the products have beside the direct one: each gives the direct
style's bits, alone and in pairs of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ladder.diagnose import same
from ladder.kit import Kit, expect_styles, rung
from ladder.product_rungs import BF16, F16, F32, grouped, normal, offsets_of
from moekernels import ops
from moekernels.ops._library import raw

Call = Callable[[], list[Tensor]]


def _hold(kit: Kit, what: str, call: Call, style: str, pairs: tuple[str, ...]) -> None:
    """The style's bits in all pairings are those of the direct style."""
    kit.settings(style="direct", pair="none")
    try:
        with kit.ops():
            wanted = call()
    finally:
        kit.settings()
    for pair in pairs:
        with kit.ops() as launched:
            kit.settings(style=style, pair=pair)
            try:
                found = call()
            finally:
                kit.settings()
        expect_styles(kit, launched, style)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            same(f"{what}, {style}, pair {pair}: result {i}", a, b)


def _rows(kit: Kit, out: int, width: int, counts: tuple[int, ...], dtype, transposed: bool) -> Call:
    placed = kit.place(grouped(dtype, width, out, *counts, transposed=transposed, unused=9))
    return lambda: [ops.grouped_gemm(**placed)]


def _sizes(kit: Kit) -> tuple[int, int, tuple[int, ...]]:
    """out, width and rows of the experts: on a card more tiles than blocks."""
    if kit.hardware:
        return 1288, 520, (1300, 0, 2570, 1, 65, 128 * 132)
    return 520, 136, (130, 0, 65)


@rung(
    7,
    "rows_many_tiles",
    "rows_transposed",
    look="sm90/hidden.cuh: barriers packed and stored, registers of its roles",
)
def hidden_rows(kit: Kit) -> dict:
    """StoreRows behind a buffer, stored by warps of their own."""
    out, width, counts = _sizes(kit)
    for dtype, transposed in ((BF16, False), (F16, True)):
        call = _rows(kit, out, width, counts, dtype, transposed)
        _hold(kit, f"rows, {dtype}", call, "hidden", ("none",))
    return {"rows": sum(counts)}


def _ffn(kit: Kit, kind: str, dtype=BF16) -> tuple[tuple, dict[str, Tensor]]:
    """Arguments of the experts' raw ops, and what their backward takes besides."""
    hidden, ffn, rows = (200, 264, 3000) if kit.hardware else (24, 136, 12)
    width = 2 * ffn if kind == "swiglu" else ffn
    given = {
        "x": normal(dtype, rows, hidden),
        "weights": normal(F32, rows).abs() + 0.5,
        "w1": normal(dtype, 2, width, hidden, seed=1) * hidden**-0.5,
        "w2": normal(dtype, 2, hidden, ffn, seed=2) * ffn**-0.5,
        "offsets": torch.tensor([0, rows // 3, rows]),
        "b1": normal(dtype, 2, width, seed=4),
    }
    placed = kit.place(given)
    style = (kind, 1.702, 7.0, False, False, False)
    names = ("x", "weights", "w1", "w2", "offsets")
    more = {"dy": normal(dtype, rows, hidden, seed=5), "h": normal(dtype, rows, width, seed=6)}
    return (*(placed[n] for n in names), None, placed["b1"], None, *style), kit.place(more)


@rung(9, "hidden_rows", "up", look="Hidden<StoreUp> in sm90/hidden.cuh")
def hidden_up(kit: Kit) -> dict:
    """The up-projection and its activation behind a buffer."""
    kinds = ("swiglu", "relu2") if kit.hardware else ("swiglu",)
    for kind in kinds:
        ffn, _ = _ffn(kit, kind)
        call = functools.partial(raw._experts, *ffn, True)
        _hold(kit, f"up, {kind}", lambda call=call: list(call()), "hidden", ("none",))
    return {"activations": len(kinds)}


@rung(10, "dact", look="sm90/pingpong.cuh: turns, the ring that both consumers follow")
def pingpong_dact(kit: Kit) -> dict:
    """The activation's gradient by two consumers in turn."""
    ffn, more = _ffn(kit, "swiglu")

    def call() -> list[Tensor]:
        return list(raw._experts_dact(*ffn, more["dy"], more["h"].clone(), True, True))

    _hold(kit, "dact", call, "pingpong", ("none",))
    return {"rows": ffn[0].shape[0]}


def _sums(kit: Kit) -> Call:
    m, n, counts = (1160, 1304, (700, 0, 65, 2000)) if kit.hardware else (136, 264, (70, 0, 130))
    given = kit.place(
        {
            "rows": normal(BF16, sum(counts), n),
            "drows": normal(BF16, sum(counts), m, seed=1),
            "offsets": offsets_of(*counts),
            "before": normal(F32, len(counts), m, n, seed=2),
        }
    )

    def call() -> list[Tensor]:
        total = given["before"].clone()
        ops.grouped_gemm_wgrad(given["rows"], given["drows"], given["offsets"], out=total)
        return [total]

    return call


@rung(8, "wgrad_sums", look="sm90/sums_in_turn.cuh: turns, boxes, rows that do not count")
def pingpong_sums(kit: Kit) -> dict:
    """Weights' gradients that L2 adds, by two consumers in turn."""
    _hold(kit, "sums", _sums(kit), "pingpong", ("none",))
    return {"sums": 1}


@rung(
    10,
    "hidden_up",
    "pingpong_dact",
    "pingpong_sums",
    look="sm90/pair.cuh: the mask and the halves of load_stage, arrivals of both blocks",
    limit=30,
)
def pairs(kit: Kit) -> dict:
    """Clusters of two along N and M, in both styles."""
    out, width, counts = _sizes(kit)
    for transposed in (False, True) if kit.hardware else (False,):
        call = _rows(kit, out, width, counts, BF16, transposed)
        _hold(kit, f"rows, transposed {transposed}", call, "hidden", ("n", "m"))
    ffn, more = _ffn(kit, "swiglu")

    def dact() -> list[Tensor]:
        return list(raw._experts_dact(*ffn, more["dy"], more["h"].clone(), True, True))

    _hold(kit, "dact", dact, "pingpong", ("n", "m"))
    _hold(kit, "sums", _sums(kit), "pingpong", ("n", "m"))
    return {"pairs": 2}
