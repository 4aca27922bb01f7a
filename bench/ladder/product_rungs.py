"""Rungs 7 to 11: the products of the built library, one store path after another, each against
fp64 on data that any exchange of rows, columns or experts would change."""

from __future__ import annotations

import torch
from torch import Tensor

from ladder.diagnose import close, same
from ladder.kit import Kit, expect_products, require, rung
from moekernels import ops, reference
from moekernels.ops._library import raw

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CHAIN = 8  # roundings that add up where one product feeds the next


def normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return torch.randn(*shape, generator=draw).to(dtype)


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def grouped(dtype, width: int, out: int, *counts: int, transposed=False, unused=0) -> dict:
    """Inputs of grouped_gemm; `unused` rows lie past the last expert."""
    shape = (len(counts), width, out) if transposed else (len(counts), out, width)
    return {
        "rows": normal(dtype, sum(counts) + unused, width),
        "w": normal(dtype, *shape, seed=1),
        "offsets": offsets_of(*counts),
        "transposed": transposed,
    }


def exact(inputs: dict) -> dict:
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    return {n: v for n, v in wide.items() if n != "recompute"}


def _rows(kit: Kit, inputs: dict, what: str) -> Tensor:
    placed = kit.place(inputs)
    with kit.ops() as launched:
        y = ops.grouped_gemm(**placed)
    expect_products(kit, launched, {"StoreRows"})
    close(what, y, reference.grouped_gemm(**exact(inputs)), inputs["rows"].dtype)
    return y


# ---- 7: StoreRows
ROWS_NEED = ("ring", "wgmma_k_major", "wgmma_n128", "tma_3d", "setmaxnreg", "attributes")


@rung(7, *ROWS_NEED, look="stage_rows and StoreRows in sm90/rows.cuh, fragments of multiply()")
def rows_one_tile(kit: Kit) -> dict:
    """One whole tile of 128 x 128, then of 128 x 256: five steps and one."""
    for out, width in ((128, 320), (256, 64)):
        _rows(kit, grouped(BF16, width, out, 128), f"one tile of {out} columns, K {width}")
    return {"tiles": 2}


@rung(7, "rows_one_tile", "tma_edges", look="row_end in StoreRows, row_begin in count_tiles")
def rows_ragged(kit: Kit) -> dict:
    """Experts of any size, widths past whole tiles, rows past the last expert, bf16 and fp16."""
    for dtype in (BF16, F16):
        inputs = grouped(dtype, 88, 136, 70, 0, 1, 65, unused=9)
        y = _rows(kit, inputs, f"ragged rows, {dtype}")
        require(not y[136:].cpu().any(), "rows past the last expert are not zero")
    return {"dtypes": 2}


@rung(7, "rows_ragged", "wgmma_mn_major", look="kAlongN in load_stage and the B descriptor")
def rows_transposed(kit: Kit) -> dict:
    """Weights that lie along N: dgrad's layout."""
    _rows(kit, grouped(BF16, 72, 264, 130, 9, transposed=True), "w along N")
    return {"columns": 264}


@rung(7, "rows_ragged", look="find_tile, the ring's phase from tile to tile, staging reused")
def rows_many_tiles(kit: Kit) -> dict:
    """More tiles than blocks: every block walks on with its ring."""
    blocks = 132 if kit.hardware else 4
    counts = (130, 0, 257) if not kit.hardware else (1300, 0, 2570, 128 * blocks)
    _rows(kit, grouped(BF16, 200, 392, *counts), "many tiles a block")
    return {"rows": sum(counts)}


@rung(7, "rows_many_tiles", look="sm90/fp8.cuh: scales of rows and columns, promotion, byte_map")
def rows_fp8(kit: Kit) -> dict:
    """e4m3 with scales that differ from block to block. Tensor cores keep few bits of a block's
    sum, so 2^-13 of the largest terms is let pass; a wrong scale is off by a factor."""
    counts, width, out = (130, 0, 1, 65), 400, 264
    spread = [normal(F32, n, 1, seed=i) for i, n in enumerate((sum(counts), out))]
    x = normal(F32, sum(counts), width) * 4 ** spread[0].round()
    w = normal(F32, len(counts), out, width, seed=1) * 4 ** spread[1].round()
    (values, row_scales), (wide, w_scales) = ops.quantize(x), ops.quantize(w, tiles=True)
    inputs = {"rows": values, "row_scales": row_scales, "w": wide, "w_scales": w_scales}
    inputs["offsets"] = offsets_of(*counts)
    with kit.ops() as launched:
        y = ops.grouped_gemm(**kit.place(inputs)).cpu().double()
    expect_products(kit, launched, {"StoreRows"})
    a = reference.dequantize(values, row_scales)
    b = reference.dequantize(wide, w_scales, tiles=True)
    exact_, most = (
        reference.grouped_gemm(p, q, inputs["offsets"]) for p, q in ((a, b), (a.abs(), b.abs()))
    )
    wrong = (y - exact_).abs() - (2.0**-8 * exact_.abs() + 2.0**-11 * most)
    where_ = int(wrong.argmax())
    require(
        not (wrong > 0).any(),
        f"row {where_ // out}, column {where_ % out} is {y.flatten()[where_]}, not "
        f"{exact_.flatten()[where_]}",
    )
    return {"rows": sum(counts)}


