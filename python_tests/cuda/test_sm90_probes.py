"""Beside the Hopper products: settings that change no bit, the watchdog's words, the trace."""

from __future__ import annotations

import re

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops, reference
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.contract import evaluate, spec_of
from python_tests.support.hopper import PRODUCT, hopper, skip_if, why_not_emulated
from python_tests.support.products import ffn, offsets_of, product
from python_tests.support.spec import randn

pytestmark = skip_if(why_not_emulated())

BF16 = torch.bfloat16
RING_AND_STAGING = {  # shared bytes by columns of a tile, without the stages
    columns: 8 * 4096 + 2 * 8 * 8 + 2 * (3 + 2) * 4 for columns in (128, 256)
}


@pytest.fixture
def probes():
    """The emulated library's own ops, all as they were afterwards."""
    emulated.device()
    found = torch.ops.moekernels_emulated
    yield found
    found._sm90_settings()
    found._sm90_watchdog(0.0)
    found._sm90_trace(torch.zeros(1), 0, 0, 0)


def calls():
    """A narrow product, a wide one and two gradients, over several bands and blocks; the launches'
    shapes beside the results."""
    rows, drows = randn(BF16, 270, 72), randn(BF16, 270, 136, seed=2)
    offsets, w = offsets_of(260, 0, 10), randn(BF16, 3, 136, 72, seed=1)
    with hopper() as device:
        y = ops.grouped_gemm(rows, w, offsets)
        narrow = ops.grouped_gemm(rows, w[:, :40].contiguous(), offsets)
        dw = ops.grouped_gemm_wgrad(rows, drows, offsets)
        total = torch.ones(3, 136, 72)
        ops.grouped_gemm_wgrad(rows, drows, offsets, out=total)
        shapes = list(device.shapes)
    return [y, narrow, dw, total], shapes


SETTINGS = [
    {"stages": 2},
    {"stages": 3, "band": 1, "grid": 1, "promotion": 64, "prefetch": False},
    {"band": -3, "grid": 3, "promotion": 128, "bulk_sums": False},
]


def test_settings_reach_the_launch_and_change_no_bit(probes):
    plain, shapes = calls()
    ring = [4 * (128 + 256) * 128, 6 * (128 + 128) * 128, 4 * (128 + 256) * 128]
    for shape, stages in zip(shapes, [*ring, ring[0]], strict=True):
        assert shape["shared"] == stages + RING_AND_STAGING[256]
        assert shape["blocks"] in (3, 4)  # 4: the device's multiprocessors
        assert shape["promotions"][:2] == [256, 256]
    for settings in SETTINGS:
        probes._sm90_settings(**settings)
        results, shapes = calls()
        for a, b in zip(plain, results, strict=True):
            assert torch.equal(a, b), settings
        for shape, columns in zip(shapes, [256, 128, 256, 256], strict=True):
            if "stages" in settings:
                stage = (128 + columns) * 128
                assert shape["shared"] == settings["stages"] * stage + RING_AND_STAGING[256]
            if "grid" in settings:
                assert shape["blocks"] <= settings["grid"]
            assert shape["promotions"][:2] == [settings.get("promotion", 256)] * 2


LOADER, PREFETCHER = 8, 9  # the producer's first two warps


@pytest.mark.parametrize("prefetch", [True, False])
def test_what_epilogues_read_is_prefetched_by_another_warp_than_loads(probes, prefetch):
    """Each lane of a prefetch takes its turn, thousands of cycles a tile: in the loads' warp they
    would begin the tile so much later."""
    probes._sm90_settings(prefetch=prefetch)
    rows, drows, offsets = randn(BF16, 70, 16), randn(BF16, 70, 24), offsets_of(70)
    with hopper() as device:
        evaluate(ops.experts, spec_of("experts"), ffn(BF16, 72, 136, 13, 3, 2))
        ops.grouped_gemm_wgrad(rows, drows, offsets, out=torch.zeros(1, 24, 16))
        issued = [shape["bulk_warps"] for shape in device.shapes]
    found = [(name, warps) for name, warps in zip(device.launches, issued) if PRODUCT.search(name)]
    assert {LOADER} == set.union(*(warps["load"] for _, warps in found))
    prefetchers = [warps["prefetch"] for _, warps in found if "prefetch" in warps]
    assert prefetchers == ([{PREFETCHER}] * 2 if prefetch else [])  # h, and the sums in fp32


@pytest.mark.parametrize("experts, stages", [(366, 4), (367, 3)])
def test_the_last_number_of_experts_with_four_stages(experts, stages):
    """Two numbers an expert lie beside the ring, in the 227 KiB that a block may have."""
    counts = [0] * experts
    counts[1], counts[-1] = 2, 1
    with hopper() as device:
        inputs = product(BF16, 8, 136, *counts)
        y = ops.grouped_gemm(**inputs)
        (shape,) = device.shapes
    room = 227 * 1024 - (8 * 4096 + 2 * 8 * 8 + 2 * (experts + 2) * 4)
    assert room // ((128 + 256) * 128) == stages
    assert shape["shared"] == 227 * 1024 - room + stages * (128 + 256) * 128
    torch.testing.assert_close(y, reference.grouped_gemm(**inputs), rtol=2**-7, atol=1e-2)


