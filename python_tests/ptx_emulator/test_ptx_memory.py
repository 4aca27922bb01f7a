"""State spaces, widths, atomics and bounds in the emulator, by hand-written PTX."""

import numpy as np
import pytest

import ptx_emulator as ptx
from python_tests.support.ptx_ops import kernel

N = 48  # a warp and a half


def launch(body: str, arrays: list, registers="", shared="", block=N, grid=1, **options):
    return kernel(body, len(arrays), registers, shared).launch("k", grid, block, arrays, **options)


def test_loads_extend_to_the_register():
    x = np.array([0x80, 0x7F, 0xFF, 1], np.uint8)
    for t, expected in (("u8", [128, 127, 255, 1]), ("s8", [-128, 127, -1, 1])):
        y = np.zeros(4, np.int32)
        body = f"""cvt.u64.u32 %rd9, %r0; add.u64 %rd10, %rd0, %rd9;
            mad.wide.u32 %rd11, %r0, 4, %rd1; ld.global.{t} %r1, [%rd10];
            st.global.b32 [%rd11], %r1;"""
        launch(body, [x, y], block=4)
        assert y.tolist() == expected


@pytest.mark.parametrize("t", ["u8", "u16", "b32", "f32"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
def test_vectors_in_every_space(t, count, space):
    """A vector goes through a variable of the space and comes back as it was."""
    dtype = ptx.types.DTYPES[t]
    width = dtype.itemsize * count
    x = np.arange(N * count).astype(dtype)
    y = np.zeros_like(x)
    register = "f" if t == "f32" else "r"
    names = "{" + ", ".join(f"%{register}{10 + i}" for i in range(count)) + "}"
    through = {
        "shared": f"mov.u64 %rd12, buffer; mad.wide.u32 %rd12, %r0, {width}, %rd12;",
        "local": "mov.u64 %rd12, mine;",
    }.get(space, "")
    via = space if through else ""
    move = ""
    if via:
        move = f"""{through} st.{via}.v{count}.{t} [%rd12], {names};
            ld.{via}.v{count}.{t} {names}, [%rd12];"""
    kind = "" if space == "generic" else ".global"
    body = f"""mad.wide.u32 %rd10, %r0, {width}, %rd0; mad.wide.u32 %rd11, %r0, {width}, %rd1;
        ld{kind}.v{count}.{t} {names}, [%rd10]; {move} st{kind}.v{count}.{t} [%rd11], {names};"""
    shared = f".shared .align 16 .b8 buffer[{N * width}]; .local .align 16 .b8 mine[{width}];"
    launch(body, [x, y], shared=shared)
    np.testing.assert_array_equal(x, y)
    with pytest.raises(ptx.OutOfBounds, match=f"thread {N}"):
        launch(body, [x, y], shared=shared, block=N + 1)


def test_generic_addresses_of_several_spaces_at_once():
    body = """mov.u64 %rd10, buffer; cvta.shared.u64 %rd10, %rd10;
        mov.u64 %rd11, mine; cvta.local.u64 %rd11, %rd11;
        mul.wide.u32 %rd12, %r0, 4; add.u64 %rd10, %rd10, %rd12; add.u64 %rd13, %rd0, %rd12;
        rem.u32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 1;
        selp.b64 %rd14, %rd10, %rd13, %p1; selp.b64 %rd14, %rd11, %rd14, %p2;
        st.u32 [%rd14], %r0; ld.u32 %r2, [%rd14]; add.u32 %r2, %r2, 100;
        isspacep.shared %p3, %rd14; selp.u32 %r3, 1000, 0, %p3; add.u32 %r2, %r2, %r3;
        mad.wide.u32 %rd15, %r0, 4, %rd1; st.global.u32 [%rd15], %r2;"""
    x, y = np.full(N, 7, np.uint32), np.zeros(N, np.uint32)
    launch(body, [x, y], shared=f".shared .align 4 .b8 buffer[{4 * N}]; .local .align 4 .b32 mine;")
    t = np.arange(N)
    np.testing.assert_array_equal(y, t + 100 + 1000 * (t % 3 == 0))
    np.testing.assert_array_equal(x, np.where(t % 3 == 2, t, 7))


def test_module_variables_and_parameters_by_value():
    module = ptx.Module(""".version 8.5
.target sm_80
.address_size 64
.const .align 4 .u32 table[4] = {10, 20, 0x1E, 40};
.global .align 4 .f32 scale = 0f40000000;
.entry k(.param .align 4 .b8 pair[8], .param .f32 factor, .param .u64 out) {
.reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
mov.u32 %r0, %tid.x;
ld.param.u32 %r1, [pair+4];
ld.param.f32 %f1, [factor];
ld.param.u64 %rd1, [out];
mov.u64 %rd2, table; mad.wide.u32 %rd2, %r0, 4, %rd2; ld.const.u32 %r2, [%rd2];
ld.global.f32 %f2, [scale];
add.u32 %r2, %r2, %r1; cvt.rn.f32.u32 %f3, %r2; mul.f32 %f3, %f3, %f1; mul.f32 %f3, %f3, %f2;
mad.wide.u32 %rd3, %r0, 4, %rd1; st.global.f32 [%rd3], %f3;
ret; }""")
    y = np.zeros(4, np.float32)
    module.launch("k", 1, 4, [np.array([1, 5], np.int32).tobytes(), 1.5, y])
    np.testing.assert_array_equal(y, (np.array([10, 20, 30, 40]) + 5) * 3)
    with pytest.raises(ptx.OutOfBounds, match="table"):
        module.launch("k", 1, 5, [bytes(8), 1.5, np.zeros(5, np.float32)])
    with pytest.raises(ptx.PtxError, match="pair has 8 bytes, got 4"):
        module.launch("k", 1, 4, [bytes(4), 1.5, y])


def test_aliased_arrays_stay_aliased():
    buffer = np.arange(64, dtype=np.uint32)
    body = """mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd1;
        ld.global.u32 %r1, [%rd10]; add.u32 %r1, %r1, 1000; st.global.u32 [%rd11], %r1;"""
    launch(body, [buffer, buffer], block=64)
    np.testing.assert_array_equal(buffer, np.arange(64) + 1000)
    with pytest.raises(ptx.GlobalRace):  # each thread overwrites what its neighbour reads
        launch(body, [buffer[:-1], buffer[1:]], block=63)
    with pytest.raises(ptx.OutOfBounds, match="byte 128 of argument 0 .128 bytes."):
        launch(body, [buffer[:32], buffer[32:]], block=33)


# ---- atomics
OLD = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exch": lambda old, v: v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}


@pytest.mark.parametrize("schedule", [None, 5])
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", OLD)
def test_atomics_happen_one_after_another(op, space, schedule):
    """From the values that the threads saw follows an order in which they took turns."""
    t = {"and": "b32", "or": "b32", "xor": "b32", "exch": "b32"}.get(op, "u32")
    values = np.random.default_rng(1).integers(0, 20, N).astype(np.uint32)
    cells, seen = np.full(3, 9, np.uint32), np.zeros(N, np.uint32)
    at = "%rd14" if space == "shared" else "%rd12"
    body = f"""mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd2;
        ld.global.u32 %r1, [%rd10]; rem.u32 %r2, %r0, 3; mad.wide.u32 %rd12, %r2, 4, %rd1;
        mov.u64 %rd13, buffer; mad.wide.u32 %rd14, %r2, 4, %rd13;
        setp.lt.u32 %p1, %r0, 3; mov.u32 %r4, 9; @%p1 st.shared.u32 [%rd14], %r4; bar.sync 0;
        atom.{space}.{op}.{t} %r3, [{at}], %r1; st.global.u32 [%rd11], %r3; bar.sync 0;"""
    if space == "shared":
        body += "@%p1 ld.shared.u32 %r5, [%rd14]; @%p1 st.global.u32 [%rd12], %r5;"
    launch(
        body, [values, cells, seen], shared=".shared .align 4 .b8 buffer[12];", schedule=schedule
    )
    for cell in range(3):
        left = [(int(s), int(v)) for s, v in zip(seen[cell::3], values[cell::3])]
        assert _replay(9, left, OLD[op], int(cells[cell]), set()), (op, left)


def _replay(state: int, left: list, function, final: int, tried: set) -> bool:
    """Is there an order of the (seen, value) pairs that starts at `state` and ends at `final`?"""
    if not left:
        return state == final
    key = (state, tuple(sorted(left)))
    if key in tried:
        return False
    tried.add(key)
    for pair in sorted({p for p in left if p[0] == state}):
        rest = left.copy()
        rest.remove(pair)
        if _replay(function(state, pair[1]), rest, function, final, tried):
            return True
    return False


def test_compare_and_swap_elects_one():
    cell, won = np.zeros(1, np.uint64), np.zeros(N, np.uint64)
    body = """mad.wide.u32 %rd10, %r0, 8, %rd1; cvt.u64.u32 %rd11, %r0; add.u64 %rd11, %rd11, 1;
        atom.global.cas.b64 %rd12, [%rd0], 0, %rd11; st.global.u64 [%rd10], %rd12;"""
    for schedule in (None, 1):
        cell[0] = 0
        launch(body, [cell, won], schedule=schedule)
        assert 1 <= cell[0] <= N
        assert (
            won[int(cell[0]) - 1] == 0 and (won == 0).sum() == 1 and (won == cell[0]).sum() == N - 1
        )


def test_float_reductions():
    x = np.random.default_rng(2).integers(-50, 50, N).astype(np.float32)  # sums are exact
    for t, dtype, load in (
        ("f32", np.float32, "ld.global.f32 %f1, [%rd10];"),
        ("noftz.f16x2", np.float16, "ld.global.f32 %f2, [%rd10]; cvt.rn.f16x2.f32 %f1, %f2, %f2;"),
    ):
        total = np.zeros(2, dtype) if t != "f32" else np.zeros(1, dtype)
        register = "" if t == "f32" else ".reg .b32 %h;"
        load = load if t == "f32" else load.replace("%f1", "%h")
        source = "%f1" if t == "f32" else "%h"
        body = f"mad.wide.u32 %rd10, %r0, 4, %rd0; {load} red.global.add.{t} [%rd1], {source};"
        launch(body, [x, total], registers=register)
        assert (total == x.sum()).all()


# ---- what accesses would cost
@pytest.mark.parametrize(
    "width, stride, wavefronts, sectors",
    [
        (4, 4, 1, 4),
        (4, 8, 2, 8),
        (4, 128, 32, 32),
        (4, 132, 1, 32),
        (4, 0, 1, 1),
        (8, 8, 2, 8),
        (16, 16, 4, 16),
        (16, 144, 4, 32),
        (16, 128, 32, 32),
    ],
)
def test_bank_conflicts_and_sectors(width, stride, wavefronts, sectors):
    """One warp whose lanes read `width` bytes, `stride` bytes apart."""
    t = {4: "u32", 8: "v2.u32", 16: "v4.u32"}[width]
    names = "{" + ", ".join(f"%r{10 + i}" for i in range(width // 4)) + "}" if width > 4 else "%r10"
    body = f"""mov.u64 %rd10, buffer; mad.wide.u32 %rd10, %r0, {stride}, %rd10;
        mad.wide.u32 %rd11, %r0, {stride}, %rd0;
        ld.shared.{t} {names}, [%rd10]; ld.global.{t} {names}, [%rd11];"""
    shared = ".shared .align 16 .b8 buffer[8192];"
    options = dict(block=32, races=False, profile=True)
    traffic = launch(body, [np.zeros(8192, np.uint8)], shared=shared, **options).traffic
    assert (traffic.shared_requests, traffic.shared_wavefronts) == (max(1, width // 4), wavefronts)
    assert (traffic.global_requests, traffic.global_sectors) == (1, sectors)


# ---- bounds and initialisation
def test_exact_ends_and_neighbours():
    """One byte beyond an array is caught although another array follows it."""
    body = """mad.wide.u32 %rd10, %r0, 1, %rd0; ld.global.u8 %r1, [%rd10];
        mad.wide.u32 %rd11, %r0, 1, %rd1; st.global.u8 [%rd11], %r1;"""
    x, y = np.arange(33, dtype=np.uint8), np.zeros(64, np.uint8)
    launch(body, [x, y], block=33)
    np.testing.assert_array_equal(y[:33], x)
    with pytest.raises(ptx.OutOfBounds, match=r"read of 1 bytes at byte 33 of argument 0 \(33 b"):
        launch(body, [x, y], block=34)
    with pytest.raises(ptx.OutOfBounds, match="argument 1"):
        launch(body, [np.zeros(64, np.uint8), y[:40]], block=64)


def test_uninitialized_bytes_are_followed_one_by_one():
    y = np.zeros(8, np.uint8)
    store = "st.global.u8 [%rd0], %r0; st.global.u8 [%rd0+1], %r0;"
    launch(f"{store} ld.global.u16 %r1, [%rd0];", [ptx.Uninitialized(y)], block=1)
    with pytest.raises(ptx.UninitializedRead, match="byte 0 of argument 0"):
        launch(f"{store} ld.global.u32 %r1, [%rd0];", [ptx.Uninitialized(y)], block=1)


def test_read_only_arrays_keep_their_values():
    x = np.arange(4, dtype=np.uint32)
    x.flags.writeable = False
    launch("st.global.u32 [%rd0], %r0;", [x], block=1)
    assert x.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "statement, words",
    [
        ("frob.u32 %r1, %r0;", "frob"),
        ("add.cc.u32 %r1, %r0, %r0;", "add.cc"),
        ("mov.u32 %r1, %laneids;", "%laneids"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd1},{%fd2},{%fd3},{%fd4};", "m8n8k4"),
        ("cp.reduce.async.bulk.tensor.2d.min [%rd0, {%r1, %r1}], [%r0];", "cp.reduce"),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd0], [%r0], %r1;",
            "cp.reduce",
        ),
    ],
)
def test_what_is_not_modelled_says_so(statement, words):
    with pytest.raises(ptx.Unsupported, match=words):
        launch(statement, [np.zeros(4, np.uint32)], block=32)


def test_text_that_is_not_ptx():
    with pytest.raises(ptx.ParseError, match="no .version"):
        ptx.Module("int main() {\n}\n")
    with pytest.raises(ptx.ParseError, match="no label nowhere"):
        kernel("bra nowhere;", 0)
