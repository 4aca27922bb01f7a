"""The CUDA backend on a GPU: the ops' contract, no wait for the device, capture and replay,
streams, and the emulator's word against the hardware's. Nothing here runs without a GPU;
bench/gpu_suite.sh runs all of it where there is one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import interop, ops
from python_tests.support import emulated
from python_tests.support.contract import agree, assert_same, evaluate, hold
from python_tests.support.device import no_waiting, on_device, to_cpu
from python_tests.support.spec import all_specs, randn, random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPECS = all_specs(private=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chosen_cases():
    for spec in SPECS:
        for dtype in DTYPES:
            for case in spec.cases(dtype):
                yield pytest.param(
                    spec, dtype, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.name}"
                )


@pytest.mark.parametrize("spec, dtype, case", list(chosen_cases()))
def test_values_and_gradients(spec, dtype, case):
    inputs = on_device(case.inputs)
    with no_waiting():
        first = evaluate(spec.fn, spec, inputs)
        second = evaluate(spec.fn, spec, inputs)
    assert_same(first, second)
    hold(spec, case.inputs, to_cpu(first))


@pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_hardware_executes_ptx_as_the_emulator_does(spec, dtype):
    """The very PTX that the emulator executes, through the driver, on the same arrays."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the emulator's PTX is for sm_90a")
    for case in list(spec.cases(dtype))[:12]:
        results = []
        for hardware in (True, False):
            with emulated.emulated_cuda(hardware=hardware):
                results.append(evaluate(spec.fn, spec, case.inputs))
        agree(spec, case.inputs, *results)


@pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_emulator_agrees(spec, dtype):
    """The same source and inputs on both."""
    major, minor = torch.cuda.get_device_capability()
    for case in list(spec.cases(dtype))[:12]:
        device = to_cpu(evaluate(spec.fn, spec, on_device(case.inputs)))
        with emulated.emulated_cuda(capability=10 * major + minor):
            emulator = evaluate(spec.fn, spec, case.inputs)
        agree(spec, case.inputs, device, emulator)


def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, recompute: bool) -> list[Tensor]:
    """The whole MoE layer, gate -> route -> experts -> combine, forward and backward."""
    leaves = [t.detach().requires_grad_() for t in (x, logits, w1, w2)]
    x, logits, w1, w2 = leaves
    gate = ops.gate(logits, 4, renormalize=True)
    routing = ops.route(gate.ids, w1.shape[0], alignment=8)
    rows = ops.experts(
        x,
        ops.permute_weights(gate.weights, routing),
        w1,
        w2,
        routing.offsets,
        token_of=routing.token_of,
        row_of=routing.row_of,
        recompute=recompute,
    )
    y = ops.combine(rows, routing.row_of, routing.token_of)
    loss = y.float().square().sum() + gate.score_sum.square().sum() + gate.z_sum.sum()
    return [y, gate.ids, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_whole_layer_captures_and_replays(dtype, recompute):
    """Captured once, replayed with fresh inputs and so with another routing: eager's bits."""
    tokens, hidden, width, experts = 512, 256, 192, 16
    w1 = randn(dtype, experts, 2 * width, hidden, seed=1, scale=hidden**-0.5).cuda()
    w2 = randn(dtype, experts, hidden, width, seed=2, scale=width**-0.5).cuda()

    def fresh(seed):
        x, logits = (
            randn(dtype, tokens, hidden, seed=seed),
            randn(dtype, tokens, experts, seed=-seed),
        )
        return x.cuda(), logits.cuda()

    x, logits = fresh(3)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), no_waiting():
        layer(x, logits, w1, w2, recompute)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, logits, w1, w2, recompute)
    for seed in (4, 5):
        inputs = fresh(seed)
        for static, new in zip((x, logits), inputs):
            static.copy_(new)
        graph.replay()
        for a, b in zip(captured, layer(*inputs, w1, w2, recompute), strict=True):
            assert torch.equal(a, b)


