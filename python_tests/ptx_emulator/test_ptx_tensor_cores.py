"""Tensor-core kernels in the emulator: sm_80 (cp.async, mma.sync) and sm_90a (TMA, wgmma)."""

from pathlib import Path

import numpy as np
import pytest

import ptx_emulator as ptx
from ptx_emulator.types import bf16_to_f32, f32_to_bf16

pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
KERNELS = Path(__file__).parent / "kernels"
# (schedule, lazy): as issued, as late as may be, and in other orders
MODES = [(None, False), (None, True), (0, False), (1, True), (2, True)]
SHARED = 3 * (128 + 64) * 64 * 2 + 1024


def bf16(*shape: int) -> np.ndarray:
    values = np.random.default_rng(shape[-1]).standard_normal(shape).astype(np.float32)
    return f32_to_bf16(values)


@pytest.fixture(scope="module")
def sm80():
    return ptx.load(KERNELS / "mma_gemm.cu", arch="80")


@pytest.fixture(scope="module")
def sm90():
    return ptx.load(KERNELS / "wgmma_gemm.cu", arch="90a")


# ---- sm_80
@pytest.mark.parametrize("schedule, lazy", MODES)
def test_mma_gemm(sm80, schedule, lazy):
    M, N, K = 100, 72, 128
    a, b, c = bf16(M, K), bf16(N, K), np.zeros((M, N), np.float32)
    args = [a, b, ptx.Uninitialized(c), M, N, K]
    sm80.launch("gemm", (2, 2), 128, args, schedule=schedule, lazy=lazy)
    np.testing.assert_allclose(c, bf16_to_f32(a) @ bf16_to_f32(b).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize(
    "name, errors",
    [
        ("gemm_without_wait", ptx.AsyncHazard),
        # without the barrier the next copies may hit what another warp still reads
        ("gemm_without_barrier", (ptx.SharedRace, ptx.AsyncHazard)),
    ],
)
def test_planted_copy_bugs(sm80, schedule, lazy, name, errors):
    a, b, c = bf16(64, 128), bf16(64, 128), np.zeros((64, 64), np.float32)
    with pytest.raises(errors, match=name):
        sm80.launch(name, 1, 128, [a, b, c, 64, 64, 128], schedule=schedule, lazy=lazy)


def test_unwaited_copies_give_wrong_values_when_lazy(sm80):
    a, b, c = bf16(64, 128), bf16(64, 128), np.zeros((64, 64), np.float32)
    args = [a, b, c, 64, 64, 128]
    reference = bf16_to_f32(a) @ bf16_to_f32(b).T
    sm80.launch("gemm_without_wait", 1, 128, args, races=False)
    np.testing.assert_allclose(c, reference, atol=1e-4)
    sm80.launch("gemm_without_wait", 1, 128, args, races=False, lazy=True)
    assert not np.allclose(c, reference, atol=1e-4)


def test_ldmatrix_transposes(sm80):
    x, y = np.arange(256, dtype=np.uint16).reshape(16, 16), np.zeros((16, 16), np.uint16)
    sm80.launch("transpose_tile", 1, 32, [x, y.view(np.uint32)])
    np.testing.assert_array_equal(y, x.T)


# ---- sm_90a
def grouped(module, name, counts, N=128, K=192, grid=2, **options):
    """Launch a grouped GEMM -> (result, reference), both [rows, N]."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    E, R = len(counts), int(offsets[-1])
    rows, weights = bf16(R, K), bf16(E, N, K)
    out = np.zeros((R, N), np.uint16)
    args = [
        ptx.TensorMap(rows, (128, 64)),
        ptx.TensorMap(weights, (1, 64, 64)),
        offsets,
        ptx.Uninitialized(out),
        E,
        N,
        K,
    ]
    module.launch(name, grid, 384, args, SHARED, **options)
    reference = [
        bf16_to_f32(rows[a:b]) @ bf16_to_f32(w).T for a, b, w in zip(offsets, offsets[1:], weights)
    ]
    return bf16_to_f32(out), np.concatenate(reference)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_grouped_gemm(sm90, schedule, lazy):
    for counts in ([130, 0, 70], [1], [0, 0, 5]):
        result, reference = grouped(sm90, "grouped_gemm", counts, schedule=schedule, lazy=lazy)
        np.testing.assert_allclose(result, reference, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize(
    "name, errors, words",
    [
        ("stage_freed_early", ptx.AsyncHazard, "wgmma"),
        ("wrong_stride", ptx.DescriptorError, "overlap"),
        ("wrong_swizzle", ptx.DescriptorError, "64 bytes reads what TMA wrote with one of 128"),
        ("no_last_wait", ptx.AsyncHazard, "wgmma"),
        ("too_many_bytes", ptx.Deadlock, "16 bytes that no copy brings"),
        # the phase ends before the second copy: seen at its end, or by whoever reads too early
        ("too_few_bytes", (ptx.MBarrierError, ptx.UninitializedRead), "too few|wgmma"),
        ("no_full_wait", (ptx.AsyncHazard, ptx.UninitializedRead), "wgmma"),
        # the producer overruns the consumers, or its own announcement of the stage's last round
        ("no_empty_wait", (ptx.AsyncHazard, ptx.MBarrierError), "asynchronous|expects 0 more"),
        # the other consumer still reads, or arrives once more than the barrier expects
        ("one_consumer_frees", (ptx.AsyncHazard, ptx.MBarrierError), "wgmma|2 arrivals"),
        ("shared_accumulators", ptx.AsyncHazard, "touched while"),
    ],
)
def test_planted_pipeline_bugs(sm90, schedule, lazy, name, errors, words):
    with pytest.raises(errors, match=words) as info:
        grouped(sm90, name, [100], K=512, schedule=schedule, lazy=lazy)
    assert name in str(info.value)


def test_a_stage_freed_early_gives_wrong_values_in_a_perturbed_schedule(sm90):
    """What the tracking proves in any order, the numbers show in some."""
    wrong = 0
    for schedule in (None, *range(4)):
        result, reference = grouped(
            sm90, "stage_freed_early", [100], K=512, schedule=schedule, lazy=True, races=False
        )
        wrong += not np.allclose(result, reference, rtol=2**-7, atol=1e-2)
    assert wrong


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_transposed_operands_and_tensor_store(sm90, schedule, lazy):
    a, b, c = bf16(192, 64), bf16(192, 64), np.zeros((64, 64), np.uint16)
    maps = [ptx.TensorMap(x, (64, 64)) for x in (a, b, c)]
    sm90.launch("transposed_gemm", 1, 128, [*maps, 192], SHARED, schedule=schedule, lazy=lazy)
    reference = bf16_to_f32(a).T @ bf16_to_f32(b)
    np.testing.assert_allclose(bf16_to_f32(c), reference, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize(
    "name, error",
    [
        ("no_proxy_fence", ptx.ProxyFenceMissing),
        ("no_store_wait", ptx.AsyncHazard),
        ("no_barrier_before_store", (ptx.SharedRace, ptx.UninitializedRead)),
    ],
)
def test_planted_store_bugs(sm90, schedule, lazy, name, error):
    maps = [ptx.TensorMap(bf16(64, 64), (64, 64)) for _ in range(3)]
    with pytest.raises(error, match=name):
        sm90.launch(name, 1, 128, [*maps, 64], SHARED, schedule=schedule, lazy=lazy)


def test_events_tell_what_takes_time(sm90):
    """Loads and the store by their bytes, products by their columns, of each block of the grid."""
    maps = [ptx.TensorMap(x, (64, 64)) for x in (bf16(192, 64), bf16(192, 64), bf16(64, 64))]
    events = []
    sm90.launch("transposed_gemm", 2, 128, [*maps, 192], SHARED, races=False, events=events)
    for block in range(2):
        of = [e for e in events if e.block == block]
        sizes = {kind: [e.size for e in of if e.kind == kind] for kind in ("load", "product")}
        assert sizes == {"load": [8192] * 2 * 3, "product": [64] * 4 * 3}
        assert sum(e.size for e in of if e.kind == "store") == 8192
        arrived = {e.at for e in of if e.kind == "arrive"}
        assert (
            arrived
            == {e.at for e in of if e.kind == "wait"}
            == {e.at for e in of if e.kind == "load"}
        )


# ---- bulk reductions
@pytest.fixture(scope="module")
def sums():
    return ptx.load(KERNELS / "bulk_sums.cu", arch="90a")


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_bulk_reductions_add_tiles(sums, schedule, lazy):
    """Onto what is there; rows past the array are left out."""
    begin = np.arange(20 * 32, dtype=np.float32).reshape(20, 32)
    total, first = begin.copy(), np.array([0, 16], np.int32)
    maps = ptx.TensorMap(total, (8, 32))
    sums.launch("add_tiles", 2, 32, [maps, first], schedule=schedule, lazy=lazy)
    tile = np.arange(1, 8 * 32 + 1, dtype=np.float32).reshape(8, 32)
    begin[:8] += tile
    begin[16:] += tile[:4] + 1000
    np.testing.assert_array_equal(total, begin)


def test_bulk_reductions_take_subnormal_numbers_for_zero(sums):
    small = np.float32(1e-40)
    total = np.full((8, 32), small)
    total[0, 0], total[0, 1] = -small, -1 - np.float32(2**-23)  # the tile's first are 1 and 2
    sums.launch("add_tiles", 1, 32, [ptx.TensorMap(total, (8, 32)), np.zeros(1, np.int32)])
    assert total[0, 0] == 1 and total[7, 31] == 256


def test_bulk_reductions_of_one_place_in_no_order_are_a_race(sums):
    for schedule, lazy in MODES:
        maps = ptx.TensorMap(np.zeros((16, 32), np.float32), (8, 32))
        with pytest.raises(ptx.GlobalRace):
            sums.launch(
                "add_tiles", 2, 32, [maps, np.array([0, 4], np.int32)], schedule=schedule, lazy=lazy
            )


def add_to_each(sums, totals, waits: bool, **how) -> None:
    """By tensor maps that lie in a struct."""
    maps = {128 + 128 * i: ptx.TensorMap(total, (8, 32)) for i, total in enumerate(totals)}
    struct = len(totals).to_bytes(128, "little") + bytes(256)
    sums.launch("add_to_each", 1, 32, [ptx.Packed(struct, [], maps), int(waits)], **how)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_bulk_reductions_of_one_thread_are_ordered_by_waits_alone(sums, schedule, lazy):
    how, tile = {"schedule": schedule, "lazy": lazy}, np.arange(1.0, 257).reshape(8, 32)
    one, other = (np.zeros((8, 32), np.float32) for _ in range(2))
    add_to_each(sums, [one, one], True, **how)
    add_to_each(sums, [other, one], False, **how)
    assert (one == 3 * tile).all() and (other == tile).all()
    with pytest.raises(ptx.GlobalRace, match="of thread 0 is on its way there"):
        add_to_each(sums, [one, one], False, **how)


def test_bulk_reductions_of_other_types_are_refused(sums):
    maps = ptx.TensorMap(np.zeros((16, 64), np.uint16), (8, 64))
    with pytest.raises(ptx.Unsupported, match="items of 2 bytes"):
        sums.launch("add_tiles", 1, 32, [maps, np.zeros(1, np.int32)])


# ---- tensor maps
def test_swizzles_and_edges():
    """A tile lands at the addresses of the CUDA guide's swizzle, zeros beyond the edges."""
    for span, inner in ((128, 64), (64, 32), (32, 16), (0, 64)):
        array = np.arange(100 * 72, dtype=np.uint16).reshape(100, 72)
        tile = ptx.TensorMap(array, (16, inner), span).at(ptx.machine.GLOBAL_BASE)
        chunk, offsets, inside = tile.cut([48, 90])
        memory = np.full(4096, 0xEE, np.uint16)
        places = ptx.tensor_map.swizzle(np.arange(0, tile.tile_bytes, chunk), span)
        flat = np.concatenate([array.reshape(-1), np.zeros(4096, np.uint16)])
        for place, offset, good in zip(places, offsets, inside):
            part = flat[offset // 2 : (offset + chunk) // 2]
            memory[place // 2 : (place + chunk) // 2] = part if good else 0
        for r in range(16):
            for c in range(inner):
                address = (r * inner + c) * 2
                phase = {128: address >> 7 & 7, 64: address >> 7 & 3, 32: address >> 7 & 1, 0: 0}
                address ^= phase[span] << 4
                exists = 90 + r < 100 and 48 + c < 72
                assert memory[address // 2] == (array[90 + r, 48 + c] if exists else 0)


@pytest.mark.parametrize(
    "box, span, words",
    [
        ((8, 128), 128, "more than the swizzle span"),
        ((8, 4), 128, "no multiple of 16"),
        ((300, 64), 128, "not in 1..256"),
        ((8, 32), 100, "none of 0, 32, 64, 128"),
        ((64,), 128, "another rank"),
    ],
)
def test_tensor_maps_that_the_driver_would_refuse(box, span, words):
    with pytest.raises(ptx.DescriptorError, match=words):
        ptx.TensorMap(np.zeros((64, 128), np.uint16), box, span)