def test_stages_that_do_not_fit_are_refused(probes):
    probes._sm90_settings(stages=5)
    with pytest.raises(RuntimeError, match="room for 4 stages of a tile of 256 columns with 3 exp"):
        calls()


@pytest.mark.parametrize("library", ["moekernels", "moekernels_emulated"])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stages": 1}, "stages must be 0 (the table's) or 2 to 8, got 1"),
        ({"band": 65}, "band must be -64 to 64 (0: the default), got 65"),
        ({"grid": -1}, "grid must be 0 (the multiprocessors) to 1024, got -1"),
        ({"promotion": 32}, "promotion must be 0 (the default), 64, 128 or 256 bytes, got 32"),
    ],
)
def test_settings_out_of_range(probes, library, settings, message):
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops, library)._sm90_settings(**settings)
    assert str(error.value) == f"sm90_settings: {message}"


def test_the_ordinary_library_neither_watches_nor_traces():
    if raw._sm90_build() != "plain":
        pytest.skip("another build is loaded")
    with pytest.raises(RuntimeError, match="no watchdog .plain.; load _C_watch.so"):
        raw._sm90_watchdog(1.0)
    with pytest.raises(RuntimeError, match="record no trace .plain.; load _C_trace.so"):
        raw._sm90_trace(torch.zeros(1), 1, 1, 1)
    assert raw._sm90_stuck() == ""


# ---- watchdog
def watched(monkeypatch, probes, seconds: float, bug: str = "none"):
    emulated.products_as(monkeypatch, "MOEKERNELS_WATCHDOG=1", bug=bug)
    probes._sm90_watchdog(seconds)


def test_the_watchdog_says_which_wait_did_not_end(monkeypatch, probes):
    """A deadlock for every other build; the emulator's clock counts steps."""
    watched(monkeypatch, probes, 2e-9, "wrong_bytes")
    with pytest.raises(ptx.Trap), hopper():
        ops.grouped_gemm(**product(BF16, 640, 72, 100))
    lines = probes._sm90_stuck().splitlines()
    consumer = r"consumer \d \(warp \d\) waits for full\[0\], phase 0, step 0"
    producer = r"producer \(warp 8\) waits for empty\[0\], phase 0, step 6"
    first = rf"watchdog: block 0, ({consumer}|{producer}) of a tile of group 0"
    assert re.fullmatch(first, lines[0]), lines
    assert any("bytes that never came" in line for line in lines)


def test_the_watchdog_leaves_what_ends_alone(monkeypatch, probes):
    inputs = product(BF16, 640, 72, 100)
    with hopper():
        plain = ops.grouped_gemm(**inputs)
        watched(monkeypatch, probes, 10.0)
        assert torch.equal(ops.grouped_gemm(**inputs), plain)


# ---- trace
def test_the_trace_has_every_tile_once(monkeypatch, probes):
    inputs = product(BF16, 200, 72, 150, 0, 90, 70)
    with hopper():
        plain = ops.grouped_gemm(**inputs)
    emulated.products_as(monkeypatch, "MOEKERNELS_TRACE=1")
    probes._sm90_settings(grid=2)
    records = probes._sm90_trace(torch.zeros(1), 2, 2, 3)
    with hopper() as device:
        device.know(records, lasts=True)
        for _ in range(3):  # the third has no room left
            assert torch.equal(ops.grouped_gemm(**inputs), plain)
    device.lasting.pop(records.data_ptr())
    timer, begin, sums_done, end, waited, sm, steps, group, row, column = records.unbind(-1)
    written = timer > 0
    assert records.shape == (2, 2, 3, 3, 10)
    # Tiles at rows 0 and 128 of 150, at 150 of 90, at 240 of 70: two for each block.
    assert written.sum(-1).tolist() == [[[2, 2, 2]] * 2] * 2
    for launch in range(2):
        for role in range(3):
            tiles = {tuple(t) for t in records[launch, :, role, :2, 7:].reshape(-1, 3).tolist()}
            assert tiles == {(0, 0, 0), (0, 128, 0), (2, 150, 0), (3, 240, 0)}
    assert (steps[written] == 4).all()
    assert (sm[written] == torch.arange(2)[None, :, None, None].expand(sm.shape)[written]).all()
    assert ((begin < sums_done) & (sums_done <= end) & (end - begin > waited))[written].all()
    assert (waited[..., :2, :][written[..., :2, :]] > 0).any()
