"""Launches in a chain: each begins before the one ahead has ended, and the layer has the bits that
it has where they run in turn. And the launch that routes alone. In the emulator, which lets whole
chains overlap; what may not be touched early is planted and found."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ptx_emulator as ptx
from moekernels import ops, reference
from moekernels.ops._ffn import Ffn
from python_tests.support import emulated, planted
from python_tests.support.devices import emulated_devices
from python_tests.support.products import offsets_of
from python_tests.support.spec import randn, random_ids

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
BF16, F32 = torch.bfloat16, torch.float32
MODES = [{}, {"lazy": True}, {"schedule": 1}, {"schedule": 2, "lazy": True}, {"resident": 3}]
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 9, 24, 40, 3, 2


@contextmanager
def settings(**how):
    """Of the launches, inside; two blocks a product."""
    emulated.device()  # loads the library
    apply = torch.ops.moekernels_emulated._sm90_settings
    apply(grid=2, **how)
    try:
        yield
    finally:
        apply()


class Layer:
    """What a layer is given, and its launches in both directions."""

    def __init__(self) -> None:
        self.ids = random_ids(TOKENS, EXPERTS, TOP_K)
        self.x, self.dout = (randn(BF16, TOKENS, HIDDEN, seed=s) for s in (0, 1))
        self.weights = randn(F32, TOKENS * TOP_K, seed=2).abs()
        self.w1 = randn(BF16, EXPERTS, 2 * WIDTH, HIDDEN, seed=3, scale=0.3)
        self.w2 = randn(BF16, EXPERTS, HIDDEN, WIDTH, seed=4, scale=0.3)
        self.main = [torch.zeros(w.shape, dtype=F32) for w in (self.w1, self.w2)]

    def launch(self) -> list[Tensor]:
        """Forward and backward by the raw ops -> all that they compute."""
        raw = emulated.device()
        counts, offsets, row_of, token_of, slot_of = raw.call(
            "_route", self.ids, EXPERTS, None, -1, 1
        )
        style = ("swiglu", 1.702, 7.0, False, False, False)
        ffn = Ffn(self.x, self.weights, self.w1, self.w2, offsets, token_of, None, None, *style)
        y, h = raw.call("_experts", *ffn, True, row_of)
        out = raw.call("_combine", y, row_of, None)
        dy = raw.call("_permute", self.dout, token_of)
        dh, weighted_a, dweights = raw.call("_experts_dact", *ffn, dy, h, True, True)
        seen = (token_of, TOKENS)
        args = (dy, offsets, False, *seen, False, False)
        raw.call("_grouped_gemm_wgrad_", self.main[1], weighted_a, *args)
        drows = raw.call("_grouped_gemm", dh, self.w1, offsets, True, False)
        dx = raw.call("_combine", drows, row_of, None)
        args = (dh, offsets, False, *seen, True, False)
        raw.call("_grouped_gemm_wgrad_", self.main[0], self.x, *args)
        return [counts, offsets, row_of, token_of, slot_of, y, out, dh, dweights, drows, dx]


def in_turn() -> list[Tensor]:
    layer = Layer()
    with settings(gather=False), emulated.emulated_cuda(capability=90):
        return layer.launch() + layer.main


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return in_turn()


@pytest.mark.parametrize(
    "how, gather",
    [*((how, False) for how in MODES), *((how, True) for how in MODES[1:3])],
    ids=lambda value: str(value),
)
def test_a_layer_in_a_chain_has_its_bits(how, gather, expected):
    layer, order = Layer(), {"chain": True, "route_at_once": True}
    with settings(gather=gather, **order), emulated_devices(**how) as devices:
        with devices.on(0):
            found = layer.launch() + layer.main
        names = devices.emulator.launches
        assert all("chained" in name or "route_at_once" in name for name in names), names
        stats = devices.run()
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"result {i} has other bits"
    assert len(stats) == len(names) == (11 if gather else 13)
    if "resident" not in how:
        assert all(s.early > 0 for s in stats[1:]), "a launch began when all ahead had ended"


def products(**how) -> list[ptx.Stats]:
    """Of rows that a launch has routed: two products in a row, the second of the first's rows."""
    ids, rows, w = random_ids(35, 2, 2), randn(BF16, 70, 24), randn(BF16, 2, 24, 24, seed=1)
    with settings(chain=True, route_at_once=True), emulated_devices(**how) as devices:
        with devices.on(0):
            raw = emulated.device()
            offsets = raw.call("_route", ids, 2, None, -1, 1)[1]
            once = raw.call("_grouped_gemm", rows, w, offsets, False, False)
            raw.call("_grouped_gemm", once, w, offsets, True, False)
        return devices.run()