# ---- 8: StoreGradient
@rung(
    8,
    "rows_ragged",
    "wgmma_mn_major",
    look="clear_stage_rows and StoreGradient, both operands along M",
)
def wgrad(kit: Kit) -> dict:
    """Sets in 16 bits and adds to fp32; an empty expert; one row; rows that fill no step."""
    inputs, begin = _gradient((0, 40, 129, 1), 136, 264)
    placed = kit.place(inputs)
    with kit.ops() as launched:
        dw = ops.grouped_gemm_wgrad(**placed)
    total = _added(kit, inputs, begin, False)
    expect_products(kit, launched, {"StoreGradient"})
    wanted = reference.grouped_gemm_wgrad(**exact(inputs))
    close("dw", dw, wanted, BF16)
    close("fp32 +=", total - begin, wanted, F32, factor=64)
    same("an empty expert's total", total[0], begin[0])
    return {"experts": 4}


def _gradient(counts: tuple[int, ...], m: int, n: int, seed: int = 0) -> tuple[dict, Tensor]:
    """Inputs of a gradient, and what it is added to."""
    rows = sum(counts)
    inputs = {
        "rows": normal(BF16, rows, n, seed=10 * seed),
        "drows": normal(BF16, rows, m, seed=10 * seed + 2),
    }
    return {**inputs, "offsets": offsets_of(*counts)}, normal(F32, len(counts), m, n, seed=3)


def _added(kit: Kit, inputs: dict, begin: Tensor, bulk_sums: bool) -> Tensor:
    """The total after one of the two ways to add, on the CPU."""
    placed, total = kit.place(inputs), kit.place({"total": begin.clone()})["total"]
    with kit.ops() as launched:
        kit.settings(bulk_sums=bulk_sums)
        try:
            ops.grouped_gemm_wgrad(**placed, out=total)
        finally:
            kit.settings()
    expect_products(kit, launched, {"AddGradient" if bulk_sums else "StoreGradient"})
    return total.cpu()


@rung(
    8, "wgrad", look="sm90/add.cuh: boxes and their swizzle, waits for bulk groups, the map's edges"
)
def wgrad_sums(kit: Kit) -> dict:
    """L2 adds, by bulk reductions: the bits of a thread that loads, adds and stores; twice the
    same."""
    shapes = (((0, 40, 129, 1), 136, 264), ((70,), 24, 40))
    for counts, m, n in shapes:
        inputs, begin = _gradient(counts, m, n)
        by_threads = _added(kit, inputs, begin, False)
        for _ in range(2):
            same(f"sums of {m} x {n}", _added(kit, inputs, begin, True), by_threads)
    return {"shapes": len(shapes)}


@rung(8, "wgrad", look="rows_that_count, clear_stage_rows, fence_async_proxy and its barrier")
def wgrad_tail(kit: Kit) -> dict:
    """Rows without a token count as zero whatever they hold, and so does the next expert's row."""
    token_of = (torch.arange(150, dtype=torch.int32) * 7) % 5 - 1  # -1 to 3, of 3 tokens
    used = (token_of >= 0) & (token_of < 3)
    rows, drows, offsets = normal(BF16, 150, 72), normal(BF16, 150, 24, seed=1), offsets_of(70, 80)
    clean = [torch.where(used[:, None], t, 0) for t in (rows, drows)]
    rows[~used], drows[~used] = float("inf"), float("nan")
    placed = kit.place({"rows": rows, "drows": drows, "offsets": offsets, "token_of": token_of})
    with kit.ops() as launched:
        dw = raw._grouped_gemm_wgrad(
            *list(placed.values())[:3], False, placed["token_of"], 3, False
        )
    expect_products(kit, launched, {"StoreGradient"})
    close("dw", dw, reference.grouped_gemm_wgrad(*[t.double() for t in clean], offsets), BF16)
    return {"unused": int((~used).sum())}


