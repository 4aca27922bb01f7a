"""`experts` in FP8, against its products in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops, reference
from python_tests.support.contract import assert_same, evaluate, hold, spec_of
from python_tests.support.spec import nbytes, randn, random_ids

BF16, F32 = torch.bfloat16, torch.float32


def inputs_of(
    dtype: torch.dtype,
    hidden: int,
    ffn: int,
    tokens: int,
    *,
    experts: int = 3,
    bias: bool = False,
    view: bool = True,
    alignment: int = 1,
    **options,
) -> dict:
    ids = random_ids(tokens, experts, 2)
    routing = reference.route(ids, experts, alignment=alignment)
    gates = 2 if options.get("activation", "swiglu") in reference.GATED else 1
    w1 = randn(dtype, experts, gates * ffn, hidden, seed=1, scale=hidden**-0.5)
    w2 = randn(dtype, experts, hidden, ffn, seed=2, scale=ffn**-0.5)
    if options.get("transposed"):
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    rows = routing.token_of.shape[0]
    inputs = {
        "x": randn(dtype, tokens if view else rows, hidden),
        "weights": randn(F32, rows, seed=3),
        "w1": w1,
        "w2": w2,
        "offsets": routing.offsets,
        "fp8": True,
        **options,
    }
    if view:
        inputs |= {"token_of": routing.token_of, "row_of": routing.row_of}
    if bias:
        inputs["b1"] = randn(dtype, experts, gates * ffn, seed=4)
        inputs["b2"] = randn(dtype, experts, hidden, seed=5)
    return inputs


CASES = {
    "blocks": (256, 128, 40, {}),
    "cut_blocks": (72, 200, 21, {"bias": True, "alignment": 4}),
    "rows": (140, 40, 17, {"view": False}),
    "interleaved": (64, 136, 13, {"interleaved": True, "bias": True}),
    "transposed": (130, 129, 11, {"transposed": True}),
    "relu2": (64, 64, 9, {"activation": "relu2"}),
    "no_tokens": (64, 64, 0, {}),
}


def close(ours: Tensor, wanted: Tensor | None, exact: Tensor, part: float) -> None:
    """Within a part of what FP8 itself changes, as root mean squares."""
    if wanted is None or not wanted.any():
        assert not ours.any()
        return
    apart = (ours.double() - wanted.double()).square().mean().sqrt()
    changed = (wanted.double() - exact.double()).square().mean().sqrt()
    assert changed > 0
    assert apart <= part * changed, (float(apart), float(changed))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    """As the reference's, up to what lies on an edge of rounding: much in 16 bits, which round once
    more, next to nothing in 32. The weights' gradient is <da, a>, of dy as FP8 has it and a as it
    is, where autograd takes dy as it is. What was left in 16 bits, or a scale of another block, is
    as far away as FP8 is."""
    hidden, ffn, tokens, options = CASES[name]
    inputs, spec = inputs_of(dtype, hidden, ffn, tokens, **options), spec_of("experts")
    ours, wanted = (evaluate(f, spec, inputs) for f in (ops.experts, reference.experts))
    exact = evaluate(reference.experts, spec, {**inputs, "fp8": False})
    part = 0.6 if dtype == BF16 else 0.01
    close(ours[0][0], wanted[0][0], exact[0][0], part)
    for key, gradient in ours[1].items():
        if key == "b2":  # of dy alone
            assert (gradient - wanted[1][key]).norm() < 0.01 * gradient.norm()
            continue
        close(gradient, wanted[1][key], exact[1][key], 1.0 if key == "weights" else part)
    again = evaluate(ops.experts, spec, {**inputs, "recompute": True})
    assert_same(ours, again)


@pytest.mark.parametrize("bug", ["scales_not_turned", "a_bit_less"])
def test_a_planted_bug_is_found(bug, monkeypatch):
    """Scales of turned weights that lie as before; values that lose a bit more."""
    from moekernels.ops import _experts_fp8 as home

    quantize = home._quantize

    def wrong(x: Tensor, tiles: bool, transposed: bool) -> tuple[Tensor, Tensor]:
        values, scales = quantize(x, tiles, transposed)
        if bug == "a_bit_less" and not tiles:
            return values.view(torch.uint8).bitwise_and(0xFE).view(values.dtype), scales
        turned = bug == "scales_not_turned" and transposed and scales.shape[1] == scales.shape[2]
        return values, scales.transpose(1, 2).contiguous() if turned else scales

    inputs, spec = inputs_of(F32, 256, 256, 40), spec_of("experts")
    spread = torch.tensor([1.0, 64.0]).repeat_interleave(128)
    inputs["w2"] = inputs["w2"] * spread
    exact = evaluate(reference.experts, spec, {**inputs, "fp8": False})
    wanted = evaluate(reference.experts, spec, inputs)
    right = evaluate(ops.experts, spec, inputs)
    monkeypatch.setattr(home, "_quantize", wrong)
    ours = evaluate(ops.experts, spec, inputs)
    close(right[1]["x"], wanted[1]["x"], exact[1]["x"], 0.02)
    with pytest.raises(AssertionError):
        close(ours[1]["x"], wanted[1]["x"], exact[1]["x"], 0.02)


def test_fp8_loses_what_it_says():
    """A result is within the bound of two products of what is rounded to within 2^-4."""
    inputs, spec = inputs_of(F32, 256, 256, 64), spec_of("experts")
    ours, exact = (
        evaluate(ops.experts, spec, inputs),
        evaluate(reference.experts, spec, {**inputs, "fp8": False}),
    )
    for one, other in zip((*ours[0], *ours[1].values()), (*exact[0], *exact[1].values())):
        if one is not None:
            ratio = ((one - other).square().mean() / other.square().mean()).sqrt()
            assert 0 < ratio < 0.08, ratio


def test_weight_gradients_are_of_what_was_not_rounded():
    """dw2 is that of dy and a as they are: FP8 changes it by h's rounding alone."""
    inputs, spec = inputs_of(F32, 128, 128, 48), spec_of("experts")
    rows = reference.permute(inputs["x"], inputs["token_of"], inputs["row_of"])
    h = reference.experts_product(rows, inputs["w1"], inputs["offsets"], transposed=False)
    a = reference.activate(h, "swiglu") * inputs["weights"][:, None]
    (_,), gradients = evaluate(ops.experts, spec, inputs)
    dy = randn(F32, *rows.shape, seed=7)
    wanted = reference.grouped_gemm_wgrad(a, dy, inputs["offsets"])
    torch.testing.assert_close(gradients["w2"], wanted, rtol=1e-4, atol=1e-4)


