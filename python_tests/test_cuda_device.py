"""The CUDA backend on a GPU: the ops' contract, no wait for the device, capture and replay,
streams, and the emulator's word against the hardware's. Nothing here runs without a GPU;
bench/gpu_suite.sh runs all of it where there is one.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from moekernels import interop, ops
from moekernels.ops._spec import all_specs, randn, random_ids
from python_tests import emulated
from python_tests.test_contract import assert_close, assert_same, evaluate, lift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEMS = ("gate", "route", "permute", "combine", "pack", "regroup", "ungroup")
SPECS = [spec for spec in all_specs() if spec.name in STEMS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chosen_cases():
    for spec in SPECS:
        for dtype in DTYPES:
            for case in spec.cases(dtype):
                yield pytest.param(
                    spec, dtype, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.name}"
                )


def on_device(inputs: dict) -> dict:
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def to_cpu(result):
    outputs, gradients = result
    return [t.cpu() for t in outputs], {
        n: None if g is None else g.cpu() for n, g in gradients.items()
    }


@contextlib.contextmanager
def no_waiting():
    """Any call that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec, dtype, case", list(chosen_cases()))
def test_values_and_gradients(spec, dtype, case):
    inputs = on_device(case.inputs)
    with no_waiting():
        first = evaluate(spec.fn, spec, inputs)
        second = evaluate(spec.fn, spec, inputs)
    assert_same(first, second)
    ours = to_cpu(first)
    plain = evaluate(spec.reference, spec, case.inputs)
    if spec.exact:
        assert_same(ours, plain)
        return
    exact = evaluate(spec.reference, spec, lift(case.inputs))
    for i, (a, b, c) in enumerate(zip(ours[0], plain[0], exact[0], strict=True)):
        assert_close(f"output {i}", a, b, c)
    for name, gradient in ours[1].items():
        if gradient is None:
            continue
        zero = torch.zeros_like(gradient)
        others = plain[1].get(name), exact[1].get(name)
        assert_close(f"d{name}", gradient, *(zero if o is None else o for o in others))


@pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_emulator_agrees(spec, dtype):
    """The same source and inputs on both: floats within a few roundings, all else alike."""
    for case in list(spec.cases(dtype))[:12]:
        device = to_cpu(evaluate(spec.fn, spec, on_device(case.inputs)))
        with emulated.emulated_cuda():
            emulator = evaluate(spec.fn, spec, case.inputs)
        if spec.exact:
            assert_same(device, emulator)
            continue
        for a, b in zip(device[0], emulator[0], strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, c=case: f"{c.name}: {m}")
        for name, gradient in device[1].items():
            if gradient is not None:
                torch.testing.assert_close(gradient, emulator[1][name])


def layer(logits: Tensor, x: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Gate, route, permute and combine, forward and backward, without the experts between."""
    logits, x = logits.detach().requires_grad_(), x.detach().requires_grad_()
    weights, ids, score_sum, counts, z_sum = ops.gate(logits, top_k, renormalize=True)
    routing = ops.route(ids, logits.shape[1], alignment=8)
    rows = ops.permute(x, routing.token_of, routing.row_of)
    y = ops.combine(rows, routing.row_of, routing.token_of, weights)
    loss = y.float().square().sum() + score_sum.square().sum() + z_sum.sum()
    return (y, ids, *torch.autograd.grad(loss, (logits, x)))


def test_capture_and_replay():
    def fresh(seed):
        return randn(torch.bfloat16, 512, 64, seed=seed).cuda(), randn(
            torch.bfloat16, 512, 256, seed=seed + 1
        ).cuda()

    logits, x = fresh(0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(logits, x, 4)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(logits, x, 4)
    for seed in (2, 4):
        new_logits, new_x = fresh(seed)
        logits.copy_(new_logits)
        x.copy_(new_x)
        graph.replay()
        for a, b in zip(captured, layer(new_logits, new_x, 4), strict=True):
            assert torch.equal(a, b)


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
    assert str(error.value) == "permute: token_of must be on the same device as the first argument"


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
