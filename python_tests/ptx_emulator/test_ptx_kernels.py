"""Kernels from nvcc in the emulator: right ones agree with numpy, planted bugs have names."""

from pathlib import Path

import numpy as np
import pytest

import ptx_emulator as ptx
from ptx_emulator.types import bf16_to_f32, f32_to_bf16

pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
KERNELS = Path(__file__).parent / "kernels"
SCHEDULES = [None, 0, 1, 2]


@pytest.fixture(scope="module")
def simt():
    return ptx.load(KERNELS / "simt.cu")


@pytest.fixture(scope="module")
def planted():
    return ptx.load(KERNELS / "planted.cu", arch="90a")


def ints(n: int, high: int = 1000) -> np.ndarray:
    return np.random.default_rng(n).integers(0, high, n).astype(np.int32)


# ---- right kernels
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("E", [256, 70])
def test_top_k(simt, schedule, E):
    T, K = 45, 6
    logits = np.random.default_rng(E).standard_normal((T, E)).astype(np.float32)
    logits[3] = 0.5  # ties: the smaller id wins
    weights, ids = np.zeros((T, K), np.float32), np.zeros((T, K), np.int32)
    simt.launch("top_k", 12, 128, [logits, weights, ids, T, E, K], schedule=schedule)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(weights, np.take_along_axis(scores, expected, 1), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("experts", [1, 5, 256])
def test_counting_sort(simt, schedule, experts):
    ids = ints(700, experts)
    offsets, row_of = np.zeros(257, np.int32), np.full(700, -1, np.int32)
    simt.launch("counting_sort", 1, 256, [ids, 700, offsets, row_of], schedule=schedule)
    order = np.argsort(ids, kind="stable")
    expected = np.empty(700, np.int32)
    expected[order] = np.arange(700)
    np.testing.assert_array_equal(row_of, expected)
    np.testing.assert_array_equal(offsets[1:], np.cumsum(np.bincount(ids, minlength=256)))


def test_combine(simt):
    T, K, H = 9, 3, 200
    rng = np.random.default_rng(0)
    rows = f32_to_bf16(rng.standard_normal((T * K, H)).astype(np.float32))
    row_of = rng.permutation(T * K).reshape(T, K).astype(np.int32)
    row_of[2, 1] = -1
    weights = rng.random((T, K)).astype(np.float32)
    y = np.zeros((T, H), np.uint16)
    simt.launch("combine", T, 32, [rows, row_of, weights, ptx.Uninitialized(y), H, K])
    picked = bf16_to_f32(rows)[row_of] * (weights * (row_of >= 0))[:, :, None]
    np.testing.assert_allclose(bf16_to_f32(y), picked.sum(1), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_local_memory_and_barrier_reductions(simt, schedule):
    x = ints(96, 12)
    y = np.zeros(96, np.int32)
    simt.launch("votes", 1, 96, [x, y], schedule=schedule)
    block = 1000 * (x & 1).sum() + 100000 * (x == 7).any() + 1000000
    np.testing.assert_array_equal(y, x + (x & 7) ** 2 + block)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "name, expected",
    [
        ("reverse", lambda x: x[::-1]),
        ("swap_neighbours", lambda x: x.reshape(-1, 2)[:, ::-1].reshape(-1)),
        ("rotate_twice", lambda x: np.roll(x, -64)),
    ],
)
def test_exchange_through_shared_memory(planted, schedule, name, expected):
    x, y = ints(256), np.zeros(256, np.int32)
    planted.launch(name, 1, 256, [x, y], schedule=schedule)
    np.testing.assert_array_equal(y, expected(x))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["histogram", "shared_histogram"])