def test_it_keeps_no_more_than_16_bits_do():
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = max(kept.get(t.data_ptr(), 0), nbytes(t))
        return t

    sizes = []
    for fp8 in (False, True):
        inputs = inputs_of(BF16, 64, 128, 20) | {"fp8": fp8}
        for name in ("x", "w1", "w2"):
            inputs[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.experts(**inputs)
        sizes.append(sum(kept.values()))
        kept.clear()
        del y
    assert sizes[0] == sizes[1]


def test_main_grads_take_the_same_gradient():
    inputs = inputs_of(BF16, 64, 128, 20)
    (_,), plain = evaluate(ops.experts, spec_of("experts"), inputs)
    w = {name: torch.nn.Parameter(inputs[name].clone()) for name in ("w1", "w2")}
    for each in w.values():
        each.main_grad = torch.zeros(each.shape)
    y = ops.experts(**{**inputs, **w})
    y.backward(randn(F32, *y.shape, seed=7).to(y.dtype))
    for name, each in w.items():
        assert each.grad is None
        assert torch.equal(each.main_grad.bfloat16(), plain[name])


def test_weights_are_quantized_once_where_they_do_not_change(monkeypatch):
    """Two passes quantize both weights both ways four times, not eight; what was written to, anew;
    the same bits."""
    from moekernels.ops import _experts_fp8 as home

    inputs = inputs_of(F32, 64, 128, 20)
    w1, w2 = inputs["w1"], inputs["w2"]
    w1.requires_grad_()
    calls, quantize = [], home._quantize
    spy = lambda x, tiles, transposed: calls.append(tiles) or quantize(x, tiles, transposed)  # noqa: E731
    monkeypatch.setattr(home, "_quantize", spy)

    def one() -> list[Tensor]:
        y = ops.experts(**inputs)
        return [y, *torch.autograd.grad(y.sum(), w1)]

    plain = one() + one()
    assert sum(calls) == 6  # no gradient of x is asked for
    calls.clear()
    with home.weights_quantized_once():
        once = one() + one()
        assert sum(calls) == 3
        with torch.no_grad():
            w2 *= 2
        changed = one()
        assert sum(calls) == 5
    assert_same((plain, {}), (once, {}))
    assert not torch.equal(changed[0], plain[0])
    assert_same((one(), {}), (changed, {}))


def test_compiles_whole():
    torch._dynamo.reset()
    spec, inputs = spec_of("experts"), inputs_of(F32, 64, 128, 20, bias=True)
    compiled = torch.compile(ops.experts, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(evaluate(compiled, spec, inputs), evaluate(ops.experts, spec, inputs))


def test_the_activation_alone_is_as_it_says():
    raw = torch.ops.moekernels._experts_act.default
    h = randn(F32, 5, 12)
    args = (h, "geglu", 1.0, 7.0, True)
    torch.library.opcheck(raw, args, test_utils=["test_schema", "test_faketensor"])
    torch.testing.assert_close(raw(*args), reference.activate(h, "geglu", interleaved=True))
    inputs = inputs_of(F32, 64, 64, 20)
    dense = {**inputs, "fp8": False}
    hold(spec_of("experts"), dense, evaluate(ops.experts, spec_of("experts"), dense))


def test_what_is_refused():
    inputs = inputs_of(F32, 64, 64, 8)
    with pytest.raises(RuntimeError, match="^experts: fp8 takes float32, bfloat16 or float16, got"):
        ops.experts(**{k: v.double() if k in ("x", "w1", "w2") else v for k, v in inputs.items()})
    inputs["x"].requires_grad_()
    y = ops.experts(**inputs)
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], retain_graph=True)
    with pytest.raises(RuntimeError, match="^experts: in FP8 there are no gradients of gradients"):
        torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="^experts: in FP8 it has no forward-mode derivative"):
        torch.func.grad(lambda x: ops.experts(**{**inputs, "x": x}).sum())(inputs["x"].detach())
    assert dx.isfinite().all()
