"""The CUDA backend without a GPU: the very launchers and bindings, their kernels' PTX executed on
the CPU.

`_C_emulated.so` holds the CUDA path of every op over a CUDA runtime of ours that hands each
launch (kernel, grid, shared memory, argument bytes) to this file, which finds the arrays that the
arguments point into and runs the PTX that nvcc made. Inside `emulated_cuda()` the raw ops take
that path for CPU tensors, so `moekernels.ops` runs on it unchanged, autograd and all. Arrays that
an op allocates count as unwritten until a kernel has written to them.

Where MOEKERNELS_SANITIZER names one (asan, tsan), the kernels run instead as g++ compiled them
under that sanitizer (csrc/simt), which must have been loaded first: test_sanitize.py does it.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ptx_emulator as ptx
from ptx_emulator import hardware as ptx_hardware
from python_tests.support import planted

ROOT = Path(__file__).parents[2]
SANITIZER = os.environ.get("MOEKERNELS_SANITIZER")
LIBRARY = ROOT / "build" / "cmake" / f"_C_{SANITIZER or 'emulated'}.so"
ARCH = "90a"

# nvcc names internal kernels after the file and a hash of how it was compiled.
_FILE_HASH = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")


def why_not() -> str | None:
    """Why the CUDA backend cannot be emulated here, or None."""
    if ptx.nvcc() is None and not SANITIZER:
        return "nvcc is not on PATH: there is no PTX to execute"
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built: `make test` builds it, MOEKERNELS_EMULATED=1 elsewhere"
    return None


@cache
def source(stem: str) -> str:
    """The PTX of csrc/cuda/<stem>.cu, its kernels by names without a hash."""
    return compiled(ROOT / "csrc" / "cuda" / f"{stem}.cu")


def compiled(path: Path) -> str:
    """The same of a file whose headers lie beside it."""
    text = ptx.compile_ptx(
        path,
        ARCH,
        defines=['MOEKERNELS_CUDA_ARCHS="PTX"'],
        include=[ROOT / "csrc" / "include", path.parent],
        lines=False,  # of gate.cu nvcc makes them in minutes, not seconds
    )
    return _FILE_HASH.sub(r"\1", text)


@cache
def module(stem: str) -> ptx.Module:
    return ptx.Module(source(stem))


def products_as(monkeypatch, *defines: str, bug: str = "none") -> None:
    """The row product and the gradient of 16 bits run as compiled with these definitions, and with
    one of the bugs of `planted`."""
    with tempfile.TemporaryDirectory() as folder:
        text = ptx.compile_ptx(
            ROOT / "python_tests" / "ptx_emulator" / "kernels" / "product_sm90.cu",
            ARCH,
            defines=[*defines, 'MOEKERNELS_CUDA_ARCHS="PTX"'],
            include=[ROOT / "csrc" / "include", planted.headers_with(bug, ROOT, Path(folder))],
            lines=False,
        )
    other, own = ptx.Module(text), module
    stems = ("grouped_gemm_sm90", "gathered_sm90", "segments_sm90")
    monkeypatch.setitem(globals(), "module", lambda name: other if name in stems else own(name))


def style_as(monkeypatch, name: str, folder: Path) -> None:
    """The products in a style run as compiled with one of the bugs of `planted.STYLES`."""
    bug = planted.STYLES[name]
    kernel = bug.kernel or bug.style
    text = ptx.compile_ptx(
        ROOT / "python_tests" / "ptx_emulator" / "kernels" / "styles_sm90.cu",
        ARCH,
        defines=['MOEKERNELS_CUDA_ARCHS="PTX"', kernel.upper()],
        include=[ROOT / "csrc" / "include", planted.style_headers_with(name, ROOT, folder)],
        lines=False,
    )
    other, own = ptx.Module(text), module
    stems = {"pingpong": "experts", "hidden": "grouped_gemm", "sums": "grouped_wgrad"}
    stem = f"{stems[kernel]}_styles_sm90"
    monkeypatch.setitem(globals(), "module", lambda name: other if name == stem else own(name))


def fp8_as(monkeypatch, bug: str, folder: Path) -> None:
    """The product in FP8 runs as compiled with one of the bugs of `planted.BUGS_OF_FP8`."""
    text = ptx.compile_ptx(
        ROOT / "python_tests" / "ptx_emulator" / "kernels" / "fp8_sm90.cu",
        ARCH,
        defines=['MOEKERNELS_CUDA_ARCHS="PTX"'],
        include=[ROOT / "csrc" / "include", planted.fp8_headers_with(bug, ROOT, folder)],
        lines=False,
    )
    other, own = ptx.Module(text), module
    stem = "grouped_gemm_fp8_sm90"
    monkeypatch.setitem(globals(), "module", lambda name: other if name == stem else own(name))


def chain_as(monkeypatch, name: str, folder: Path) -> None:
    """The row products in a chain run as compiled with one of the bugs of `planted.CHAINS`."""
    text = ptx.compile_ptx(
        ROOT / "python_tests" / "ptx_emulator" / "kernels" / "chained.cu",
        ARCH,
        defines=['MOEKERNELS_CUDA_ARCHS="PTX"'],
        include=[ROOT / "csrc" / "include", planted.chain_headers_with(name, ROOT, folder)],
        lines=False,
    )
    other, own = ptx.Module(text), module
    stem = "chained_sm90"
    monkeypatch.setitem(globals(), "module", lambda name: other if name == stem else own(name))


def route_as(monkeypatch, name: str, folder: Path) -> None:
    """The launch that routes alone runs as compiled with one of the bugs of `planted.ROUTES`."""
    source = planted.route_with(name, ROOT, folder)
    other, own = ptx.Module(compiled(source)), module
    stem = "route_sm90"
    monkeypatch.setitem(globals(), "module", lambda name: other if name == stem else own(name))


def _bytes_read(kernel: ptx.syntax.Kernel) -> list[np.ndarray]:
    """For each parameter, which of its bytes the kernel loads: all, where it cannot be told."""
    read = {variable.name: np.zeros(variable.size, bool) for variable, _ in kernel.params}
    at = {name: (name, 0) for name in read}  # what holds the address of a parameter's byte
    for ins in kernel.code:
        for operand in ins.operands:
            address = isinstance(operand, ptx.syntax.Address)
            base = getattr(operand, "base", operand)
            if getattr(base, "name", None) not in at:
                continue
            name, offset = at[base.name]
            target = ins.operands[0]
            if ins.op == "ld" and address:
                count = len(target.items) if isinstance(target, ptx.syntax.Vector) else 1
                offset += operand.offset
                read[name][offset : offset + count * ptx.types.size_of(ins.type)] = True
            elif ins.op == "mov" and operand is not target:
                at[target.name] = (name, offset)
            elif ins.op == "add" and isinstance(ins.operands[2], ptx.syntax.Imm):
                if operand is not target:
                    at[target.name] = (name, offset + ins.operands[2].value)
            elif operand is not target:
                read[name][:] = True
    return list(read.values())


_MAP_MAGIC, _MAP_BYTES = 0x70616D726F736E74, 128
_MAP_TYPES = {0: np.uint8, 6: np.float16, 7: np.float32, 9: np.uint16}  # of CUtensorMapDataType
_MAP_SWIZZLES = (0, 32, 64, 128)


def _tensor_map(raw: bytes, spans: dict[int, tuple[int, bool]]) -> ptx.TensorMap | None:
    """The tensor map that csrc/emulated/runtime.cpp encoded into these bytes, if it is one."""
    if len(raw) != _MAP_BYTES or int.from_bytes(raw[:8], "little") != _MAP_MAGIC:
        return None
    address, kind, rank, swizzle, *rest = struct.unpack_from("<Q3I5I9Q", raw, 8)
    box, sizes, strides = rest[:rank], rest[5 : 5 + rank], rest[10 : 9 + rank]
    dtype = np.dtype(_MAP_TYPES[kind])
    begin = max(b for b in spans if b <= address)
    nbytes = begin + spans[begin][0] - address
    array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)).view(dtype)
    return ptx.TensorMap(
        array,
        tuple(box[::-1]),
        _MAP_SWIZZLES[swizzle],
        shape=tuple(sizes[::-1]),
        strides=(*strides[::-1], dtype.itemsize),
    )


def _packed(raw: bytes, arrays: list, spans: dict[int, tuple[int, bool]]) -> ptx.Packed:
    """A struct by value, with the tensor maps in it."""
    maps = {at: _tensor_map(raw[at : at + _MAP_BYTES], spans) for at in range(0, len(raw), 64)}
    return ptx.Packed(raw, arrays, {at: found for at, found in maps.items() if found})


def _promotion(raw: bytes) -> int:
    """How many bytes its loads bring to L2."""
    return (0, 64, 128, 256)[struct.unpack_from("<I", raw, 120)[0]]


@cache
def program(module: ptx.Module) -> ptx_hardware.Program:
    """The module's PTX on the GPU."""
    return ptx_hardware.Program(module.text)


