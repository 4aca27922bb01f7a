"""Products in FP8 on Hopper (wgmma of e4m3, sums promoted every 128 of K) under the PTX emulator,
to the bit of the CPU's; and bugs planted in the very kernel."""

from __future__ import annotations

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops, reference
from python_tests.support import emulated, planted
from python_tests.support.contract import evaluate, same_bits, spec_of
from python_tests.support.hopper import back, here, hopper, set_products, where  # noqa: F401
from python_tests.support.products import offsets_of
from python_tests.support.spec import randn

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODES = [(0, False), (1, True)]


def fp8(width: int, out: int, *counts: int, unused: int = 0, dtype=BF16) -> dict:
    """Inputs of grouped_gemm whose blocks have scales that differ from one another."""
    rows, experts = sum(counts) + unused, len(counts)

    def spread(*shape: int, seed: int) -> torch.Tensor:
        return randn(F32, *shape, seed=seed) * 4.0 ** randn(F32, *shape, seed=seed + 9).round()

    values, row_scales = ops.quantize(spread(rows, width, seed=0))
    w, w_scales = ops.quantize(spread(experts, out, width, seed=1), tiles=True)
    scales = {"row_scales": row_scales, "w_scales": w_scales, "dtype": dtype}
    return {"rows": values, "w": w, "offsets": offsets_of(*counts), **scales}


def check(inputs: dict, **how) -> None:
    wanted = reference.grouped_gemm(**inputs)
    with hopper(**how):
        ours = back(ops.grouped_gemm(**here(inputs)))
    assert same_bits(ours, wanted)


@pytest.mark.parametrize(
    "width, out, counts, unused, dtype",
    [
        (400, 264, (130, 0, 1, 65), 3, BF16),  # ragged, empty, one row; K, N past whole tiles
        (16, 8, (0, 0, 140), 0, F16),
        (896, 128, (128,), 0, BF16),  # whole tiles, more stages than the ring has
    ],
    ids=["ragged", "all_to_one", "whole"],
)
def test_products_have_the_bits_of_the_cpu(width, out, counts, unused, dtype):
    check(fp8(width, out, *counts, unused=unused, dtype=dtype))


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_order_and_lateness_change_no_bit(schedule, lazy):
    check(fp8(400, 136, 70, 0, 3), schedule=schedule, lazy=lazy)


def test_a_short_ring():
    set_products(stages=2)
    try:
        check(fp8(640, 16, 70, 3))
    finally:
        set_products()


def test_bias_weights_and_rows_without_a_token():
    inputs = fp8(144, 136, 70, 3)
    raw = torch.ops.moekernels._grouped_gemm_fp8.default
    bias, weights = randn(BF16, 2, 136, seed=3), randn(F32, 73, seed=4)
    token_of = (torch.arange(73, dtype=torch.int32) * 7) % 5 - 1
    order = ("rows", "row_scales", "w", "w_scales", "offsets")
    args = (*(inputs[name] for name in order), bias, weights, token_of)
    wanted = raw(*args, 3, "bfloat16")
    with hopper():
        ours = back(raw(*here(*args), 3, "bfloat16"))
    assert same_bits(ours, wanted)
    assert not ours[(token_of < 0) | (token_of > 2)].any() and ours.count_nonzero() > 3000


@pytest.mark.parametrize("options", [{"transposed": True, "recompute": True}], ids=str)
def test_experts(options):
    """The products to the bit; between them exp and sigmoid are of another library."""
    from python_tests.support.products import ffn

    inputs = ffn(BF16, 144, 144, 20, 2, 1, fp8=True, **options)
    spec = spec_of("experts")
    cpu = evaluate(ops.experts, spec, inputs)
    with hopper():
        ours = back(evaluate(ops.experts, spec, here(inputs)))
    exact = evaluate(reference.experts, spec, {**inputs, "fp8": False})
    names = ["y", *ours[1]]
    found = (
        [*ours[0], *ours[1].values()],
        [*cpu[0], *cpu[1].values()],
        [*exact[0], *exact[1].values()],
    )
    for name, one, other, wide in zip(names, *found, strict=True):
        apart = (one.double() - other.double()).norm()
        changed = (other.double() - wide.double()).norm()
        assert apart <= max(0.1 * changed, 0.004 * wide.double().norm()), name


@pytest.mark.parametrize(
    "capability, change, text",
    [
        (80, {}, "they are of sm_90 alone; give fp8=False on this device"),
        (100, {}, "they are of sm_90 alone; give fp8=False on this device"),
        (90, {"dtype": F32}, "their results are bfloat16 or float16; give one of the two"),
        (90, {"width": 24}, "TMA needs rows and addresses of whole 16 bytes; give such widths"),
        (90, {"out": 12}, "TMA needs rows and addresses of whole 16 bytes; give such widths"),
        (90, {"counts": ()}, "there is nothing to multiply"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(capability, change, text, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("of other devices, too")
    how = {"width": 32, "out": 16, "counts": (3,), "dtype": BF16} | change
    inputs = fp8(how["width"], how["out"], *how["counts"], unused=1, dtype=how["dtype"])
    with emulated.emulated_cuda(capability=capability), pytest.raises(RuntimeError) as caught:
        ops.grouped_gemm(**inputs)
    assert str(caught.value) == f"grouped_gemm: no product in FP8 on CUDA: {text}"


@pytest.mark.parametrize("bug", planted.BUGS_OF_FP8)
def test_a_planted_bug_is_found(bug, monkeypatch, tmp_path, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("the bugs are planted in PTX")
    emulated.fp8_as(monkeypatch, bug, tmp_path)
    with pytest.raises((AssertionError, RuntimeError, ptx.PtxError)):
        check(fp8(1040, 136, 70))  # more stages than the ring has