def test_histogram(planted, schedule, name):
    x, counts = ints(512, 8), np.zeros(8, np.int32)
    planted.launch(name, 4, 128, [x, counts], schedule=schedule)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_last_block_sums(planted, schedule):
    x, partial, y = ints(20), np.zeros(20, np.int32), np.zeros(1, np.int32)
    planted.launch("grid_sum", 20, 64, [x, partial, np.zeros(1, "u4"), y], schedule=schedule)
    assert y[0] == x.sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_barriers_and_mbarriers(planted, schedule):
    x, y = ints(64), np.zeros(64, np.int32)
    planted.launch("named_barriers", 3, 128, [x, y, 128], schedule=schedule, races=False)
    np.testing.assert_array_equal(y, x[::-1])
    planted.launch("named_barriers", 1, 128, [x, y, 128], schedule=schedule)
    planted.launch("wait_for_arrivals", 1, 64, [y, 64, 64], schedule=schedule)
    np.testing.assert_array_equal(y, (np.arange(64) + 32) % 64)


# ---- planted bugs
def caught(planted, error, name, grid, block, args, *words: str, **options) -> None:
    """The launch raises `error`, and its message names the kernel, a thread and these words."""
    with pytest.raises(error) as info:
        planted.launch(name, grid, block, args, **options)
    for word in (name, *words):
        assert word in str(info.value), str(info.value)


X = ints(256)
Y = np.zeros(256, np.int32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "name",
    [
        "reverse_without_syncthreads",
        "swap_without_syncwarp",
        "rotate_without_second_barrier",
        "shared_histogram_without_atomics",
    ],
)
def test_missing_synchronisation(planted, schedule, name):
    # In another order the reader may come first, and finds that nobody has written yet.
    errors = ptx.SharedRace if schedule is None else (ptx.SharedRace, ptx.UninitializedRead)
    args = [X % 8, Y]
    caught(planted, errors, name, 1, 256, args, "thread", "byte", schedule=schedule)


def test_out_of_bounds(planted):
    y = np.zeros(64, np.int32)
    planted.launch("shared_index", 1, 64, [y, 0])
    args = [y, 1]
    caught(planted, ptx.OutOfBounds, "shared_index", 1, 64, args, "thread 63", "shared write")
    x = np.arange(64, dtype=np.int32)
    for shift, byte in ((1, "byte 256 of argument 0"), (-64, "far from any array")):
        args = [x, y, shift]
        caught(planted, ptx.OutOfBounds, "global_index", 1, 64, args, "global read", byte)
    caught(planted, ptx.OutOfBounds, "global_index", 1, 64, [None, y, 0], "a null pointer")
    caught(planted, ptx.OutOfBounds, "global_index", 1, 64, [x, y[:60], 0], "write", "thread 60")


def test_messages_name_the_source_line(planted):
    source = (KERNELS / "planted.cu").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "x[threadIdx.x + shift]" in text)
    args = [np.zeros(64, np.int32), np.zeros(64, np.int32), 1]
    caught(planted, ptx.OutOfBounds, "global_index", 1, 64, args, f"(planted.cu:{line})")


def test_misaligned(planted):
    x, y = np.arange(68, dtype=np.float32), np.zeros(16, np.float32)
    planted.launch("vector_load", 1, 16, [x, y, 4])
    np.testing.assert_array_equal(y, x[4:].reshape(16, 4).sum(1))
    args = [x, y, 1]
    caught(planted, ptx.Misaligned, "vector_load", 1, 16, args, "16 bytes", "byte 4 of argument 0")
    args = [x[1:], y, 0]  # the array itself starts 4 bytes off
    caught(planted, ptx.Misaligned, "vector_load", 1, 16, args, "16 bytes")


