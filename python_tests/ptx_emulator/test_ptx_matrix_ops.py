"""Matrix instructions and bulk copies, one at a time, against layouts written out."""

from contextlib import nullcontext

import numpy as np
import pytest

import ptx_emulator as ptx
from ptx_emulator.types import bf16_to_f32, f32_to_bf16
from python_tests.support.ptx_ops import kernel

RANDOM = np.random.default_rng(11)


def as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Small integers and halves are exact in every type: float32 -> the type's bit patterns."""
    if kind == "bf16":
        return f32_to_bf16(values)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return values.astype(np.float32).view(np.uint32)


def matrix(*shape: int) -> np.ndarray:
    return (RANDOM.integers(-8, 9, shape) / 2).astype(np.float32)


def names(letter: str, count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%{letter}{first + i}" for i in range(count)) + "}"


# ---- mma.sync: element (row, column) of register i, half h, of the lane with group g, place p
def fragments(shape: str, kind: str):
    """-> functions (i, h, g, p) of A, B and the number of registers of each."""
    if kind == "tf32":

        def a(i, h, g, p):
            return g + 8 * (i % 2), p + 4 * (i // 2)

        def b(i, h, g, p):
            return p + 4 * i, g

        return a, b, {"m16n8k8": (4, 2), "m16n8k4": (2, 1)}[shape]

    def a(i, h, g, p):
        return g + 8 * (i % 2), 2 * p + h + 8 * (i // 2)

    def b(i, h, g, p):
        return 2 * p + h + 8 * i, g

    return a, b, {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}[shape]


@pytest.mark.parametrize(
    "shape, kind",
    [
        ("m16n8k16", "bf16"),
        ("m16n8k16", "f16"),
        ("m16n8k8", "bf16"),
        ("m16n8k8", "f16"),
        ("m16n8k8", "tf32"),
        ("m16n8k4", "tf32"),
    ],
)
def test_mma(shape, kind):
    k = int(shape.split("k")[1])
    a, b, c = matrix(16, k), matrix(k, 8), matrix(16, 8)
    a_at, b_at, (a_count, b_count) = fragments(shape, kind)
    halves = 1 if kind == "tf32" else 2
    registers = np.zeros((32, a_count + b_count), np.uint32)
    sums = np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, p = lane // 4, lane % 4
        for values, at, count, first in ((a, a_at, a_count, 0), (b, b_at, b_count, a_count)):
            bits = as_bits(values, kind)
            for i in range(count):
                for h in range(halves):
                    registers[lane, first + i] |= np.uint32(bits[at(i, h, g, p)]) << (16 * h)
        sums[lane] = [c[g + 8 * (i // 2), 2 * p + i % 2] for i in range(4)]
    width = 4 * (a_count + b_count)
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%rd10+{4 * i}];" for i in range(a_count + b_count))
    out = np.zeros((32, 4), np.float32)
    body = f"""mad.wide.u32 %rd10, %r0, {width}, %rd0; {loads}
        mad.wide.u32 %rd11, %r0, 16, %rd1; ld.global.v4.f32 {names("f", 4)}, [%rd11];
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {names("f", 4, 8)},
        {names("r", a_count, 10)}, {names("r", b_count, 10 + a_count)}, {names("f", 4)};
        mad.wide.u32 %rd12, %r0, 16, %rd2; st.global.v4.f32 [%rd12], {names("f", 4, 8)};"""
    kernel(body, 3).launch("k", 1, 32, [registers, sums, out])
    expected = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


# ---- wgmma
def shared_image(values: np.ndarray, kind: str, span: int, mn_major: bool):
    """[extent, K] in shared memory as a descriptor describes it -> (bytes, leading, stride).

    One product's worth of K (32 bytes), at offset 0.
    """
    bits = as_bits(values, kind)
    item = bits.itemsize
    extent, depth = bits.shape
    image = np.zeros(16384, np.uint8)
    if mn_major:
        groups = extent * item // (span or 16)
        if span:  # [k / 8][group of `span` bytes along M or N][8 k][span]
            leading, stride = 8 * span, 8 * span * groups
        else:  # core matrices of 8 k by 16 bytes
            leading, stride = 128 * groups, 128
    elif span:  # rows of `span` bytes, of which the first 32 are used
        leading, stride = 16, 8 * span
    else:
        leading, stride = 128, 256
    for m in range(extent):
        for k in range(depth):
            if mn_major and span:
                group, inside = divmod(m * item, span)
                address = group * leading + inside + k % 8 * span + k // 8 * stride
            elif mn_major:
                group, inside = divmod(m * item, 16)
                address = group * stride + inside + k % 8 * 16 + k // 8 * leading
            elif span:
                address = m // 8 * stride + m % 8 * span + k * item
            else:
                chunk, inside = divmod(k * item, 16)
                address = m // 8 * stride + m % 8 * 16 + chunk * leading + inside
            phase = {0: 0, 32: address >> 7 & 1, 64: address >> 7 & 3, 128: address >> 7 & 7}[span]
            address ^= phase << 4
            image[address : address + item] = np.frombuffer(bits[m, k].tobytes(), np.uint8)
    return image, leading, stride


def run_wgmma(a, b, kind, span, mn_major, from_registers, lazy) -> np.ndarray:
    """[64, K] times [N, K]^T, twice: the second product adds to the first."""
    n, k = len(b), a.shape[1]
    a_image, *a_strides = shared_image(a, kind, span, mn_major)
    b_image, *b_strides = shared_image(b, kind, span, mn_major)
    code = {0: 0, 128: 1, 64: 2, 32: 3}[span]

    def descriptor(start, leading, stride):
        return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62

    image = np.concatenate([a_image, b_image])
    count = n // 2
    d = names("f", count, 100)
    left, flags = "%rd20", ", 1, 1" if mn_major else ", 0, 0"
    if kind == "tf32":
        flags = ""
    a_registers = np.zeros((128, 4), np.uint32)
    if from_registers:
        left, flags = names("r", 4, 10), ", 0"
        bits = as_bits(a, kind)
        for t in range(128):
            row, p = t // 32 * 16 + t % 32 // 4, t % 4
            for i in range(4):
                for h in range(2):
                    word = np.uint32(bits[row + 8 * (i % 2), 2 * p + h + 8 * (i // 2)])
                    a_registers[t, i] |= word << (16 * h)
    out = np.zeros((128, count), np.float32)
    stores = "".join(f"st.global.f32 [%rd14+{4 * i}], %f{100 + i};" for i in range(count))
    product = f"""wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}
        {d}, {left}, %rd21, ADDS, 1, 1{flags};"""
    body = f"""mov.u64 %rd10, buffer; mov.u32 %r1, %r0;
    copy: mad.wide.u32 %rd11, %r1, 4, %rd0; mad.wide.u32 %rd12, %r1, 4, %rd10;
        ld.global.u32 %r2, [%rd11]; st.shared.u32 [%rd12], %r2;
        add.u32 %r1, %r1, 128; setp.lt.u32 %p1, %r1, {len(image) // 4}; @%p1 bra copy;
        fence.proxy.async.shared::cta; bar.sync 0;
        mad.wide.u32 %rd13, %r0, 16, %rd1; ld.global.v4.u32 {names("r", 4, 10)}, [%rd13];
        mov.u64 %rd20, {descriptor(0, *a_strides)}; mov.u64 %rd21, {descriptor(16384, *b_strides)};
        setp.ne.u32 %p2, 0, 0; setp.eq.u32 %p3, 0, 0;
        wgmma.fence.sync.aligned; {product.replace("ADDS", "%p2")}
        {product.replace("ADDS", "%p3")}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %rd14, %r0, {4 * count}, %rd2; {stores}"""
    registers = f".reg .f32 %f<{100 + count}>;"
    shared = ".shared .align 1024 .b8 buffer[32768];"
    module = kernel(body, 3, registers, shared)
    module.launch("k", 1, 128, [image, a_registers, out], lazy=lazy)
    result = np.zeros((64, n), np.float32)
    for t in range(128):
        for i in range(count):
            row = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2)
            result[row, i // 4 * 8 + t % 4 * 2 + i % 2] = out[t, i]
    return result


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "kind, n, mn_major, from_registers",
    [
        ("bf16", 64, False, False),
        ("f16", 8, False, False),
        ("tf32", 32, False, False),
        ("bf16", 128, True, False),
        ("f16", 64, True, False),
        ("bf16", 16, False, True),
    ],
)
def test_wgmma(kind, n, mn_major, from_registers, span):
    k = 8 if kind == "tf32" else 16
    a, b = matrix(64, k), matrix(n, k)
    result = run_wgmma(a, b, kind, span, mn_major, from_registers, lazy=span == 64)
    np.testing.assert_array_equal(result, 2 * a @ b.T)


# ---- stmatrix and bulk copies
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed):
    """Register i of lane l holds elements (l / 4, 2 (l % 4)) and the next of the 8x8 matrix i."""
    x = RANDOM.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    registers = np.ascontiguousarray(x.reshape(count, 32, 2).transpose(1, 0, 2)).view(np.uint32)
    out = np.zeros((count, 8, 8), np.uint16)
    trans = ".trans" if transposed else ""
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%rd10+{4 * i}];" for i in range(count))
    body = f"""mad.wide.u32 %rd10, %r0, {4 * count}, %rd0; {loads}
        mov.u32 %r1, buffer; rem.u32 %r2, %r0, {8 * count}; mad.lo.u32 %r1, %r2, 16, %r1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {names("r", count, 10)};
        bar.warp.sync -1; setp.lt.u32 %p1, %r0, {8 * count}; @!%p1 exit;
        mad.wide.u32 %rd11, %r0, 16, %rd1; ld.shared.v4.u32 {names("r", 4, 20)}, [%r1];
        st.global.v4.u32 [%rd11], {names("r", 4, 20)};"""
    shared = ".shared .align 16 .b8 buffer[512];"
    kernel(body, 2, shared=shared).launch("k", 1, 32, [registers, out])
    np.testing.assert_array_equal(out, x.transpose(0, 2, 1) if transposed else x)


BULK = """mov.u32 %r1, buffer; mov.u32 %r2, barrier; setp.ne.u32 %p1, %r0, 0; @%p1 bra ready;
        mbarrier.init.shared.b64 [%r2], 1;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2];
    ready: bar.sync 0;
    again: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra again;
        mad.lo.u32 %r3, %r0, 4, %r1; ld.shared.u32 %r4, [%r3]; add.u32 %r4, %r4, 1; {barrier}
        st.shared.u32 [%r3], %r4; {fence} bar.sync 0; @%p1 exit;
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], {size};
        cp.async.bulk.commit_group; {wait}"""
RIGHT = {
    "bytes": 256,
    "size": 256,
    "barrier": "",
    "fence": "fence.proxy.async;",
    "wait": "cp.async.bulk.wait_group.read 0;",
}


@pytest.mark.parametrize("schedule, lazy", [(None, False), (None, True), (1, False), (2, True)])
@pytest.mark.parametrize(
    "change, error",
    [
        ({}, None),
        ({"bytes": 240}, (ptx.MBarrierError, ptx.Deadlock)),
        ({"bytes": 272}, ptx.Deadlock),
        ({"size": 248}, ptx.DescriptorError),
        ({"size": 512}, ptx.OutOfBounds),
        ({"fence": ""}, ptx.ProxyFenceMissing),
        ({"wait": ""}, ptx.AsyncHazard),
    ],
)
def test_bulk_copies(change, error, schedule, lazy):
    x, y = RANDOM.integers(0, 1000, 64).astype(np.uint32), np.zeros(64, np.uint32)
    shared = ".shared .align 128 .b8 buffer[256]; .shared .align 8 .b64 barrier;"
    module = kernel(BULK.format(**(RIGHT | change)), 2, shared=shared)
    args = [x, ptx.Uninitialized(y)]
    if error is None:
        module.launch("k", 1, 64, args, schedule=schedule, lazy=lazy)
        np.testing.assert_array_equal(y, x + 1)
    else:
        with pytest.raises(error):
            module.launch("k", 1, 64, args, schedule=schedule, lazy=lazy)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("schedule, lazy", [(None, False), (None, True), (1, True)])
def test_thread_copies_that_arrive_at_an_mbarrier(schedule, lazy, waits):
    wait = (
        """again: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
        @!%p2 bra again;"""
        if waits
        else ""
    )
    body = f"""mov.u32 %r1, buffer; mov.u32 %r2, barrier; setp.ne.u32 %p1, %r0, 0;
        @!%p1 mbarrier.init.shared.b64 [%r2], 64; bar.sync 0;
        mad.lo.u32 %r3, %r0, 4, %r1; mad.wide.u32 %rd10, %r0, 4, %rd0;
        cp.async.ca.shared.global [%r3], [%rd10], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%r2]; {wait}
        sub.u32 %r4, 63, %r0; mad.lo.u32 %r4, %r4, 4, %r1; ld.shared.u32 %r5, [%r4];
        mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.u32 [%rd11], %r5;"""
    shared = ".shared .align 128 .b8 buffer[256]; .shared .align 8 .b64 barrier;"
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    module = kernel(body, 2, shared=shared)
    if waits:
        module.launch("k", 1, 64, [x, y], schedule=schedule, lazy=lazy)
        np.testing.assert_array_equal(y, x[::-1])
    else:
        with pytest.raises((ptx.SharedRace, ptx.UninitializedRead)):
            module.launch("k", 1, 64, [x, y], schedule=schedule, lazy=lazy)


def test_bf16_helper_is_exact_on_these_values():
    values = matrix(100)
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values)), values)


@pytest.mark.parametrize(
    "offset, size, error",
    [(0, 256, None), (16, 240, None), (16, 256, ptx.OutOfBounds), (8, 16, ptx.DescriptorError)],
)
def test_bulk_prefetch(offset, size, error):
    """It moves nothing, but what it names must exist and be aligned."""
    body = f"add.s64 %rd0, %rd0, {offset};\ncp.async.bulk.prefetch.L2.global [%rd0], {size};"
    source = np.zeros(64, np.float32)
    with pytest.raises(error) if error else nullcontext():
        kernel(body, 1).launch("k", 1, 1, [source])
