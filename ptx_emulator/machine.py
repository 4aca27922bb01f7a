"""A batch of blocks: registers as arrays of one element a thread, and operands bound to them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import PtxError, Unsupported
from .syntax import Address, Imm, Instruction, Kernel, Not, Reg, Sink, Special, Symbol
from .types import DTYPES, SIGNED, UNSIGNED, is_signed

# Where the state spaces lie among generic addresses.
SHARED_BASE = 0x01_0000_0000
LOCAL_BASE = 0x02_0000_0000
PARAM_BASE = 0x03_0000_0000
GLOBAL_BASE = 0x70_0000_0000

Step = Callable[["Lanes"], None]


class Event(NamedTuple):
    """What a warp did that takes time elsewhere. kind: load (`at`: its mbarrier; `size`: bytes),
    product (`size`: columns of 64 rows and 16 numbers of K, of 16 bits), arrive and wait (`at`: the
    mbarrier), store (`size`: bytes). block: whose memory it is, of the grid."""

    kind: str
    block: int
    warp: int
    at: int
    size: int


BINDERS: dict[str, Callable[["Machine", Instruction], Step]] = {}
# Operations that may make their lanes wait: their step returns the lanes that go on, or None.
BLOCKING: set[str] = set()


def instruction(*names: str, blocking: bool = False):
    """Register `bind(machine, instruction) -> step(lanes)` for some opcodes."""

    def register(bind):
        for name in names:
            BINDERS[name] = bind
            if blocking:
                BLOCKING.add(name)
        return bind

    return register


class Lanes:
    """Some threads: `ids` ascending, `at` an index for register arrays, a slice if possible."""

    __slots__ = ("at", "ids", "n")

    def __init__(self, ids: np.ndarray):
        self.ids, self.n = ids, len(ids)
        first = int(ids[0])
        contiguous = int(ids[-1]) - first + 1 == self.n
        self.at = slice(first, first + self.n) if contiguous else ids

    def where(self, mask: np.ndarray) -> "Lanes":
        return Lanes(self.ids[mask])

    @classmethod
    def listed(cls, ids: np.ndarray) -> "Lanes":
        """Threads in any order, each as often as it is named."""
        lanes = cls.__new__(cls)
        lanes.ids = lanes.at = ids
        lanes.n = len(ids)
        return lanes

    @classmethod
    def repeated(cls, thread_id: int, times: int) -> "Lanes":
        """One thread that makes many accesses at once, as a bulk copy does."""
        return cls.listed(np.full(times, thread_id))


class _Inverted:
    """A predicate source read as its opposite."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __getitem__(self, at):
        return ~self.array[at]


class _Nowhere:
    """The target of a result that is thrown away."""

    def __setitem__(self, at, value):
        pass


