"""What the contract test knows of route: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moekernels import reference
from moekernels.ops.route import _route, route
from python_tests.support.spec import Case, OpSpec, ids_cases, randn, random_ids, register


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, experts in ids_cases():
        plain = {"ids": ids, "num_experts": experts}
        yield Case(name, plain, compile=name == "ordinary")
        yield Case(f"{name}-int64", {**plain, "ids": ids.long()})
        yield Case(f"{name}-alignment", {**plain, "alignment": 8})
        yield Case(f"{name}-capacity", {**plain, "capacity": 4, "alignment": 3})
        weights = (randn(dtype, *ids.shape) * 2).round()  # many tie
        by_weight = {"weights": weights, "capacity": 4, "drop": "weight"}
        yield Case(f"{name}-by_weight", plain | by_weight, compile=name == "ordinary")
    yield Case("capacity_zero", {**plain, "capacity": 0})


def _large(dtype: torch.dtype) -> dict:
    ids = random_ids(12000, 16, 4)  # past the slots that one thread takes
    return {"ids": ids, "num_experts": 16, "capacity": 2900, "alignment": 4}


def _sized(tokens: int) -> dict:
    ids = random_ids(tokens, 5, 2)
    return {"ids": ids, "num_experts": 5, "capacity": tokens, "alignment": 4}


def _messages():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    yield (
        lambda: route(ids.float(), 4),
        "route: ids must be int32|int64 [T, K], got float32 [3, 2]",
    )
    yield lambda: route(ids[0], 4), "route: ids must be int32|int64 [T, K], got int32 [2]"
    yield lambda: route(ids, 0), "route: num_experts must be at least 1, got 0"
    yield lambda: route(ids, 4, alignment=0), "route: alignment must be at least 1, got 0"
    yield (
        lambda: route(ids, 2**31),
        "route: num_experts must fit int32, got 2147483648",
    )
    yield (
        lambda: route(ids, 4, alignment=2**62),
        "route: alignment must fit int32, got 4611686018427387904",
    )
    yield (
        lambda: route(ids, 4, alignment=2**63 - 1),
        "route: alignment must fit int32, got 9223372036854775807",
    )
    yield (
        lambda: route(ids, 2**31 - 1, alignment=2**31 - 1),
        "route: T*K + E*(alignment-1) must fit int32, got 4611686011984936968 with "
        "num_experts=2147483647 and alignment=2147483647",
    )
    yield lambda: route(ids, 4, drop="random"), "route: drop must be position|weight, got 'random'"
    yield lambda: route(ids, 4, capacity=-2), "route: capacity must be at least 0, got -2"
    yield (
        lambda: route(ids, 4, capacity=2, drop="weight"),
        'route: drop="weight" needs weights',
    )
    yield (
        lambda: route(ids, 4, capacity=2, drop="weight", weights=torch.zeros(3)),
        "route: weights must be float32|float64 [T=3, K=2], got float32 [3]",
    )
    yield (
        lambda: _route(ids.T, 4, None, -1, 1),
        "route: ids must be contiguous, got strides [1, 2]",
    )


register(
    OpSpec(
        name="route",
        fn=route,
        reference=reference.route,
        cases=_cases,
        sized=_sized,
        exact=True,
        messages=_messages,
        large=_large,
    )
)
