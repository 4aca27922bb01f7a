"""The CUDA kernels against the ops' contract, executed by the PTX emulator: values, gradients,
hostile inputs, the same bits whatever the order of the warps, messages. What runs is nvcc's own
code and the launchers as they are.
"""

from __future__ import annotations

import pytest
import torch

from moekernels import ops, reference
from python_tests.support import emulated
from python_tests.support.contract import assert_same, evaluate, hold, spec_of
from python_tests.support.spec import all_specs, randn, random_ids

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")

# These hold PTX, which g++ and so the sanitizers do not know.
IN_PTX = ("grouped_gemm", "experts", "exchange") if emulated.SANITIZER else ()
SPECS = [spec for spec in all_specs(private=True) if not spec.name.startswith(IN_PTX)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chosen_cases():
    """Every case in fp32; a few of each op in 16 bits, for the code that differs."""
    for spec in SPECS:
        for dtype in DTYPES:
            for i, case in enumerate(spec.cases(dtype)):
                if dtype == torch.float32 or i in (0, 1, 9):
                    yield pytest.param(
                        spec, dtype, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.name}"
                    )


def check(spec, inputs: dict, schedule: int | None = None):
    """Holds one call on the emulated device to the contract; returns what it gave."""
    with emulated.emulated_cuda(schedule) as device:
        ours = evaluate(spec.fn, spec, inputs)
    assert device.launches or not any(t.numel() for t in ours[0])
    hold(spec, inputs, ours)
    return ours


@pytest.mark.parametrize("spec, dtype, case", list(chosen_cases()))
def test_values_and_gradients(spec, dtype, case):
    check(spec, case.inputs)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_order_of_warps_changes_no_bit(spec):
    case = next(iter(spec.cases(torch.float32)))
    results = []
    for schedule in (None, 1, 2):
        with emulated.emulated_cuda(schedule):
            results.append(evaluate(spec.fn, spec, case.inputs))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# One for each size of team that holds a token's logits.
