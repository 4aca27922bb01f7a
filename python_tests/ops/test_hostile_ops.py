"""Ops under hostile inputs: extents of zero, NaN and infinite rows, arguments on the wrong device,
and words that the environment's variables do not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from moekernels import ops, reference
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.contract import evaluate, hold, lift
from python_tests.support.spec import all_specs, randn, wide

SPECS = {spec.name: spec for spec in all_specs()}
ACTIVATIONS = (*reference.GATED, *reference.UNGATED)
BACKENDS = [
    pytest.param(nullcontext, id="cpu"),
    pytest.param(
        emulated.emulated_cuda,
        id="cuda",
        marks=pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
    ),
]
DTYPES = [torch.float32, torch.bfloat16]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch allocates holds NaN until it is written to, and so do the kernels' buffers."""
    nan = torch.full((2, 64, 64), torch.nan)
    for dtype in DTYPES:
        rows = nan[0].to(dtype)
        ops.grouped_gemm(rows, nan.to(dtype), torch.tensor([0, 40, 64]))
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(spec, inputs: dict, backend=nullcontext) -> None:
    """A call over memory that holds NaN gives the reference's outputs and gradients."""
    with poisoned_memory(), backend():
        ours = evaluate(spec.fn, spec, inputs)
    hold(spec, inputs, ours)


