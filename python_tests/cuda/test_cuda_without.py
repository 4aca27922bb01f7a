"""What of the CUDA path can be held to without a GPU: profiler ranges, autocast, interop."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moekernels import interop, ops
from moekernels.errors import UsageError
from moekernels.ops.grouped_gemm import autocast


def test_profiler_ranges_bear_the_ops_names():
    """The dispatcher's ranges, which CPU and CUDA share."""
    logits = torch.randn(6, 4, requires_grad=True)
    x = torch.randn(6, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        gate = ops.gate(logits, 2)
        routing = ops.route(gate.ids, 4)
        rows = ops.permute(x, routing.token_of, routing.row_of)
        ops.combine(rows, routing.row_of, routing.token_of, gate.weights).sum().backward()
    names = {event.key for event in seen.key_averages()}
    stems = ("gate", "gate_backward", "route", "permute", "combine", "combine_backward")
    assert {f"moekernels::_{stem}" for stem in stems} <= names


def test_autocast_asks_the_tensors_own_device():
    """Autocast of the other device type changes nothing: each type has its own."""
    x = torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(torch.device("cpu"), x)[0].dtype == torch.bfloat16
        assert autocast(torch.device("cuda"), x)[0].dtype == torch.float32
    with torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available()):
        assert autocast(torch.device("cpu"), x)[0].dtype == torch.float32


def test_autocast_leaves_routing_alone():
    logits, x = torch.randn(5, 4), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        gate = ops.gate(logits, 2)
        routing = ops.route(gate.ids, 4)
        rows = ops.permute(x, routing.token_of, routing.row_of)
        y = ops.combine(rows, routing.row_of, routing.token_of, gate.weights)
    assert gate.weights.dtype == rows.dtype == y.dtype == torch.float32
    assert torch.equal(gate.weights, ops.gate(logits, 2).weights)


class Producer:
    """An array of another library: what `from_cupy` takes from CuPy is DLPack, no more."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_come_in_without_a_copy():
    x = torch.arange(6.0)
    assert interop.from_cupy(Producer(x)).data_ptr() == x.data_ptr()


def test_what_cupy_cannot_hold_is_named():
    with pytest.raises(UsageError, match="to_cupy: the tensor must be on a CUDA device"):
        interop.to_cupy(torch.ones(2))


def test_without_cupy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(UsageError, match=r"pip install 'moekernels\[cupy\]'"):
        interop.cupy_stream()
