"""grouped_gemm by CUTLASS (MOEKERNELS_GEMM=cutlass). Without a GPU: the kernel that writes each
group's problem for it, in the emulator, and the messages. With one, in a build that holds it: the
contract.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

import ptx_emulator as ptx
from moekernels import _host, ops
from python_tests.support import emulated
from python_tests.support.contract import assert_same, evaluate, hold
from python_tests.support.device import no_waiting, on_device, to_cpu
from python_tests.support.spec import all_specs, randn, routing_cases

BF16 = torch.bfloat16
SPECS = {spec.name: spec for spec in all_specs() if spec.name.startswith("grouped_gemm")}


# ---- the problems of the groups, in the emulator
class Operand(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "row_bytes", "expert_bytes", "stride")]


class Problems(ctypes.Structure):
    """csrc/cutlass/group_problems.h"""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("offsets", "experts", "num_rows")],
        *[(name, ctypes.c_int32) for name in ("m", "n", "k")],
        *[(name, Operand) for name in ("a", "b", "d")],
        ("zero_empty", ctypes.c_bool),
    ]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def run_group_problems(offsets, rows: int, mnk, a, b, d, out, zero_empty, schedule=None):
    """Sizes [E, 3], and addresses [3, E] and strides [3, E] of A, B and D; `out` is D's memory."""
    module = ptx.load(
        emulated.ROOT / "csrc" / "cutlass" / "group_problems.cu",
        emulated.ARCH,
        defines=['MOEKERNELS_CUDA_ARCHS="PTX"'],
        include=[emulated.ROOT / "csrc" / "include", emulated.ROOT / "csrc" / "cuda"],
    )
    offsets, experts = np.array(offsets, np.int64), len(offsets) - 1
    sizes = np.zeros((experts, 3), np.int32)
    words = [np.zeros(experts, np.int64) for _ in range(6)]
    operands = [Operand(*values) for values in (a, b, (address(out), *d))]
    problems = Problems(address(offsets), experts, rows, *mnk, *operands, zero_empty)
    pointers = np.array([address(array) for array in (sizes, *words)], np.int64)
    fresh = [ptx.Uninitialized(array) for array in (sizes, *words)]
    (kernel,) = module.kernels.values()
    args = [
        ptx.Packed(bytes(problems), [offsets, out]),
        ptx.Packed(pointers.tobytes(), fresh),
    ]
    module.launch(kernel, (experts + 1) * 32, 256, args, 0, schedule=schedule)
    return sizes, np.array(words[::2]), np.array(words[1::2])


OFFSETS = {
    "ordinary": [0, 3, 3, 10, 21, 21],
    "full": [0, 7, 30],
    "no_rows": [0, 0, 0, 0],
    "hostile": [-4, 9, 5, 2**40, 11],
}
needs_nvcc = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")


def ranges(offsets, rows: int) -> list[tuple[int, int]]:
    """The rows of each group, and of none."""
    inside = [min(max(o, 0), rows) for o in offsets]
    pairs = zip(inside, [*inside[1:], rows], strict=True)
    return [(begin, max(begin, end)) for begin, end in pairs]


@needs_nvcc
@pytest.mark.parametrize("schedule", [None, 1])
@pytest.mark.parametrize("name", OFFSETS)
def test_problems_of_row_products(name, schedule):
    """Operands more than 2^32 bytes apart; rows of no expert become zero, and no others change."""
    rows, offsets, width = 30, OFFSETS[name], 24
    out = np.full((rows, width), 7, np.int16)
    a, b = (1 << 50, 1 << 33, 0, 40), (1 << 51, 0, 1 << 34, 48)
    sizes, addresses, strides = run_group_problems(
        offsets, rows, (-1, 24, 40), a, b, (2 * width, 0, width), out, False, schedule
    )
    *groups, tail = ranges(offsets, rows)
    begins = np.array([begin for begin, _ in groups])
    assert sizes.tolist() == [[end - begin, 24, 40] for begin, end in groups]
    assert (addresses[0] == (1 << 50) + begins * (1 << 33)).all()
    assert (addresses[1] == (1 << 51) + np.arange(len(groups)) * (1 << 34)).all()
    assert (addresses[2] - addresses[2][0] == (begins - begins[0]) * 2 * width).all()
    assert strides.tolist() == [[s] * len(groups) for s in (40, 48, 24)]
    assert not out[tail[0] :].any() and (out[: tail[0]] == 7).all()


@needs_nvcc
@pytest.mark.parametrize("zero_empty", [False, True])
@pytest.mark.parametrize("name", OFFSETS)
def test_problems_of_wgrad(name, zero_empty):
    """An expert without rows has no tiles; its gradient becomes zero where it is set, and stays
    where it is accumulated."""
    rows, offsets, m, n = 30, OFFSETS[name], 16, 520
    out = np.full((len(offsets) - 1, m, n), 7, np.int32)
    a, b = (1 << 50, 2 * m, 0, m), (1 << 51, 2 * n, 0, n)
    sizes, addresses, _ = run_group_problems(
        offsets, rows, (m, n, -1), a, b, (0, 4 * m * n, n), out, zero_empty
    )
    groups = ranges(offsets, rows)[:-1]
    for expert, (begin, end) in enumerate(groups):
        depth = end - begin
        assert sizes[expert].tolist() == [m if depth else 0, n, depth]
        assert addresses[:2, expert].tolist() == [
            (1 << 50) + 2 * m * begin,
            (1 << 51) + 2 * n * begin,
        ]
        assert addresses[2, expert] - addresses[2, 0] == 4 * m * n * expert
        assert (out[expert] == (0 if zero_empty and not depth else 7)).all()


