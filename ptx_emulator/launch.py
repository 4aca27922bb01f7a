"""`load` makes a Module of CUDA source or PTX, `Module.launch` runs one of its kernels."""

import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .barriers import BlockBarriers
from .clusters import ClusterBarriers
from .copies import Copies
from .dependents import Dependents
from .errors import OutOfBounds, PtxError
from .global_races import GlobalRaces, GlobalShadow
from .machine import GLOBAL_BASE, Event, Machine
from .mbarriers import MBarriers
from .memory import GlobalMemory, Memory, Uninitialized
from .parse import parse
from .profile import Traffic
from .races import SharedRaces
from .schedule import Scheduler
from .syntax import Kernel
from .tensor_map import TensorMap
from .types import DTYPES, size_of
from .warp import WarpWaits
from .wgmma import WarpgroupProducts

_LANES_AT_ONCE = 1 << 16
_REGISTER_BYTES = 256 << 20
_ASYNC_OPS = ("cp", "wgmma")
MAX_SHARED = 227 * 1024


def nvcc() -> str | None:
    """The path of nvcc, or None."""
    return shutil.which("nvcc")


def compile_ptx(
    source: Path, arch: str = "80", defines=(), include=(), *, lines: bool = True
) -> str:
    """CUDA source -> PTX text, remembered on disk until source or headers change.

    lines: errors name source lines; of a kernel that inlines much nvcc then takes minutes.
    """
    compiler = nvcc()
    if compiler is None:
        raise PtxError("nvcc is not on PATH")
    source = Path(source)
    flags = [
        "-ptx",
        *(["-lineinfo"] if lines else []),
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{arch},code=compute_{arch}",
    ]
    flags += [f"-D{d}" for d in defines] + [f"-I{i}" for i in include]
    digest = hashlib.sha256(repr((compiler, flags)).encode() + source.read_bytes())
    for folder in (source.parent, *map(Path, include)):
        for header in sorted(h for end in ("h", "cuh", "hpp") for h in folder.rglob(f"*.{end}")):
            about = header.stat()
            digest.update(repr((str(header), about.st_size, about.st_mtime_ns)).encode())
    cache = Path(tempfile.gettempdir()) / f"moekernels-ptx-{os.getuid()}"
    cache.mkdir(exist_ok=True)
    result = cache / f"{source.stem}-{digest.hexdigest()[:24]}.ptx"
    if not result.exists():
        part = result.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, str(source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PtxError(f"nvcc failed on {source}:\n{done.stderr}")
        part.rename(result)
    return result.read_text()


def load(source: str | Path, arch: str = "80", defines=(), include=()) -> "Module":
    """A module of a .cu file (compiled for `arch`), a .ptx file, or PTX text."""
    if isinstance(source, str) and "\n" in source:
        return Module(source)
    path = Path(source)
    if path.suffix == ".ptx":
        return Module(path.read_text())
    return Module(compile_ptx(path, arch, defines, include))


@dataclass
class Stats:
    """What a launch executed: instructions are counted once for every thread.

    bulk_warps: the warps of a block that issued bulk loads, stores and prefetches, by these names.
    early: blocks that began before the launch ahead of theirs had ended (`launch_together`).
    """

    steps: int = 0
    instructions: int = 0
    by_op: Counter = field(default_factory=Counter)
    bulk_warps: dict[str, set[int]] = field(default_factory=dict)
    traffic: Traffic | None = None
    early: int = 0


class Module:
    """The kernels of one PTX text."""

    def __init__(self, text: str):
        self.text = text
        self.parsed = parse(text)
        self.kernels = self.parsed.kernels

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name, or the only one in whose mangled name the pattern is found."""
        if name in self.kernels:
            return self.kernels[name]
        found = [k for k in self.kernels if re.search(name, k)]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels match {name!r}: {', '.join(self.kernels)}")
        return self.kernels[found[0]]

    def launch(
        self,
        kernel: str | Kernel,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: list,
        shared_bytes: int = 0,
        *,
        schedule: int | None = None,
        lazy: bool = False,
        races: bool = True,
        profile: bool = False,
        max_steps: int = 3_000_000,
        cluster: int = 1,
        events: list[Event] | None = None,
    ) -> Stats:
        """Run a kernel; arrays among `args` are written in place.

        args: arrays (pointers with exact bounds), `Uninitialized(array)`, None (a null pointer),
            numbers, bytes (a struct by value), `Packed` (one with pointers) and `TensorMap`s.
        shared_bytes: dynamic shared memory a block.
        schedule: a seed perturbs the order in which warps run and delays some asynchronous work.
        lazy: asynchronous work takes effect as late as it may, not when it is issued.
        races: False switches off the tracking of races and of unwritten shared memory.
        profile: count bank conflicts and sectors, in `Stats.traffic`.
        cluster: blocks of a cluster, along x, unless the kernel says it.
        events: takes every load, warpgroup product, arrival and wait at an mbarrier, and bulk store
            of the launch, in the order in which they happen here.
        max_steps: how long groups may run on without waiting before NoProgress is raised.
        """
        if not isinstance(kernel, Kernel):
            kernel = self.kernel(kernel)
        memory = GlobalMemory()
        launch = Prepared(self, kernel, grid, block, args, shared_bytes, cluster, memory)
        launch.place_variables({})
        addresses = memory.add(launch.arrays())
        memory.seal()
        launch.bind(addresses)
        launch.events = events
        with np.errstate(all="ignore"):
            launch.traffic = Traffic() if profile else None
            return launch.run(schedule, lazy, races, max_steps)


class Packed:
    """A parameter as a launcher passes it: bytes, with host addresses of arrays among its words,
    and tensor maps where they lie in it."""

    def __init__(
        self,
        data: bytes,
        arrays: list[np.ndarray | Uninitialized],
        maps: dict[int, TensorMap] | None = None,
    ):
        self.data, self.arrays, self.maps = data, arrays, maps or {}

    def entries(self) -> list[tuple[str, np.ndarray, bool]]:
        of_maps = [tensor_map.array for tensor_map in self.maps.values()]
        fresh = [isinstance(a, Uninitialized) for a in (*self.arrays, *of_maps)]
        plain = [a.array if isinstance(a, Uninitialized) else a for a in (*self.arrays, *of_maps)]
        return [(f"the array of {a.nbytes} bytes", a, f) for a, f in zip(plain, fresh)]

    def moved(self, addresses: dict[int, int]) -> bytes:
        """The bytes with every address that lies in an array turned into the kernel's."""
        words = bytearray(self.data)
        for at in range(0, len(words) - 7, 8):
            value = int.from_bytes(words[at : at + 8], "little")
            for _, array, _ in self.entries():
                begin = array.__array_interface__["data"][0]
                if begin <= value < begin + array.nbytes:
                    words[at : at + 8] = (addresses[id(array)] + value - begin).to_bytes(
                        8, "little"
                    )
                    break
        return bytes(words)


def _three(shape: int | tuple[int, ...]) -> tuple[int, int, int]:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return tuple(int(v) for v in shape + (1,) * (3 - len(shape)))


def number_bytes(value, type_name: str) -> bytes:
    """A number (None: 0) as a parameter of that PTX type."""
    dtype = DTYPES[type_name]
    if value is None:
        value = 0
    if isinstance(value, float) and dtype.kind == "u":  # untyped bits that hold a float
        return np.array(value, f"f{dtype.itemsize}").tobytes()
    if dtype.kind == "f":
        return np.array(value, dtype).tobytes()
    bits = int(value) & ((1 << 8 * dtype.itemsize) - 1)
    return bits.to_bytes(dtype.itemsize, "little")


class Prepared:
    """A launch whose arguments are checked; `bind` puts the addresses in memory into them."""

    def __init__(self, module: Module, kernel, grid, block, args, shared_bytes, cluster, memory):
        self.module, self.kernel, self.args, self.dynamic = module, kernel, args, shared_bytes
        self.grid, self.block = _three(grid), _three(block)
        self.cluster = max(cluster, kernel.cluster)
        self.memory = memory
        self.symbols: dict[str, int] = {}
        self.maps: dict[int, TensorMap] = {}
        self.traffic: Traffic | None = None
        self.events: list[Event] | None = None
        threads = int(np.prod(self.block))
        if not 0 < threads <= min(kernel.max_threads or 1024, 1024):
            limit = kernel.max_threads or 1024
            raise PtxError(f"{kernel.name}: {threads} threads a block, allowed are 1 to {limit}")
        if kernel.sizes["shared"] + shared_bytes > MAX_SHARED:
            raise OutOfBounds(f"{kernel.name}: more than {MAX_SHARED} bytes of shared memory")
        if len(args) != len(kernel.params):
            raise PtxError(f"{kernel.name} takes {len(kernel.params)} arguments, got {len(args)}")
        if self.grid[0] % self.cluster:
            raise PtxError(f"{kernel.name}: {self.grid[0]} blocks in clusters of {self.cluster}")

    def place_variables(self, placed: dict[int, dict[str, int]]) -> None:
        """Module variables live in global memory, placed once a module; dynamic shared memory
        follows the static."""
        symbols = placed.get(id(self.module))
        if symbols is None:
            symbols = placed[id(self.module)] = {
                v.name: GLOBAL_BASE + self.memory.reserve(v.size, v.name)
                for v in self.module.parsed.variables.values()
                if v.space in ("global", "const")
            }
        dynamic = -(-self.kernel.sizes["shared"] // 1024) * 1024
        self.symbols = symbols | dict.fromkeys(self.kernel.dynamic_shared, dynamic)

    def arrays(self) -> list[tuple[str, np.ndarray, bool]]:
        """The arrays among the arguments: name, array, whether it counts as unwritten."""
        arrays = []
        for i, arg in enumerate(self.args):
            if isinstance(arg, Packed):
                arrays += arg.entries()
                continue
            array = arg.array if isinstance(arg, Uninitialized | TensorMap) else arg
            if isinstance(array, np.ndarray):
                if not array.flags.c_contiguous:
                    raise PtxError(f"argument {i} of {self.kernel.name} is not contiguous")
                arrays.append((f"argument {i}", array, isinstance(arg, Uninitialized)))
        return arrays

    def bind(self, addresses: dict[int, int]) -> None:
        """Parameters and module variables, once the arrays have addresses."""
        params = np.zeros(-(-max(self.kernel.sizes["param"], 1) // 64) * 64, np.uint8)
        for arg, (variable, type_name) in zip(self.args, self.kernel.params):
            here = slice(variable.offset, variable.offset + variable.size)
            if isinstance(arg, TensorMap):
                self.maps[variable.offset] = arg.at(addresses[id(arg.array)])
                continue
            if isinstance(arg, Uninitialized):
                arg = arg.array
            if isinstance(arg, np.ndarray):
                value = np.uint64(addresses[id(arg)]).tobytes()
            elif isinstance(arg, Packed):
                value = arg.moved(addresses)
                for at, tensor_map in arg.maps.items():
                    bound = tensor_map.at(addresses[id(tensor_map.array)])
                    self.maps[variable.offset + at] = bound
            elif isinstance(arg, bytes):
                value = arg
            else:
                value = number_bytes(arg, type_name)
            if len(value) != variable.size:
                raise PtxError(f"{variable.name} has {variable.size} bytes, got {len(value)}")
            params[here] = np.frombuffer(value, np.uint8)
        self.params = params
        for name, variable in self.module.parsed.variables.items():
            if variable.initial:
                start = self.symbols[name] - GLOBAL_BASE
                data = np.frombuffer(variable.initial, np.uint8)
                self.memory.data[start : start + len(data)] = data

    def grain(self, space: str) -> int:
        """The smallest access to a space that the kernel has: no two lanes share a smaller cell."""
        sizes = [16]
        for ins in self.kernel.code:
            where = ins.state_space()
            if ins.op in ("ld", "st", "atom", "red", "ldu") and where in (space, "generic"):
                sizes.append(size_of(ins.type))
            elif ins.op == "cp":
                sizes.append(8 if "bulk" in ins.mods else 4)
        for tensor_map in self.maps.values() if space == "global" else ():
            sizes.append(math.gcd(16, tensor_map.shape[-1] * tensor_map.item))
        return min(sizes)

    def run(self, seed: int | None, lazy: bool, races: bool, max_steps: int) -> Stats:
        stats, blocks = Stats(traffic=self.traffic), int(np.prod(self.grid))
        shadow = None
        if races:
            shadow = GlobalShadow(len(self.memory.data), self.grain("global"), blocks)
        threads = int(np.prod(self.block))
        per_lane = max(sum(size_of(t) for t in self.kernel.registers.values()), 1)
        at_once = min(_LANES_AT_ONCE, _REGISTER_BYTES // per_lane) // (threads * self.cluster)
        at_once = max(1, at_once) * self.cluster  # whole clusters
        clock = 0
        try:
            for first in range(0, blocks, at_once):
                some = np.arange(first, min(first + at_once, blocks))
                machine = self.machine(some, lazy, seed, max_steps, races)
                if shadow is not None:
                    machine.memory.global_races = GlobalRaces(machine, shadow, self.memory)
                machine.clock_base = clock
                machine.scheduler.run()
                clock += machine.now + 1
                for ins, count in zip(self.kernel.code, machine.scheduler.counts):
                    stats.by_op[ins.op] += count
                for kind, warps in machine.copies.bulk_warps.items():
                    stats.bulk_warps.setdefault(kind, set()).update(warps)
        finally:
            self.memory.copy_back()
        stats.steps, stats.instructions = clock, sum(stats.by_op.values())
        return stats

    def machine(self, blocks, lazy: bool, seed, max_steps: int, races: bool) -> Machine:
        """A machine for some blocks, with all its parts but what judges global memory."""
        machine = Machine(self.kernel, self.grid, self.block, blocks, self.symbols, self.cluster)
        machine.memory = memory = Memory(machine, self.memory, self.params, self.dynamic)
        memory.traffic = self.traffic
        machine.scheduler = scheduler = Scheduler(machine, seed, max_steps)
        machine.warp_waits = WarpWaits(machine)
        machine.barriers = BlockBarriers(machine)
        machine.cluster_barriers = ClusterBarriers(machine)
        machine.mbarriers = MBarriers(machine)
        machine.dependents = Dependents(machine)
        machine.events = self.events
        machine.copies = Copies(machine, self.maps, lazy)
        machine.products = WarpgroupProducts(machine, lazy)
        scheduler.waits = [
            machine.warp_waits,
            machine.barriers,
            machine.cluster_barriers,
            machine.mbarriers,
            machine.dependents,
            machine.copies,
            machine.products,
        ]
        scheduler.idle = [machine.copies.deliver, machine.mbarriers.refuse_some]
        scheduler.check_in_flight = machine.products.refuse_touch
        if races:
            actors = "loads" if any(i.op in _ASYNC_OPS for i in self.kernel.code) else ""
            if any(i.op == "cp" and "bulk_group" in i.mods for i in self.kernel.code):
                actors = "stores"
            memory.shared_races = SharedRaces(
                machine, len(memory.shared), memory.stride, self.grain("shared"), actors
            )
        return machine


__all__ = ["Module", "Packed", "Stats", "compile_ptx", "load", "number_bytes", "nvcc"]