def test_main_grads_are_accumulated_where_they_are():
    """wgrad adds to fp32 main gradients, twice the same bits, and a captured step does too."""
    w1 = randn(torch.bfloat16, 4, 64, 32, seed=1).cuda().requires_grad_()
    w2 = randn(torch.bfloat16, 4, 32, 32, seed=2).cuda().requires_grad_()
    x = randn(torch.bfloat16, 300, 32).cuda()
    offsets = torch.tensor([0, 130, 130, 131, 300], device="cuda")
    totals = []
    for _ in range(2):
        for w in (w1, w2):
            w.main_grad = torch.zeros(w.shape, dtype=torch.float32, device="cuda")
        with no_waiting():
            for _ in range(2):
                ops.experts(x, None, w1, w2, offsets).sum().backward()
        totals.append([w1.main_grad, w2.main_grad])
        assert w1.grad is None and w2.grad is None
    for a, b in zip(*totals):
        assert torch.equal(a, b) and not a[1].any() and a[0].any()


def test_own_stream():
    """Kernels run on torch's current stream: nothing else orders them after the wait."""
    x = torch.zeros(2048, 2048, device="cuda")
    routing = ops.route(random_ids(2048, 8, 2).cuda(), 8)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(3)
        rows = ops.permute(x, routing.token_of, routing.row_of)
    stream.synchronize()
    assert rows.min() == 3


def test_mixed_devices():
    x = torch.zeros(3, 4, device="cuda")
    with pytest.raises(RuntimeError) as error:
        ops.permute(x, torch.zeros(6, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32))
    assert str(error.value) == (
        "permute: token_of must be on cuda:0 like the first argument, got cpu"
    )


def test_cupy():
    cupy = pytest.importorskip("cupy")
    x = torch.arange(12.0, device="cuda").view(3, 4)
    array = interop.to_cupy(x)
    assert array.data.ptr == x.data_ptr()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), interop.cupy_stream():
        assert cupy.cuda.get_current_stream().ptr == stream.cuda_stream
        array += 1
    stream.synchronize()
    assert x[0].tolist() == [1, 2, 3, 4]
    assert interop.from_cupy(array).data_ptr() == x.data_ptr()


def test_past_32_bits():
    """More than 2^31 elements: offsets are 64 bits wide."""
    tokens, hidden = 2**20 + 3, 2049
    if torch.cuda.mem_get_info()[0] < 3 * tokens * hidden * 2:
        pytest.skip("needs 13 GB of device memory")
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    x[-1] = 7
    order = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device="cuda")
    rows = ops.permute(x, order, order[:, None].contiguous())
    assert rows[0].min() == 7 and rows[1].max() == 0
    back = ops.combine(rows, order[:, None].contiguous(), order)
    assert torch.equal(back[-1], x[-1]) and back[-2].max() == 0


@pytest.mark.parametrize("hidden", [2049, 2056], ids=["narrow", "aligned"])
def test_products_past_32_bits(hidden):
    """Rows and gradients that begin beyond 2^31 elements."""
    num_rows = 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 4 * num_rows * hidden * 2:
        pytest.skip("needs 17 GB of device memory")
    rows = torch.zeros(num_rows, hidden, dtype=torch.bfloat16, device="cuda")
    rows[-1] = 1
    w = torch.full((2, 8, hidden), 0.5, dtype=torch.bfloat16, device="cuda")
    offsets = torch.tensor([0, 5, num_rows], device="cuda")
    y = ops.grouped_gemm(rows, w, offsets)
    assert (y[-1] == torch.tensor(hidden / 2, dtype=torch.bfloat16)).all() and not y[:-1].any()
    dw = ops.grouped_gemm_wgrad(rows, torch.ones_like(y), offsets)
    assert (dw[1] == 1).all() and not dw[0].any()
    dgrad = ops.grouped_gemm_dgrad(y, w, offsets)
    assert dgrad[-1].min() == dgrad[-1].max() == y[-1, 0] * 4 and not dgrad[-2].any()