@rung(
    8, "wgrad_sums", look="sm90/gather.cuh: a line's swizzle, what is zero, arrivals beside bytes"
)
def wgrad_gathered(kit: Kit) -> dict:
    """x on either side seen through tokens, some of which do not exist: the bits of permuted
    rows."""
    counts, tokens = (0, 40, 129, 1), 50
    rows = sum(counts)
    token_of = (torch.arange(rows, dtype=torch.int32) * 37) % (tokens + 4) - 2
    x, drows = normal(BF16, tokens, 136), normal(BF16, rows, 264, seed=1)
    values = (x, drows, offsets_of(*counts), token_of)
    placed = list(kit.place(dict(zip("abcd", values))).values())
    for transposed in (False, True):
        found = []
        for gather in (False, True):
            with kit.ops() as launched:
                kit.settings(gather=gather)
                try:
                    rest = (transposed, placed[3], tokens, True)
                    found.append(raw._grouped_gemm_wgrad(*placed[:3], *rest))
                finally:
                    kit.settings()
            expect_products(kit, launched, {"StoreGradient"})
        same(f"dw{' transposed' * transposed}", found[1], found[0])
    return {"tokens": tokens}


@rung(8, "wgrad_sums", "wgrad_tail", look="sm90/segments.cuh: rows, maps and order of segments")
def wgrad_segments(kit: Kit) -> dict:
    """The rows of four microbatches by one launch, some experts and one microbatch without rows:
    the bits of four launches."""
    many = ((0, 40, 129, 1), (70, 0, 5, 0), (0, 0, 0, 0), (3, 64, 0, 65))
    inputs = [_gradient(counts, 136, 264, seed=i) for i, counts in enumerate(many)]
    begin, found = inputs[0][1], []
    sides = {n: [kit.place(of)[n] for of, _ in inputs] for n in ("rows", "drows", "offsets")}
    for join in (False, True):
        total = kit.place({"total": begin.clone()})["total"]
        with kit.ops() as launched:
            kit.settings(join=join)
            try:
                rest = (False, [], [0] * len(many), False)
                raw._grouped_gemm_wgrads_(total, *sides.values(), *rest)
            finally:
                kit.settings()
        expect_products(kit, launched, {"AddGradient"})
        found.append(total.cpu())
    same("sums of four microbatches", found[1], found[0])
    return {"microbatches": len(many)}


# ---- 9, 10: the experts
def _ffn(dtype, hidden: int, ffn: int, rows: int, kind: str, **options) -> dict:
    width = ffn * (2 if kind in reference.GATED else 1)
    tokens = torch.arange(rows, dtype=torch.int32).roll(3)
    row_of = torch.argsort(tokens).int()[:, None].contiguous()
    row_of[int(tokens[1])] = tokens[1] = -1  # a row that no token has
    return {
        "x": normal(dtype, rows, hidden),
        "weights": normal(F32, rows, seed=1).abs() + 0.1,
        "w1": normal(dtype, 2, width, hidden, seed=2) * hidden**-0.5,
        "w2": normal(dtype, 2, hidden, ffn, seed=3) * ffn**-0.5,
        "offsets": offsets_of(rows - rows // 3, rows // 3),
        "token_of": tokens,
        "row_of": row_of,
        "activation": kind,
        "limit": 0.8,
        "b1": normal(dtype, 2, width, seed=4),
        "b2": normal(dtype, 2, hidden, seed=5),
        **options,
    }


LEAVES = ("x", "weights", "w1", "w2", "b1", "b2")


def _experts(fn, inputs: dict, backward: bool) -> list[Tensor]:
    leaves = {n: inputs[n].detach().requires_grad_(backward) for n in LEAVES if n in inputs}
    y = fn(**{**inputs, **leaves})
    if not backward:
        return [y]
    dy = normal(F32, *y.shape, seed=6).to(y.dtype).to(y.device)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]


def _hold_experts(kit: Kit, inputs: dict, wanted: set[str], backward: bool, what: str) -> None:
    with kit.ops() as launched:
        kit.settings(gather=False)  # which has rungs of its own
        try:
            ours = _experts(ops.experts, kit.place(inputs), backward)
        finally:
            kit.settings()
    expect_products(kit, launched, wanted)
    others = _experts(reference.experts, exact(inputs), backward)
    dtype = inputs["x"].dtype
    for name, a, b in zip(("y", *(f"d{n}" for n in LEAVES)), ours, others):
        close(f"{what}: {name}", a, b, dtype, CHAIN)