class _Device:
    """Runs the launches of one op call at a time, over the arrays that it was told of."""

    def __init__(self):
        self.schedule: int | None = None
        self.lazy = self.hardware = False
        self.record = self.keep = None  # set by `devices`: who takes launches and their memory
        self.launches: list[str] = []
        self.shapes: list[dict] = []  # of the launches: blocks, shared bytes, maps' promotions, ...
        self.bytes_read: dict[tuple[ptx.Module, str], list[np.ndarray]] = {}
        self.error: Exception | None = None
        self.lasting: dict[int, tuple[int, bool]] = {}  # known beyond one call
        self.forget()
        self._launch_fn = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_uint32,
            ctypes.c_uint32,
        )(self._launch)
        self._array_fn = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)(
            self._array
        )
        torch.ops.load_library(str(LIBRARY))
        self.library = ctypes.CDLL(str(LIBRARY))
        self.library.moekernels_emulate(self._launch_fn, self._array_fn)

    def forget(self) -> None:
        self.spans = dict(self.lasting)  # begin -> bytes, unwritten

    def _array(self, data: int | None, nbytes: int, lasts: int) -> None:
        if data and nbytes:
            self.spans[data] = (nbytes, not lasts)
            if lasts:
                self.lasting[data] = self.spans[data]

    def know(self, tensor: Tensor, lasts: bool = False) -> None:
        if tensor.numel():
            span = (tensor.numel() * tensor.element_size(), False)
            self.spans[tensor.data_ptr()] = span
            if lasts:
                self.lasting[tensor.data_ptr()] = span

    def _launch(self, name, blocks, threads, shared_bytes, params, cluster, chained) -> int:
        name = _FILE_HASH.sub(r"\1", name.decode())
        try:
            self._run(name, blocks, threads, shared_bytes, params, cluster, bool(chained))
        except Exception as error:
            self.error = error
            return 1
        return 0

    def _run(
        self,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        params,
        cluster: int,
        chained: bool,
    ) -> None:
        self.launches.append(name)
        likely = sorted(stems(), key=lambda stem: _unlikely(stem, name))  # others: not compiled
        found = next(m for m in map(module, likely) if name in m.kernels)
        kernel = found.kernels[name]
        args = [ctypes.string_at(params[i], v.size) for i, (v, _) in enumerate(kernel.params)]
        # The gaps between the members of an argument hold what the stack held, old pointers too.
        key = found, name  # another build of a kernel reads other bytes
        if key not in self.bytes_read:
            self.bytes_read[key] = _bytes_read(kernel)
        bits = [
            np.frombuffer(raw, np.uint8) * read for raw, read in zip(args, self.bytes_read[key])
        ]
        args = [b.astype(np.uint8).tobytes() for b in bits]
        begins = sorted(self.spans)
        used = {}
        for raw in args:
            for at in range(0, len(raw) - 7, 8):
                value = int.from_bytes(raw[at : at + 8], "little")
                i = bisect.bisect_right(begins, value) - 1
                if i >= 0 and value < begins[i] + self.spans[begins[i]][0]:
                    used[begins[i]] = self.spans[begins[i]]
        arrays = []
        for begin, (nbytes, unwritten) in used.items():
            array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(begin))
            arrays.append(ptx.Uninitialized(array) if unwritten else array)
            self.spans[begin] = (nbytes, False)
        maps = [_tensor_map(raw, self.spans) for raw in args]
        packed = [m or _packed(raw, arrays, self.spans) for m, raw in zip(maps, args)]
        promotions = [_promotion(raw) for m, raw in zip(maps, args) if m]
        shape = {"blocks": blocks, "shared": shared_bytes, "promotions": promotions}
        self.shapes.append({**shape, "cluster": cluster, "chained": chained})
        if self.record is not None:
            how = {"cluster": cluster, "programmatic": chained}
            self.record(found, kernel, blocks, threads, packed, shared_bytes, how)
            return
        if self.hardware:
            if cluster > 1:
                raise NotImplementedError("a launch in clusters goes through the library alone")
            program(found).launch(name, blocks, threads, packed, shared_bytes)
            return
        how = {"schedule": self.schedule, "lazy": self.lazy, "cluster": cluster}
        stats = found.launch(kernel, blocks, threads, packed, shared_bytes, **how)
        self.shapes[-1]["bulk_warps"] = stats.bulk_warps

    def call(self, name: str, *args):
        self.forget()
        self.error = None
        for arg in args:
            for one in arg if isinstance(arg, list | tuple) else [arg]:
                if isinstance(one, Tensor):
                    self.know(one)
        try:
            result = getattr(torch.ops.moekernels_emulated, name).default(*args)
            if self.keep is not None:
                self.keep((args, result))
            return result
        except RuntimeError:
            if self.error is not None:
                raise self.error from None
            raise