@pytest.mark.parametrize("name", planted.CHAINS)
def test_planted_bugs_of_a_chain_are_caught(name, monkeypatch, tmp_path):
    emulated.chain_as(monkeypatch, name, tmp_path)
    for how in MODES[:4]:
        with pytest.raises((ptx.GlobalRace, ptx.ProxyFenceMissing, ptx.UninitializedRead)):
            products(**how)


def test_products_of_other_types_run_in_turn_beside_a_chain():
    """fp16 has no chained products: between chained launches they begin when those have ended."""
    rows, token_of = randn(torch.float16, 9, 24), torch.arange(9, dtype=torch.int32)
    w, offsets = randn(torch.float16, 1, 24, 24, seed=1), offsets_of(9)
    with settings(chain=True), emulated_devices() as devices:
        with devices.on(0):
            raw = emulated.device()
            moved = raw.call("_permute", rows, token_of)
            raw.call("_grouped_gemm", moved, w, offsets, False, False)
        assert ["chained" in name for name in devices.emulator.launches] == [True, False]
        assert [s.early for s in devices.run()] == [0, 0]


# ---- the launch that routes alone
ROUTES = {
    "one_block": (40, 5, 2, {}),
    "blocks": (2700, 16, 4, {"alignment": 16}),
    "experts": (40, 600, 8, {"alignment": 4}),
    "capacity": (500, 7, 2, {"capacity": 60, "alignment": 8}),
    "one_token": (1, 1, 1, {}),
    "no_token": (0, 3, 2, {"alignment": 4}),
}


@pytest.mark.parametrize("schedule", [None, 1])
@pytest.mark.parametrize("name", ROUTES)
def test_one_launch_routes_as_four_do(name, schedule):
    tokens, experts, top_k, options = ROUTES[name]
    ids = random_ids(tokens, experts, top_k)
    if tokens > 3:
        ids[3, 0], ids[-1, -1] = -1, experts + 5  # dropped
    wanted = reference.route(ids, experts, **options)
    with settings(route_at_once=True), emulated.emulated_cuda(schedule, 90) as device:
        found = ops.route(ids, experts, **options)
        assert len(device.launches) == 1 and "route_at_once" in device.launches[0]
    for field, a, b in zip(wanted._fields, found, wanted):
        assert torch.equal(a, b), field


@pytest.mark.parametrize("name", planted.ROUTES)
def test_planted_bugs_of_a_route_are_caught(name, monkeypatch, tmp_path):
    emulated.route_as(monkeypatch, name, tmp_path)
    ids = random_ids(2100, 5, 2)
    for schedule in (None, 1):
        with settings(route_at_once=True), emulated.emulated_cuda(schedule, 90):
            with pytest.raises((ptx.GlobalRace, ptx.SharedRace, ptx.UninitializedRead)):
                ops.route(ids, 5)


def test_what_one_launch_cannot_route_takes_more():
    """Drops by weight, more experts than counters have room for, other devices."""
    weights = randn(F32, 20, 1)
    by_weight = {"weights": weights, "capacity": 4, "drop": "weight"}
    for experts, options, capability in ((2, by_weight, 90), (1025, {}, 90), (2, {}, 80)):
        ids = random_ids(20, experts, 1)
        with settings(route_at_once=True), emulated.emulated_cuda(capability=capability) as device:
            found = ops.route(ids, experts, **options)
            assert len(device.launches) >= 4
        for a, b in zip(found, reference.route(ids, experts, **options)):
            assert torch.equal(a, b)
