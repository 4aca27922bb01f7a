"""Every op on drawn arguments against the reference in fp64: sizes of 0 and 1 and odd ones,
duplicates and dropped ids, gaps and turned layouts, NaN and infinities.

`pytest python_tests/ops/test_fuzz.py --draws 2000` draws more; MOEKERNELS_ISA lowers the kernels. A
failure names its op and its draw: `draw("experts", 17)` gives the same call again.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moekernels import ops, reference
from python_tests.support.contract import assert_same, evaluate, lift, spec_of, tensors
from python_tests.support.spec import FLOATS, wide

DRAWS = 24  # of each op
SIZES = (0, 1, 1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 70, 129)
KINKED = ("reglu", "relu2", "swiglu_oai", "swiglu_clamped")  # a derivative that jumps


class Draw(random.Random):
    """Sizes, tensors and options out of one seed."""

    def size(self, least: int = 0) -> int:
        return max(least, self.choice(SIZES))

    def maybe(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.getrandbits(62))

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Of two dimensions at times the turned view of the other layout."""
        turned = len(shape) == 2 and self.maybe(0.2)
        x = torch.randn(*(shape[::-1] if turned else shape), generator=self.generator()).to(dtype)
        return x.T if turned else x

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator())

    def routing(self) -> tuple[Tensor, int, reference.Routing]:
        """ids [T, K] with duplicates and dropped ones, E, and their routing."""
        tokens, top_k, experts = self.size(), self.choice((0, 1, 2, 2, 3, 8)), self.size(1)
        ids = self.whole(-2, self.choice((1, experts, experts + 3)), tokens, top_k)
        ids = ids.int() if self.maybe() else ids
        alignment = self.choice((1, 1, 4, 16))
        capacity = self.choice((None, None, 0, 3))
        routing = reference.route(ids, experts, alignment=alignment, capacity=capacity)
        return ids, experts, routing

    def offsets(self, rows: int, experts: int) -> Tensor:
        """[E+1], rising, empty experts among them, the end before that of the rows at times."""
        end = self.randint(0, rows) if self.maybe(0.3) else rows
        inner = sorted(self.randint(0, end) for _ in range(max(experts - 1, 0)))
        return torch.tensor([0, *inner, *[end] * min(experts, 1)])


def route(d: Draw, dtype: torch.dtype) -> dict:
    ids, experts, _ = d.routing()
    inputs = {"ids": ids, "num_experts": experts, "alignment": d.choice((1, 3, 16))}
    if d.maybe():
        weights = d.whole(0, 4, *ids.shape).float()  # ties
        inputs |= {"capacity": d.choice((0, 1, 4)), "drop": "weight", "weights": weights}
    return inputs


def permute(d: Draw, dtype: torch.dtype) -> dict:
    ids, _, routing = d.routing()
    x = d.normal(dtype, len(ids), d.size())
    return {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}


def combine(d: Draw, dtype: torch.dtype) -> dict:
    ids, _, routing = d.routing()
    weights = d.normal(wide(dtype), *ids.shape) if d.maybe() else None
    rows = d.normal(dtype, len(routing.token_of), d.size())
    index = {"row_of": routing.row_of, "token_of": routing.token_of}
    return {"rows": rows, **index, "weights": weights}