class _Fibers:
    """The same interface over csrc/simt: the sanitizer of this process is the judge."""

    def __init__(self):
        self.schedule: int | None = None
        self.launches: list[str] = []
        self.shapes: list[dict] = []
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        self._order, self._launched = (
            library.moekernels_simt_order,
            library.moekernels_simt_launches,
        )
        self._order.argtypes, self._launched.restype = [ctypes.c_uint64], ctypes.c_uint64

    def call(self, name: str, *args):
        self._order(self.schedule or 0)
        before = self._launched()
        try:
            return getattr(torch.ops.moekernels_emulated, name).default(*args)
        finally:
            self.launches += [name] * (self._launched() - before)


def _unlikely(stem: str, name: str) -> tuple[bool, ...]:
    """Sorts first the files that may well hold a kernel."""
    ffn = "StoreUp" in name or "StoreDAct" in name
    style = any(word in name for word in ("hidden_product", "pingpong_product"))
    chained = stem in ("chained_sm90", "moves_sm90")
    return (
        chained != ("chained" in name),
        (stem == "route_sm90") != ("at_once" in name),
        stem not in name,
        ("sm90" in stem) != ("sm90" in name),
        ("styles" in stem) != style,
        ("wgrad" in stem) != ("pingpong_product_into" in name),
        ("gathered" in stem) != ("gathered" in name),
        ("segments" in stem) != ("segments" in name),
        ("experts" in stem) != ffn,
    )