def test_wrong_masks(planted):
    x, y = ints(32), np.zeros(32, np.int32)
    planted.launch("warp_sum", 1, 32, [x, y, 0xFFFFFFFF, 32])
    assert (y == x.sum()).all()
    for mask, lanes, words in (
        (0x0000FFFF, 32, "leaves out the calling lane"),
        (0x0000FFFF, 16, "reads lane 16, which its mask leaves out"),
        (0xFFFFFFFF, 16, "names lane 16, which has exited"),
    ):
        caught(planted, ptx.MaskError, "warp_sum", 1, 32, [x, y, mask, lanes], words)
    args = [x, y, 0xFFFFFFFF, 20]
    caught(planted, ptx.MaskError, "warp_sum", 1, 20, args, "lane 20, which does not exist")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_divergent_barrier(planted, schedule):
    planted.launch("barrier_for_some", 1, 64, [Y, 64], schedule=schedule)
    planted.launch("barrier_for_some", 1, 64, [Y, 32], schedule=schedule)  # whole warps may leave
    caught(
        planted,
        ptx.DivergentBarrier,
        "barrier_for_some",
        1,
        64,
        [Y, 16],
        "only 16 of the warp's 32 threads",
        schedule=schedule,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid, block", [(1, 256), (8, 32)])
def test_non_atomic_histogram(planted, schedule, grid, block):
    name, args = "histogram_without_atomics", [X % 8, np.zeros(8, np.int32)]
    caught(planted, ptx.GlobalRace, name, grid, block, args, "of argument 1", schedule=schedule)


def test_races_between_blocks(planted):
    y = np.zeros((4, 64), np.int32)
    planted.launch("write_rows", 4, 64, [y, 4])
    np.testing.assert_array_equal(y[:, 0], np.arange(4))
    caught(planted, ptx.GlobalRace, "write_rows", 4, 64, [y, 2], "block 0 thread 0")
    args = [X, np.zeros(20, np.int32), np.zeros(1, np.uint32), Y]
    caught(planted, ptx.GlobalRace, "grid_sum_without_ticket", 20, 64, args, "block")


def test_uninitialized_reads(planted):
    y = np.zeros(64, np.float32)
    planted.launch("uninitialized_shared", 1, 64, [Y, 64])
    args = [Y, 60]
    caught(planted, ptx.UninitializedRead, "uninitialized_shared", 1, 64, args, "thread 60")
    planted.launch("uninitialized_shared", 1, 64, [Y, 60], races=False)
    assert (Y[60:64].view(np.uint32) == 0xCDCDCDCD).all()
    planted.launch("accumulate", 1, 64, [np.ones(64, np.float32), y])
    args = [np.ones(64, np.float32), ptx.Uninitialized(y)]
    caught(planted, ptx.UninitializedRead, "accumulate", 1, 64, args, "byte 0 of argument 1")


@pytest.mark.parametrize("schedule", [None, 3])
def test_deadlocks_say_who_waits(planted, schedule):
    args = [Y, 64, 63]
    words = ("mbarrier", "missing 1 of 64 arrivals", "64 threads")
    if schedule is not None:
        words = words[:2]
    caught(planted, ptx.Deadlock, "wait_for_arrivals", 1, 64, args, *words, schedule=schedule)
    args = [X, Y, 256]
    words = ("64 threads at barrier 1", "bar.sync 1") if schedule is None else ("at barrier 1",)
    caught(planted, ptx.Deadlock, "named_barriers", 1, 128, args, *words, schedule=schedule)


def test_too_many_arrivals(planted):
    args = [Y, 32, 64]
    caught(planted, ptx.MBarrierError, "wait_for_arrivals", 1, 64, args, "expects 32 more of 32")


def test_endless_loops_and_traps(planted):
    flag = np.zeros(1, np.int32)
    caught(planted, ptx.NoProgress, "spin", 1, 32, [flag], "thread 0", max_steps=100_000)
    planted.launch("assert_positive", 1, 32, [np.ones(32, np.int32)])
    caught(planted, ptx.Trap, "assert_positive", 1, 32, [X * 0], "assert")


def test_launch_errors(planted):
    with pytest.raises(ptx.PtxError, match="takes 2 arguments, got 1"):
        planted.launch("reverse", 1, 256, [X])
    with pytest.raises(ptx.PtxError, match="2000 threads a block"):
        planted.launch("reverse", 1, 2000, [X, Y])
    with pytest.raises(ptx.PtxError, match="not contiguous"):
        planted.launch("reverse", 1, 128, [X[::2], Y])
    with pytest.raises(ptx.PtxError, match="kernels match 'histogram_'"):
        planted.kernel("histogram_")
    with pytest.raises(ptx.OutOfBounds, match="more than 232448 bytes"):
        planted.launch("reverse", 1, 256, [X, Y], shared_bytes=300_000)


def test_counts_instructions(simt):
    stats = simt.launch("votes", 1, 96, [ints(96, 12), np.zeros(96, np.int32)])
    assert stats.by_op["bar"] == 3 * 96
    assert stats.instructions == sum(stats.by_op.values())
