"""Arrays that begin at an odd element: every CUDA kernel that reads vectors has a way without them.

Widths here are whole vectors, so that only the address decides. Each argument is shifted by
itself (the others would hide it), then all of them and the cotangents. Under the emulator
a misaligned vector is an error; on a GPU of sm_90 it would cost the context.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops, reference
from python_tests.support.contract import assert_close, evaluate, hold, spec_of
from python_tests.support.hopper import back, here, hopper, products, where  # noqa: F401
from python_tests.support.products import ffn, offsets_of, product
from python_tests.support.spec import randn, random_ids

BF16, F32 = torch.bfloat16, torch.float32
TOKENS, EXPERTS, TOP_K, WIDTH = 6, 8, 2, 24


def inputs_of(op: str, dtype: torch.dtype) -> dict:
    ids = random_ids(TOKENS, EXPERTS, TOP_K)
    routing = reference.route(ids, EXPERTS)
    rows = randn(dtype, routing.token_of.shape[0], WIDTH)
    weights = randn(F32, *ids.shape, seed=1)
    places = {"row_of": routing.row_of, "token_of": routing.token_of}
    x = randn(dtype, TOKENS, WIDTH)
    counts = torch.tensor([[2, 0, 3], [1, 4, 0]])
    some = randn(dtype, 10, WIDTH)
    ten = randn(F32, 10, seed=1)
    slots = torch.arange(10, dtype=torch.int32)
    return {
        "gate": lambda: {"logits": randn(dtype, 5, 16), "top_k": 2, "bias": randn(F32, 16)},
        "route": lambda: {"ids": ids, "num_experts": EXPERTS, "alignment": 4},
        "permute": lambda: {"x": x, **places},
        "combine": lambda: {"rows": rows, **places, "weights": weights},
        "pack": lambda: {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": TOP_K},
        "regroup": lambda: {
            "message": reference.pack(some, ten[:, None], slots, 1),
            "counts": counts,
            "width": WIDTH,
        },
        "ungroup": lambda: {"rows": some, "counts": counts, "weights": ten},
        "grouped_gemm": lambda: product(dtype, 40, 24, 5, 0, 4),
        "experts": lambda: ffn(dtype, 24, 40, 9, 2, 2),
    }[op]()


def shifted(t: Tensor) -> Tensor:
    """The same values, beginning one element past 16 bytes."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def arguments(op: str) -> list[str]:
    return [name for name, v in inputs_of(op, BF16).items() if isinstance(v, Tensor)]


OPS = [
    "gate",
    "route",
    "permute",
    "combine",
    "pack",
    "regroup",
    "ungroup",
    "grouped_gemm",
    "experts",
]
ONE = [(op, name) for op in OPS for name in arguments(op)]


def run(op: str, dtype: torch.dtype, names: list[str]) -> list[str]:
    """Holds a call with these arguments shifted to the reference; the Hopper products launched."""
    spec, inputs = spec_of(op), inputs_of(op, dtype)
    for name in names:
        inputs[name] = shifted(inputs[name])
        assert inputs[name].data_ptr() % 16 == inputs[name].element_size()
    with hopper() as device:
        ours = back(evaluate(spec.fn, spec, here(inputs)))
        launched = products(device)
    hold(spec, inputs, ours)
    return launched


@pytest.mark.parametrize("op, name", ONE)
def test_one_argument_at_an_odd_element(op, name):
    run(op, BF16, [name])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_all_arguments_at_odd_elements(op, dtype):
    launched = run(op, dtype, arguments(op))
    if op in ("grouped_gemm", "experts"):
        # What is left of wgmma has operands that the ops made themselves.
        assert "StoreUp" not in launched


def test_a_misaligned_bias_alone_goes_to_mma():
    assert run("experts", BF16, [])[:2] == ["StoreUp", "StoreRows"]
    assert run("experts", BF16, ["b1"])[0] == "StoreRows"
    assert run("experts", BF16, ["b2"])[:2] == ["StoreUp", "StoreDAct"]


def test_cotangents_at_odd_elements():
    """What autograd hands back need not be aligned either."""
    for op in ("permute", "combine", "grouped_gemm", "experts"):
        inputs = here(inputs_of(op, BF16))
        name = {"permute": "x", "experts": "x"}.get(op, "rows")
        leaf = inputs[name].requires_grad_()
        call = spec_of(op).fn
        with hopper():
            y = call(**inputs)
            dy = here(randn(BF16, *y.shape, seed=2))
            (aligned,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
            (odd,) = torch.autograd.grad(y, leaf, shifted(dy))
        torch.testing.assert_close(odd, aligned, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("into", ["w", "rows"])
def test_main_grad_at_an_odd_element(into):
    rows, drows, offsets = randn(BF16, 9, 16), randn(BF16, 9, 24, seed=1), offsets_of(5, 0, 4)
    begin = randn(F32, 3, 24, 16, seed=2)
    total = shifted(begin) if into == "w" else begin.clone()
    if into == "rows":
        rows = shifted(rows)
    with hopper() as device:
        out = here(total)
        ops.grouped_gemm_wgrad(*here(rows, drows, offsets), out=out)
        assert products(device) == []
    exact = reference.grouped_gemm_wgrad(rows.double(), drows.double(), offsets) + begin
    plain = reference.grouped_gemm_wgrad(rows.float(), drows.float(), offsets) + begin
    assert_close("main_grad", back(out), plain, exact)