def pack(d: Draw, dtype: torch.dtype) -> dict:
    ids, _, routing = d.routing()
    weights = d.normal(wide(dtype), *ids.shape) if d.maybe() else None
    x = d.normal(dtype, len(ids), d.size())
    return {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": ids.shape[1]}


def counts_of(d: Draw) -> Tensor:
    peers, experts = d.choice((0, 1, 2, 5)), d.choice((0, 1, 3, 7))
    return d.whole(0, 9, peers, experts) * d.whole(0, 2, peers, experts)


def regroup(d: Draw, dtype: torch.dtype) -> dict:
    counts, width = counts_of(d), d.size()
    rows, behind = int(counts.sum()), 0
    if d.maybe():
        behind = 1 if dtype in (torch.float32, torch.float64) else 2
    message = d.normal(dtype, rows, width + behind).contiguous()
    return {"message": message, "counts": counts, "width": width}


def ungroup(d: Draw, dtype: torch.dtype) -> dict:
    counts = counts_of(d)
    weights = d.normal(wide(dtype), int(counts.sum())) if d.maybe() else None
    rows = d.normal(dtype, int(counts.sum()), d.size())
    return {"rows": rows, "counts": counts, "weights": weights}


def product(d: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """rows [R, I], drows [R, O], w, and what both sides of a product share."""
    rows, inner, outer, experts = d.size(), d.size(), d.size(), d.choice((0, 1, 2, 3, 9))
    transposed = d.maybe()
    shape = (experts, inner, outer) if transposed else (experts, outer, inner)
    operands = {
        "rows": d.normal(dtype, rows, inner),
        "drows": d.normal(dtype, rows, outer),
        "w": d.normal(dtype, *shape),
    }
    return operands, {"offsets": d.offsets(rows, experts), "transposed": transposed}


def grouped_gemm(d: Draw, dtype: torch.dtype) -> dict:
    operands, shared = product(d, dtype)
    return {"rows": operands["rows"], "w": operands["w"], **shared}


def grouped_gemm_dgrad(d: Draw, dtype: torch.dtype) -> dict:
    operands, shared = product(d, dtype)
    return {"drows": operands["drows"], "w": operands["w"], **shared}


def grouped_gemm_wgrad(d: Draw, dtype: torch.dtype) -> dict:
    operands, shared = product(d, dtype)
    return {"rows": operands["rows"], "drows": operands["drows"], **shared}


def experts(d: Draw, dtype: torch.dtype) -> dict:
    ids, count, routing = d.routing()
    hidden, ffn, activation = d.size(), d.size(), d.choice((*reference.GATED, *reference.UNGATED))
    width = ffn * (2 if activation in reference.GATED else 1)
    transposed, seen = d.maybe(), d.maybe()
    shapes = (count, width, hidden), (count, hidden, ffn)
    if transposed:
        shapes = (count, hidden, width), (count, ffn, hidden)
    rows = len(routing.token_of)
    w1, w2 = (d.normal(dtype, *shape) * 0.3 for shape in shapes)
    inputs = {
        "x": d.normal(dtype, len(ids) if seen else rows, hidden),
        "weights": d.normal(wide(dtype), rows) if d.maybe(0.8) else None,
        "w1": w1,
        "w2": w2,
        "offsets": routing.offsets,
        "activation": activation,
        "transposed": transposed,
        "interleaved": activation in reference.GATED and d.maybe(),
        "recompute": d.maybe(),
        "limit": d.choice((0.5, 7.0)),
    }
    if seen:
        inputs |= {"token_of": routing.token_of, "row_of": routing.row_of}
    if d.maybe():
        inputs |= {"b1": d.normal(dtype, count, width), "b2": d.normal(dtype, count, hidden)}
    return inputs


def gate(d: Draw, dtype: torch.dtype) -> dict:
    """Logits on a grid: two are equal, the smaller id first, or far apart in any dtype."""
    groups, each, tokens = d.choice((1, 1, 2, 4)), d.size(1), d.size()
    kept = d.randint(1, groups)
    inputs = {
        "logits": (d.whole(-24, 25, tokens, groups * each) / 8).to(dtype),
        "top_k": d.randint(1, min(kept * each, 9)),
        "score": d.choice(list(reference.SCORES)),
        "num_groups": groups,
        "groups_kept": kept,
        "group_score": d.choice(("max", "sum2")),
        "renormalize": d.maybe(),
        "scale": d.choice((1.0, 2.5)),
    }
    if groups == 1 and d.maybe():
        inputs["bias"] = (d.whole(-6, 7, each) / 4).to(wide(dtype))
    if d.maybe(0.3):
        cuts = sorted(d.randint(0, tokens) for _ in range(3))
        inputs["segments"] = torch.tensor([0, *cuts])
    if d.maybe(0.3):
        inputs["valid"] = d.whole(0, 2, tokens).bool()
    return inputs


OPS = (route, permute, combine, pack, regroup, ungroup, grouped_gemm, grouped_gemm_dgrad)
OPS = (*OPS, grouped_gemm_wgrad, experts, gate)


def draw(op: str, seed: int) -> tuple[Draw, torch.dtype, dict]:
    d = Draw(f"{op} {seed}")
    dtype = d.choice(FLOATS)
    make = next(f for f in OPS if f.__name__ == op)
    return d, dtype, make(d, dtype)


def sizes(spec, inputs: dict) -> tuple[list[float], dict[str, float]]:
    """How large the sums behind outputs and gradients are at most: of absolute values."""

    def absolute(**given):
        outputs = tensors(reference_of(**given))
        signs = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for t in outputs]
        return [t * s.sign() if t.requires_grad else t for t, s in zip(outputs, signs)]

    reference_of = spec.reference
    lifted = {
        n: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in lift(inputs).items()
    }
    outputs, gradients = evaluate(absolute, spec, lifted)
    return [top(t) for t in outputs], {n: top(g) for n, g in gradients.items() if g is not None}


def top(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def close(label: str, ours: Tensor, plain: Tensor, exact: Tensor, size: float) -> None:
    """Far off is wrong: how near is the contract's to say. Six times plain torch's error, a few
    units of the result, and what sums of that size may lose."""
    assert ours.shape == plain.shape and ours.dtype == plain.dtype, label
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), label
        return
    unit = torch.finfo(ours.dtype).eps
    inner = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
    few = 4 * unit if ours.numel() < 32 else 0.0  # plain torch may have been lucky
    allowed = 6 * top(plain - exact) + 4 * unit * top(exact) + (64 * inner + few) * size
    error = top(ours - exact)
    assert error <= allowed + 1e-30, f"{label}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("op", [f.__name__ for f in OPS])
def test_finite(op, request):
    spec = spec_of(op)
    for seed in range(request.config.getoption("--draws") or DRAWS):
        d, dtype, inputs = draw(op, seed)
        told = f"draw({op!r}, {seed})"
        ours = evaluate(spec.fn, spec, inputs, gaps=d.maybe(0.3))
        plain = evaluate(spec.reference, spec, inputs)
        if spec.exact:
            try:
                assert_same(ours, plain)
            except AssertionError as error:
                raise AssertionError(told) from error
            continue
        exact = evaluate(spec.reference, spec, lift(inputs))
        bounds, slopes = sizes(spec, inputs)
        for i, (a, b, c) in enumerate(zip(ours[0], plain[0], exact[0], strict=True)):
            close(f"{told}: output {i}", a, b, c, bounds[i])
        jumps = inputs.get("activation") in KINKED and dtype in (torch.bfloat16, torch.float16)
        for name, a in {} if jumps else ours[1].items():
            b, c = plain[1].get(name), exact[1].get(name)
            if a is None or b is None:
                assert (a is None or not a.any()) and (b is None or not b.any()), (told, name)
                continue
            close(f"{told}: d{name}", a, b, c, slopes.get(name, 0.0))


@pytest.mark.parametrize("op", [f.__name__ for f in OPS if f not in (route, gate)])
def test_not_finite(op, request):
    """NaN and infinities come out where the reference has them, and nowhere else: what is dropped,
    padded or past the last expert is not read."""
    spec = spec_of(op)
    floats = ("x", "rows", "drows", "w", "w1", "w2", "b1", "b2", "weights")
    for seed in range(request.config.getoption("--draws") or DRAWS):
        d, dtype, inputs = draw(op, seed)
        # torch's own gelu of an infinity is NaN or not by the length of the array.
        some = 1 if inputs.get("activation") in ("gelu", "geglu") else 3
        bad = (torch.nan, torch.inf, -torch.inf)[:some]
        for name in floats:
            value = inputs.get(name)
            if value is None or not value.numel():
                continue
            inputs[name] = value = value.clone(memory_format=torch.contiguous_format)
            for _ in range(d.choice((0, 1, 3)) if name in ("w", "w1", "w2") else d.choice((1, 4))):
                at = d.randrange(value.numel())
                value.view(-1)[at] = d.choice(bad)
        ours, theirs = (tensors(f(**inputs)) for f in (spec.fn, spec.reference))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.is_floating_point():
                told = f"draw({op!r}, {seed}): output {i}"
                assert torch.equal(a.isnan(), b.isnan()), told
                assert torch.equal(a.isinf(), b.isinf()), told
                assert torch.equal(a[a.isinf()] > 0, b[b.isinf()] > 0), told


def test_gate_takes_any_number(request):
    """K different experts of those there are, and of finite logits finite weights."""
    extreme = (0.0, -0.0, 1e-40, 1.0, -90.0, 90.0, 3e4, -3e4, 1e38, -1e38)
    bad = (torch.nan, torch.inf, -torch.inf)
    for seed in range(request.config.getoption("--draws") or DRAWS):
        d, dtype, inputs = draw("gate", seed)
        inputs.pop("valid", None)
        finite = d.maybe()
        values = torch.tensor(extreme if finite else extreme + bad, dtype=torch.float64)
        values = values[values.to(dtype).isfinite() | (not finite)]
        picked = d.whole(0, len(values), *inputs["logits"].shape)
        inputs["logits"] = values[picked].to(dtype)
        out = ops.gate(**inputs)
        told = f"draw('gate', {seed}), extreme"
        ids, experts_there = out.ids.sort().values, inputs["logits"].shape[1]
        assert not len(ids) or (ids.min() >= 0 and ids.max() < experts_there), told
        assert (ids.diff() > 0).all(), told
        if finite:
            assert out.weights.isfinite().all() and out.score_sum.isfinite().all(), told