def without(*letters: str, **lengths: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each of the letters zero in turn, and all of them."""
    for gone in (*letters, letters):
        yield "".join(gone) + "=0", {**lengths, **dict.fromkeys(gone, 0)}


def routing_without(T: int, K: int, E: int) -> tuple[Tensor, reference.Routing]:
    ids = randn(torch.float32, T, K).mul(9).int() % max(E, 1)
    if E == 0:  # route takes no E of 0; what is to be routed nowhere is dropped
        routing = reference.route(torch.full_like(ids, -1), 1)
        return ids, routing._replace(offsets=routing.offsets[:1], counts=routing.counts[:0])
    return ids, reference.route(ids, E)


def movers(dtype: torch.dtype) -> Iterator[tuple[str, str, dict]]:
    for name, n in without("T", "K", "H", T=5, K=2, H=6):
        ids, routing = routing_without(n["T"], n["K"], 3)
        x = randn(dtype, n["T"], n["H"])
        weights = randn(wide(dtype), *ids.shape, seed=1)
        index = {"row_of": routing.row_of, "token_of": routing.token_of}
        if n["H"]:
            options = {"alignment": 4, "capacity": 1, "weights": weights, "drop": "weight"}
            yield name, "route", {"ids": ids, "num_experts": 3}
            yield name, "route", {"ids": ids, "num_experts": 3, **options}
        yield name, "permute", {"x": x, **index}
        rows = randn(dtype, len(routing.token_of), n["H"], seed=2)
        yield name, "combine", {"rows": rows, **index, "weights": None}
        yield name, "combine", {"rows": rows, **index, "weights": weights}
        slots = {"slot_of": routing.slot_of, "top_k": n["K"]}
        yield name, "pack", {"x": x, "weights": weights, **slots}
        yield name, "pack", {"x": x, "weights": None, **slots}
    for name, n in without("P", "e", "H", P=3, e=2, H=6):
        counts = torch.arange(n["P"] * n["e"]).view(n["P"], n["e"])
        rows = int(counts.sum())
        message = randn(dtype, rows, n["H"] + (2 if dtype == torch.bfloat16 else 1))
        yield name, "regroup", {"message": message, "counts": counts, "width": n["H"]}
        weights = randn(wide(dtype), rows, seed=1)
        inputs = {"rows": randn(dtype, rows, n["H"]), "counts": counts}
        yield name, "ungroup", {**inputs, "weights": weights}
        yield name, "ungroup", {**inputs, "weights": None}


def products(dtype: torch.dtype) -> Iterator[tuple[str, str, dict]]:
    for transposed in (False, True):
        for name, n in without("R", "I", "O", "E", R=7, I=6, O=9, E=3):
            ends = [min(2 * e, n["R"]) for e in range(n["E"] + 1)]
            shape = (n["E"], n["I"], n["O"]) if transposed else (n["E"], n["O"], n["I"])
            rows, drows = randn(dtype, n["R"], n["I"]), randn(dtype, n["R"], n["O"], seed=1)
            both = {"offsets": torch.tensor(ends), "transposed": transposed}
            w = randn(dtype, *shape, seed=2)
            yield name, "grouped_gemm", {"rows": rows, "w": w, **both}
            yield name, "grouped_gemm_dgrad", {"drows": drows, "w": w, **both}
            yield name, "grouped_gemm_wgrad", {"rows": rows, "drows": drows, **both}
    for options in ({}, {"interleaved": True, "recompute": True}, {"transposed": True}):
        for name, n in without("T", "K", "H", "F", "E", T=5, K=2, H=6, F=7, E=3):
            yield name, "experts", expert_inputs(dtype, **n, **options)


def expert_inputs(dtype, *, T, K, H, F, E, activation="swiglu", transposed=False, **options):
    _, routing = routing_without(T, K, E)
    width = F if activation in reference.UNGATED else 2 * F
    w1, w2 = randn(dtype, E, width, H, seed=1), randn(dtype, E, H, F, seed=2)
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    return {
        "x": randn(dtype, T, H),
        "weights": randn(wide(dtype), len(routing.token_of), seed=3),
        "w1": w1,
        "w2": w2,
        "offsets": routing.offsets,
        "token_of": routing.token_of,
        "row_of": routing.row_of,
        "b1": randn(dtype, E, width, seed=4),
        "b2": randn(dtype, E, H, seed=5),
        "activation": activation,
        "transposed": transposed,
        **options,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extents_of_zero(backend, dtype):
    """Every op without tokens, choices, columns, experts, peers or rows, forward and backward."""
    for name, op, inputs in (*movers(dtype), *products(dtype)):
        try:
            check(SPECS[op], inputs, backend)
        except Exception as error:
            raise AssertionError(f"{op} {name}: {error}") from error


def at_gate_and_up(dtype: torch.dtype, values: tuple[float, ...], activation: str) -> dict:
    """h is each value of the gate with each of up, exactly: an expert's bias before no input."""
    gate = torch.tensor(values, dtype=torch.float64).clamp(
        torch.finfo(dtype).min, torch.finfo(dtype).max
    )
    gate = torch.where(torch.tensor(values).isinf(), torch.tensor(values).double(), gate)
    h = gate[:, None] if activation in reference.UNGATED else torch.cartesian_prod(gate, gate)
    rows = len(h)
    return {
        "x": torch.zeros(rows, 1, dtype=dtype),
        "weights": None,
        "w1": torch.ones(rows, h.shape[1], 1, dtype=dtype),
        "w2": torch.ones(rows, 1, 1, dtype=dtype),
        "offsets": torch.arange(rows + 1),
        "b1": h.to(dtype),
        "activation": activation,
    }


NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_of_what_is_not_finite(backend, activation):
    """NaN and infinity give what they give in torch; of the largest numbers nothing else does."""
    on_cpu = backend is nullcontext
    values = (*NOT_FINITE, 1.5, -95.0, *((1e300, -1e300, 60.0, 0.0, -0.7) if on_cpu else ()))
    for dtype in DTYPES if on_cpu else DTYPES[:1]:
        inputs = at_gate_and_up(dtype, values, activation)
        with backend():
            (y,), ours = evaluate(ops.experts, SPECS["experts"], inputs)
        (expected,), wanted = evaluate(reference.experts, SPECS["experts"], inputs)
        if activation == "gelu":  # torch's own gives NaN or infinity by the length of the array
            expected[inputs["b1"] == torch.inf] = torch.inf
        close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(y, expected, equal_nan=True, **close)
        slope, wanted = ours["b1"], wanted["b1"]
        assert not slope.isfinite()[wanted.isnan()].any()
        finite = inputs["b1"].isfinite().all(dim=1) & wanted.isfinite().all(dim=1)
        torch.testing.assert_close(slope[finite], wanted[finite], **close)


FAR_BELOW = [[-88.0, -88.0], [-90.0, -91.0], [-100.0, -99.0], [-150.0, -200.0], [-30.0, -18.0]]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sqrt_softplus_far_below_zero(backend, renormalize):
    """Where exp(x) has no normal fp32 number its square root still has one, and so a slope."""
    inputs = {
        "logits": torch.tensor(FAR_BELOW),
        "top_k": 2,
        "score": "sqrtsoftplus",
        "renormalize": renormalize,
    }
    with backend():
        ours, gradients = evaluate(ops.gate, SPECS["gate"], inputs)
    exact, wanted = evaluate(reference.gate, SPECS["gate"], lift(inputs))
    close = {"rtol": 1e-5, "atol": 1e-20}
    torch.testing.assert_close(ours[0].double(), exact[0], **close)
    torch.testing.assert_close(ours[2].double(), exact[2], **close)  # score_sum
    torch.testing.assert_close(gradients["logits"].double(), wanted["logits"], rtol=1e-4, atol=1e-6)
    if renormalize:
        torch.testing.assert_close(ours[0][0], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_confident_router(backend, score, renormalize):
    """To fp32's rounding, where a score of nearly one leaves 1 - score nothing of its digits."""
    logits = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits.amax(1) + torch.tensor([5.0, 12.0, 15.0, 17.0, 19.0, 21.0] * 2)
    weigh, share = torch.tensor([0.7, -1.3]), torch.linspace(-1, 1, 8)

    def gradient(gate, x):
        x = x.clone().requires_grad_()
        out = gate(x, 2, score=score, renormalize=renormalize)
        loss = (out[0] * weigh.to(x.dtype)).sum() + (out[2] * share.to(x.dtype)).sum()
        return torch.autograd.grad(loss, x)[0].double()

    with backend():
        ours = gradient(ops.gate, logits)
    torch.testing.assert_close(ours, gradient(reference.gate, logits.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_of_not_a_number(backend, score):
    """NaN ranks as +infinity does, the smaller id first; with a bias the scores rank, which NaN
    makes NaN for the whole token under softmax and for one expert under the others."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 5] = torch.nan
    x[1, 6], x[1, 2] = torch.nan, torch.inf
    x[2, :] = torch.nan
    with backend():
        by_logit = ops.gate(x, 3, score=score)
        biased = ops.gate(x, 3, score=score, bias=torch.zeros(8))
        grouped = ops.gate(x, 2, score=score, num_groups=4, groups_kept=1)
    assert by_logit.ids[0, 0] == 5
    assert by_logit.ids[1, :2].tolist() == [2, 6]
    assert by_logit.ids[2].tolist() == [0, 1, 2]
    assert biased.ids[0, 0] == (0 if score == "softmax" else 5)
    assert sorted(grouped.ids[0].tolist()) == [4, 5]
    assert by_logit.weights[0, 0].isnan()


def tensor_arguments() -> Iterator:
    for spec in SPECS.values():
        case = next(case for case in spec.cases(torch.float32) if case.compile)
        for name in [n for n, v in case.inputs.items() if isinstance(v, Tensor)]:
            if (spec.name, name) in (("route", "ids"), ("regroup", "message"), ("quantize", "x")):
                continue  # nothing else has to lie there
            yield pytest.param(spec, case.inputs, name, id=f"{spec.name}-{name}")


@pytest.mark.parametrize("needs_grad", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("spec, inputs, name", list(tensor_arguments()))
def test_one_argument_without_memory(spec, inputs, name, needs_grad):
    """An argument on meta beside those on the CPU is refused: it would give what memory holds."""
    inputs = {**inputs, name: inputs[name].to("meta")}
    for wanted in spec.differentiable if needs_grad else ():
        if inputs.get(wanted) is not None:
            inputs[wanted] = inputs[wanted].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=" must be on (cpu|meta) like the first argument, got "):
        spec.fn(**inputs)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_only_the_backward_reads_is_checked(backend, needs_grad):
    inputs = expert_inputs(torch.float32, T=5, K=2, H=6, F=7, E=3)
    inputs["x"].requires_grad_(needs_grad)
    inputs["row_of"] = inputs["row_of"][:4]
    message = r"^experts: row_of must be int32 \[T=5, K\], got int32 \[4, 2\]$"
    with backend(), pytest.raises(RuntimeError, match=message):
        ops.experts(**inputs)
    message = r"^experts_dbias: offsets must be int64 \[E\+1\], got int64 \[0\]$"
    with backend(), pytest.raises(RuntimeError, match=message):
        raw._experts_dbias(inputs["x"], None, inputs["offsets"][:0], None, 0)


def test_what_only_the_backward_reads_is_needed():
    """None is refused in the forward, whether or not a gradient is wanted."""
    x, index, both = torch.zeros(3, 4), torch.zeros(6).int(), torch.zeros(3, 2).int()
    for leaf in (x, x.clone().requires_grad_()):
        with pytest.raises((RuntimeError, TypeError), match="permute: row_of must be "):
            ops.permute(leaf, index, None)
        with pytest.raises((RuntimeError, TypeError), match="combine: token_of must be "):
            ops.combine(leaf, both, None)