# ---- the switch
@pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")
@pytest.mark.parametrize(
    "value, message",
    [
        (
            "cutlass",
            "grouped_gemm: MOEKERNELS_GEMM=cutlass, but this build leaves CUTLASS out; rebuild "
            "with MOEKERNELS_CUTLASS=1, or unset it",
        ),
        ("cublas", "MOEKERNELS_GEMM must be own or cutlass, got 'cublas'"),
        ("own", None),
    ],
)
def test_switch(monkeypatch, value, message):
    """The emulated library never holds CUTLASS."""
    monkeypatch.setenv("MOEKERNELS_GEMM", value)
    args = randn(BF16, 3, 8), randn(BF16, 1, 8, 8), torch.tensor([0, 3])
    with emulated.emulated_cuda():
        if message is None:
            assert ops.grouped_gemm(*args).shape == (3, 8)
            return
        with pytest.raises(RuntimeError) as error:
            ops.grouped_gemm(*args)
    assert str(error.value) == message


# ---- on a GPU
def why_not_here() -> str | None:
    if not _host.build["cutlass"]:
        return "this build leaves CUTLASS out: MOEKERNELS_CUTLASS=1 builds it"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability()[0] != 9:
        return "the CUDA device is not of sm_90"
    return None


@pytest.fixture
def cutlass(monkeypatch):
    if reason := why_not_here():
        pytest.skip(reason)
    monkeypatch.setenv("MOEKERNELS_GEMM", "cutlass")


def gpu_cases():
    """(spec, inputs): every routing of the contract at widths that CUTLASS takes, of less than a
    tile and of more."""
    for transposed in (False, True):
        for width, out in ((72, 136), (264, 520)):
            for name, _, experts, routing in routing_cases():
                if name == "no_tokens":
                    continue  # nothing to multiply: left to our kernels
                for op, spec in SPECS.items():
                    label = f"{op}-{name}-{width}{'-transposed' if transposed else ''}"
                    yield pytest.param(spec, routing, experts, width, out, transposed, id=label)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spec, routing, experts, width, out, transposed", list(gpu_cases()))
def test_contract(cutlass, spec, routing, experts, width, out, transposed, dtype):
    rows = routing.token_of.shape[0]
    shape = (experts, width, out) if transposed else (experts, out, width)
    inputs = {
        "rows": randn(dtype, rows, width),
        "w": randn(dtype, *shape, seed=1),
        "drows": randn(dtype, rows, out, seed=2),
    }
    names = {"grouped_gemm": ("rows", "w"), "grouped_gemm_dgrad": ("drows", "w")}
    inputs = {name: inputs[name] for name in names.get(spec.name, ("rows", "drows"))}
    inputs |= {"offsets": routing.offsets, "transposed": transposed}
    there = on_device(inputs)
    with no_waiting():
        first = evaluate(spec.fn, spec, there)
        second = evaluate(spec.fn, spec, there)
    assert_same(first, second)
    hold(spec, inputs, to_cpu(first))


@pytest.mark.gpu
def test_main_grad(cutlass):
    """wgrad adds in fp32; experts without rows keep their bits; neighbours do not leak."""
    rows, drows = randn(BF16, 300, 72).cuda(), randn(BF16, 300, 136, seed=1).cuda()
    offsets = torch.tensor([0, 100, 100, 270]).cuda()
    rows[:100], drows[270:] = float("nan"), float("inf")
    before = randn(torch.float32, 3, 136, 72, seed=2).cuda()
    out = before.clone()
    ops.grouped_gemm_wgrad(rows, drows, offsets, out=out)
    assert torch.equal(out[1], before[1]) and out[0].isnan().all()
    exact = before[2].double() + drows[100:270].double().T @ rows[100:270].double()
    torch.testing.assert_close(out[2].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_capture_and_replay(cutlass):
    """The groups are read when the graph runs, not when it is made."""
    rows, w = randn(BF16, 500, 136).cuda(), randn(BF16, 4, 264, 136, seed=1).cuda()
    offsets = torch.tensor([0, 10, 20, 30, 40]).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.grouped_gemm(rows, w, offsets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.grouped_gemm(rows, w, offsets)
    for fresh in ([0, 0, 130, 500, 500], [0, 500, 500, 500, 500], [0, 1, 2, 3, 4]):
        offsets.copy_(torch.tensor(fresh))
        graph.replay()
        assert torch.equal(captured, ops.grouped_gemm(rows, w, offsets))
        assert not captured[fresh[-1] :].any()


@pytest.mark.gpu
def test_what_it_does_not_take(cutlass):
    offsets = torch.tensor([0, 3]).cuda()
    for dtype, width, why in (
        (torch.float32, 8, "wgmma takes 16-bit inputs"),
        (BF16, 9, "TMA needs rows and addresses of whole 16 bytes"),
    ):
        rows, w = randn(dtype, 3, width).cuda(), randn(dtype, 1, 8, width).cuda()
        with pytest.raises(RuntimeError) as error:
            ops.grouped_gemm(rows, w, offsets)
        assert why in str(error.value)