class Machine:
    """Registers, special registers and identities of the threads of some blocks of a grid."""

    def __init__(
        self,
        kernel: Kernel,
        grid,
        block,
        blocks: np.ndarray,
        symbols: dict[str, int],
        cluster: int = 1,
    ):
        self.device: int | None = None  # its number, where several run together
        self.cluster = cluster  # blocks that see one another's shared memory, along x
        self.kernel, self.grid, self.block, self.blocks = kernel, grid, block, blocks
        self.symbols = symbols
        self.threads_per_block = int(np.prod(block))
        self.num_blocks = len(blocks)
        self.size = self.threads_per_block * self.num_blocks
        self.warps_per_block = -(-self.threads_per_block // 32)
        self.thread = np.tile(np.arange(self.threads_per_block), self.num_blocks)
        self.block_of = np.repeat(np.arange(self.num_blocks), self.threads_per_block)
        self.lane = self.thread % 32
        self.lane_bit = (np.uint32(1) << self.lane.astype(np.uint32)).astype(np.uint32)
        self.warp_in_block = self.thread // 32
        self.warp = self.block_of * self.warps_per_block + self.warp_in_block
        self.all_ids = np.arange(self.size)
        self.alive = np.ones(self.size, np.bool_)
        self.now = 0  # counts executed steps; the time of events in this launch
        self.others = 0  # steps of other machines; and what this device's clock is ahead of them
        self.clock_base = 0
        self.events: list[Event] | None = None
        self._registers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple, np.ndarray] = {}
        self._special: dict[str, np.ndarray] = {}

    def note(self, kind: str, block: int, thread_id: int, at: int = 0, size: int = 0) -> None:
        """Remember an event for whoever asked for them."""
        if self.events is not None:
            warp = int(self.warp_in_block[thread_id])
            self.events.append(Event(kind, int(self.blocks[block]), warp, int(at), int(size)))

    # ---- identities, for messages
    def describe_thread(self, thread_id: int) -> str:
        x, y, _ = self.grid
        b = int(self.blocks[self.block_of[thread_id]])
        t = int(self.thread[thread_id])
        block = f"{b}" if y == self.grid[2] == 1 else f"({b % x},{b // x % y},{b // (x * y)})"
        bx, by, bz = self.block
        thread = f"{t}" if by == bz == 1 else f"({t % bx},{t // bx % by},{t // (bx * by)})"
        device = "" if self.device is None else f"device {self.device} "
        return f"{device}block {block} thread {thread}"

    def where(self, thread_id: int, ins: Instruction) -> str:
        return f"{self.kernel.name}: {self.describe_thread(thread_id)}: {self.quote(ins)}"

    def quote(self, ins: Instruction) -> str:
        """An instruction's text and source line."""
        text = ins.text if len(ins.text) < 130 else ins.text[:120] + " ..."
        line = ""
        if ins.location is not None:
            name = self.kernel.files.get(ins.location[0], "?").rpartition("/")[2]
            line = f" ({name}:{ins.location[1]})"
        return f"`{text}`{line}"

    def fail(self, error: type[PtxError], what: str, thread_id: int, ins: Instruction):
        raise error(f"{what}\n  in {self.where(int(thread_id), ins)}")

    # ---- operands
    def register(self, name: str) -> np.ndarray:
        array = self._registers.get(name)
        if array is None:
            dtype = DTYPES[self.kernel.registers[name]]
            if dtype.kind != "b":
                dtype = np.dtype(UNSIGNED[dtype.itemsize])
            array = self._registers[name] = np.zeros(self.size, dtype)
        return array

    def source(self, operand, ptx_type: str, ins: Instruction):
        """An array (or the like) of one value a thread, to be indexed with `lanes.at`."""
        dtype = DTYPES[ptx_type]
        match operand:
            case Reg(name):
                array = self.register(name)
                if array.dtype == dtype:
                    return array
                if array.dtype.kind == "b" or dtype.kind == "b":
                    raise Unsupported(f"{name} is no {ptx_type} in `{ins.text}`")
                if array.dtype.itemsize < dtype.itemsize:
                    raise Unsupported(f"{name} is narrower than {ptx_type} in `{ins.text}`")
                return array.view(dtype)[:: array.dtype.itemsize // dtype.itemsize]
            case Not(inner):
                return _Inverted(self.source(inner, ptx_type, ins))
            case Imm(value):
                return self.constant(value, dtype)
            case Symbol(name):
                return self.constant(self.symbol(name, ins), dtype)
            case Address(Symbol(name), offset):
                return self.constant(self.symbol(name, ins) + offset, dtype)
            case Special(name):
                return self.special(name, ins).astype(dtype)
        raise Unsupported(f"operand {operand} in `{ins.text}`")

    def target(self, operand, ptx_type: str, ins: Instruction):
        """The array to assign results of `ptx_type` to; numpy's assignment extends the sign."""
        if isinstance(operand, Sink):
            return _Nowhere()
        if not isinstance(operand, Reg):
            raise Unsupported(f"result {operand} in `{ins.text}`")
        array = self.register(operand.name)
        dtype = DTYPES[ptx_type]
        if array.dtype.kind == "b" or array.dtype == dtype:
            return array
        if array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.dtype.itemsize < dtype.itemsize:
            raise Unsupported(f"{operand.name} is narrower than {ptx_type} in `{ins.text}`")
        kinds = SIGNED if is_signed(ptx_type) else UNSIGNED
        if dtype.kind == "f":
            return _FloatBits(array, dtype)
        return array.view(kinds[array.dtype.itemsize])

    def constant(self, value: int | float, dtype: np.dtype) -> np.ndarray:
        key = (value, type(value), dtype)
        array = self._constants.get(key)
        if array is None:
            if dtype.kind in "ui" and isinstance(value, int):
                bits = value & ((1 << 8 * dtype.itemsize) - 1)
                scalar = np.array(bits, UNSIGNED[dtype.itemsize]).view(dtype)
            else:
                scalar = np.array(value, dtype)
            array = self._constants[key] = np.broadcast_to(scalar, self.size)
        return array

    def symbol(self, name: str, ins: Instruction) -> int:
        variable = self.kernel.variables.get(name)
        if variable is not None:
            return variable.offset
        if name in self.symbols:
            return self.symbols[name]
        raise Unsupported(f"unknown symbol {name} in `{ins.text}`")

    def address(self, operand, ins: Instruction) -> Callable[[Lanes], np.ndarray]:
        """A function of lanes that gives their addresses as int64."""
        if not isinstance(operand, Address):
            raise Unsupported(f"address {operand} in `{ins.text}`")
        base, offset = operand.base, operand.offset
        if isinstance(base, Reg):
            array = self.register(base.name)
            if offset == 0:
                return lambda lanes: array[lanes.at].astype(np.int64)
            return lambda lanes: array[lanes.at].astype(np.int64) + offset
        start = base.value if isinstance(base, Imm) else self.symbol(base.name, ins)
        array = self.constant(start + offset, np.dtype(np.int64))
        return lambda lanes: array[lanes.at]

    def special(self, name: str, ins: Instruction) -> np.ndarray:
        if name in ("clock", "clock64", "globaltimer", "clock_hi", "globaltimer_lo"):
            return _Clock(self, name.startswith("globaltimer"))
        array = self._special.get(name)
        if array is None:
            array = self._special[name] = self._make_special(name, ins)
        return array

    def _make_special(self, name: str, ins: Instruction) -> np.ndarray:
        first, _, axis = name.partition(".")
        i = "xyz".find(axis) if axis else 0
        block_index = np.repeat(self.blocks, self.threads_per_block)
        ones = np.ones(self.size, np.int64)

        def split(index, shape):
            return (index, index // shape[0], index // (shape[0] * shape[1]))[i] % shape[i]

        lane = self.lane.astype(np.uint64)
        one = np.uint64(1)
        mask = np.uint64(0xFFFFFFFF)
        values = {
            "tid": lambda: split(self.thread, self.block),
            "ntid": lambda: ones * self.block[i],
            "ctaid": lambda: split(block_index, self.grid),
            "nctaid": lambda: ones * self.grid[i],
            "clusterid": lambda: split(block_index, self.grid) // (1 if i else self.cluster),
            "nclusterid": lambda: ones * (self.grid[i] // (1 if i else self.cluster)),
            "cluster_ctaid": lambda: block_index % self.cluster * (i == 0),
            "cluster_ctarank": lambda: block_index % self.cluster,
            "cluster_nctaid": lambda: ones * (1 if i else self.cluster),
            "cluster_nctarank": lambda: ones * self.cluster,
            "laneid": lambda: self.lane,
            "warpid": lambda: self.warp_in_block,
            "nwarpid": lambda: ones * 64,
            "smid": lambda: block_index % 132,
            "nsmid": lambda: ones * 132,
            "gridid": lambda: ones,
            "dynamic_smem_size": lambda: ones * self.dynamic_shared,
            "total_smem_size": lambda: ones * self.shared_limit,
            "lanemask_lt": lambda: (one << lane) - one,
            "lanemask_le": lambda: (one << (lane + one)) - one,
            "lanemask_eq": lambda: one << lane,
            "lanemask_gt": lambda: mask & ~((one << (lane + one)) - one),
            "lanemask_ge": lambda: mask & ~((one << lane) - one),
        }
        if first not in values:
            raise Unsupported(f"special register %{name} in `{ins.text}`")
        return values[first]()


class _FloatBits:
    """A register wider than the float it takes: the upper bits become zero."""

    def __init__(self, array: np.ndarray, dtype: np.dtype):
        self.array, self.bits = array, np.dtype(UNSIGNED[dtype.itemsize])
        self.dtype = dtype

    def __setitem__(self, at, value):
        self.array[at] = np.ascontiguousarray(value, self.dtype).view(self.bits)


class _Clock:
    """A clock register: reads the number of steps executed so far; what all devices share, those
    of all machines, and what the device's own clock is ahead."""

    def __init__(self, machine: Machine, shared: bool):
        self.machine, self.shared, self.dtype = machine, shared, np.dtype(np.uint64)

    def astype(self, dtype):
        clock = _Clock(self.machine, self.shared)
        clock.dtype = np.dtype(dtype)
        return clock

    def __getitem__(self, at):
        now = self.machine.now + (self.machine.others if self.shared else 0)
        return np.array(now, np.uint64).astype(self.dtype)