@rung(
    9,
    "rows_many_tiles",
    look="StoreUp in sm90/up.cuh: gate beside up, the activation",
    limit=30,
)
def up(kit: Kit) -> dict:
    """Every activation, gate and up apart and interleaved."""
    kinds = [*reference.GATED, *reference.UNGATED]
    if not kit.hardware:  # tests emulate every one
        kinds = ["swiglu", "relu2"]
    size = (200, 264, 300) if kit.hardware else (24, 40, 12)
    for kind in kinds:
        inputs = _ffn(BF16, *size, kind)
        _hold_experts(kit, inputs, {"StoreUp", "StoreRows"}, False, kind)
    inputs = _ffn(F16, *size, "swiglu", interleaved=True)
    _hold_experts(kit, inputs, {"StoreUp", "StoreRows"}, False, "interleaved, fp16")
    return {"activations": len(kinds)}


@rung(9, "up", "wgrad_gathered", look="sm90/gather.cuh: lines of A, tiles that end within 128 rows")
def up_gathered(kit: Kit) -> dict:
    """The FFN over tokens, both ways w1 may lie: the bits of permuted rows."""
    size = (200, 264, 300) if kit.hardware else (136, 40, 150)
    for transposed in (False, True):
        inputs, found = _ffn(BF16, *size, "swiglu"), []
        if transposed:
            inputs |= {n: inputs[n].transpose(1, 2).contiguous() for n in ("w1", "w2")}
        for gather in (False, True):
            with kit.ops():
                kit.settings(gather=gather)
                try:
                    placed = kit.place({**inputs, "transposed": transposed})
                    found += _experts(ops.experts, placed, False)
                finally:
                    kit.settings()
        same(f"y{' transposed' * transposed}", found[1], found[0])
    return {"rows": size[2]}


@rung(10, "up", "wgrad_tail", look="StoreDAct: dots, h read and dh written in its place", limit=30)
def dact(kit: Kit) -> dict:
    """Gradients of x, weights (the dots), w1, w2 and biases; h kept and recomputed."""
    every = {"StoreUp", "StoreRows", "StoreDAct", "StoreGradient"}
    cases = [
        ("swiglu", {}),
        ("swiglu", {"recompute": True, "interleaved": True}),
        ("relu2", {}),
    ]
    cases, size = (cases, (136, 520, 300)) if kit.hardware else (cases[:1], (24, 40, 12))
    for kind, options in cases:
        inputs = _ffn(BF16, *size, kind, **options)
        _hold_experts(kit, inputs, every, True, f"{kind} {' '.join(options)}".strip())
    return {"cases": len(cases)}


# ---- 11: limits
@rung(11, "rows_ragged", look="sm90/run.cuh: what reaches tensor_map, shared memory, alignment")
def limits(kit: Kit) -> dict:
    """No experts, one, as many as leave four stages (366) and no more (367), more than threads;
    no rows; a bias that begins at an odd element."""
    taken = (0, 1, 366, 367, 420)
    for experts in taken:
        counts = [0] * experts
        for i in {0, experts // 2, experts - 1} if experts else ():
            counts[i] = 5 + i % 7
        inputs = grouped(BF16, 64, 136, *counts, unused=3)
        with kit.ops():
            y = ops.grouped_gemm(**kit.place(inputs))
        close(f"E {experts}", y, reference.grouped_gemm(**exact(inputs)), BF16)
    with kit.ops():
        empty = kit.place({"rows": normal(BF16, 0, 64), "drows": normal(BF16, 0, 72)})
        dw = ops.grouped_gemm_wgrad(*empty.values(), **kit.place({"offsets": offsets_of(0, 0)}))
    require(not dw.cpu().any(), "the gradient over no rows is not zero")
    inputs = _ffn(BF16, 24, 40, 12, "swiglu")
    odd = {n: torch.cat([inputs[n].new_zeros(1), inputs[n].flatten()])[1:] for n in ("b1", "b2")}
    inputs |= {n: t.view(inputs[n].shape) for n, t in odd.items()}
    with kit.ops():
        y = _experts(ops.experts, kit.place(inputs), False)
    close(
        "misaligned biases", y[0], _experts(reference.experts, exact(inputs), False)[0], BF16, CHAIN
    )
    return {"experts": taken}