def stems() -> list[str]:
    return sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))


@cache
def raw_ops() -> list[str]:
    """Of the emulated library, once it is loaded: all that take tensors."""
    prefix = "moekernels_emulated::"
    return sorted(
        schema.name.removeprefix(prefix)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(prefix) and "Tensor" in str(schema).partition("->")[0]
    )


@cache
def device() -> _Device | _Fibers:
    return _Fibers() if SANITIZER else _Device()


@contextmanager
def emulated_cuda(
    schedule: int | None = None,
    capability: int = 80,
    lazy: bool = False,
    hardware: bool = False,
) -> Iterator[_Device]:
    """The raw ops run their CUDA kernels, emulated, as a device of `capability` is given them;
    `schedule` perturbs the order of the warps, `lazy` makes copies land as late as they may;
    with `hardware` the GPU of this machine executes the same PTX on the same arrays instead."""
    emulator = device()
    emulator.hardware = hardware
    emulator.schedule, emulator.lazy = schedule, lazy
    emulator.launches, emulator.shapes = [], []
    if not SANITIZER:  # the plain kernels are the same for every device
        emulator.library.moekernels_emulate_capability(capability)
    library = torch.library.Library("moekernels", "IMPL")
    try:
        for name in raw_ops():
            library.impl(
                name,
                lambda *args, name=name: emulator.call(name, *args),
                "CPU",
                allow_override=True,
            )
        yield emulator
    finally:
        library._destroy()