@pytest.mark.parametrize("experts", [8, 13, 32, 64, 100, 256, 512, 777, 2048, 4096])
def test_gate_sizes(experts):
    x = randn(torch.bfloat16, 9, experts, seed=experts)
    # Distinct in bf16, so that no choice hangs on a tie.
    x = (torch.argsort(torch.argsort(x.float(), dim=1), dim=1) - experts // 2).float() / experts * 8
    check(spec_of("gate"), {"logits": x, "top_k": min(8, experts), "renormalize": True})


def test_gate_groups_of_deepseek():
    x = randn(torch.float32, 5, 256, seed=3)
    options = {"score": "sigmoid", "num_groups": 8, "groups_kept": 4, "group_score": "sum2"}
    bias = randn(torch.float32, 256, seed=4, scale=0.1)
    check(
        spec_of("gate"),
        {"logits": x, "top_k": 8, "bias": bias, "renormalize": True, "scale": 2.5, **options},
    )


def test_gate_many_segments():
    """Segments that end inside chunks, hold nothing or span several; tokens on both sides."""
    segments = torch.tensor([3, 3, 10, 31, 33, 130, 130, 131, 140])
    inputs = {"logits": randn(torch.float32, 150, 8), "top_k": 2, "segments": segments}
    check(spec_of("gate"), inputs)


def test_gate_not_a_number():
    x = randn(torch.float32, 6, 16)
    x[1, 3] = x[2, :] = float("nan")
    x[3, :5] = float("inf")
    x[4, :] = -float("inf")
    with emulated.emulated_cuda():
        out = ops.gate(x, 4)
    assert out.ids[[0, 1, 2, 3, 4]].min() >= 0
    for row in out.ids:
        assert len(set(row.tolist())) == 4
    assert torch.equal(out.ids, ops.gate(x, 4).ids)  # what the CPU chooses


# Chunks of several warps; counters that do not fit shared memory.
@pytest.mark.parametrize("tokens, experts, top_k", [(700, 16, 4), (300, 5000, 2), (40, 600, 8)])
def test_route_sizes(tokens, experts, top_k):
    inputs = {"ids": random_ids(tokens, experts, top_k), "num_experts": experts, "alignment": 16}
    check(spec_of("route"), inputs)


def test_route_by_weight_many():
    ids = torch.zeros(2500, 1, dtype=torch.int32)
    weights = (randn(torch.float32, 2500, 1) * 4).round()  # many tie
    weights[7] = float("nan")
    weights[9] = -0.0
    inputs = {"ids": ids, "num_experts": 2, "weights": weights, "capacity": 1100, "drop": "weight"}
    check(spec_of("route"), inputs)


@pytest.mark.parametrize("hidden", [1, 3, 8, 64, 1030, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_row_sizes_and_alignments(dtype, hidden):
    """Rows of every alignment, in arrays that begin off a 16-byte boundary."""
    routing = reference.route(random_ids(7, 3, 2), 3, alignment=4)
    x = randn(dtype, 7 * hidden + 1)[1:].view(7, hidden)
    row_of, token_of = routing.row_of, routing.token_of
    check(spec_of("permute"), {"x": x, "token_of": token_of, "row_of": row_of})
    rows = randn(dtype, len(token_of) * hidden + 1)[1:].view(-1, hidden)
    weights = randn(torch.float32, 7, 2)
    check(
        spec_of("combine"),
        {"rows": rows, "row_of": row_of, "token_of": token_of, "weights": weights},
    )
    check(spec_of("pack"), {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": 2})


def test_indices_out_of_range_touch_nothing():
    """Ids, rows and tokens past their range are dropped inside the kernels: no stray access."""
    wild = torch.tensor([[0, 2**31 - 1], [-7, 3], [5, -(2**31)]], dtype=torch.int32)
    with emulated.emulated_cuda():
        routing = ops.route(wild, 4)
        assert routing.counts.tolist() == [1, 0, 0, 1]
        assert ops.permute(torch.ones(3, 5), wild.flatten(), wild).sum() == 5
        assert ops.combine(torch.ones(4, 5), wild, torch.zeros(4, dtype=torch.int32)).sum() == 10
        x = torch.randn(3, 6)
        ops.pack(x, torch.ones(3, 2), wild.flatten(), 2)
        weights = torch.ones(3, 2, requires_grad=True)
        rows = torch.ones(4, 5, requires_grad=True)
        same = torch.tensor(
            [[1, 1], [1, 2], [2, 2]], dtype=torch.int32
        )  # rows that several choices claim
        ops.combine(
            rows, same, torch.tensor([0, 0, 9, -1], dtype=torch.int32), weights
        ).sum().backward()
        assert rows.grad.tolist() == [[0.0] * 5, [1.0] * 5, [0.0] * 5, [0.0] * 5]


def test_float64_is_refused():
    x = torch.zeros(3, 4, dtype=torch.float64)
    message = (
        "gate: logits is float64, which the CPU alone computes; "
        "give float32, bfloat16 or float16 on CUDA"
    )
    with emulated.emulated_cuda(), pytest.raises(RuntimeError) as error:
        ops.gate(x, 2)
    assert str(error.value) == message


def test_limits_are_named():
    with emulated.emulated_cuda(), pytest.raises(RuntimeError, match="up to E=4096 and top_k=32"):
        ops.gate(torch.zeros(1, 4097), 2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_messages_are_those_of_the_cpu(spec):
    for call, message in spec.messages():
        if "offsets must ascend" in message:
            continue  # values that lie on the device: the kernels stay within the rows instead
        with emulated.emulated_cuda() as device, pytest.raises((RuntimeError, ValueError)) as error:
            call()
        assert str(error.value) == message
        assert not device.launches


@pytest.mark.skipif(
    torch.cuda.is_available() or bool(emulated.SANITIZER), reason="a GPU, or no PTX"
)
def test_hardware_is_asked_and_missed():
    """Up to the driver's door: what a GPU would be given is made, and its absence has a name."""
    x, token_of = torch.ones(3, 4), torch.zeros(6, dtype=torch.int32)
    with emulated.emulated_cuda(hardware=True) as device:
        with pytest.raises(RuntimeError, match="ptx_hardware: no CUDA driver here"):
            ops.permute(x, token_of, torch.zeros(3, 2, dtype=torch.int32))
    assert len(device.launches) == 1
