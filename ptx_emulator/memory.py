"""Global, shared, local, parameter and constant memory: where bytes lie, and whose they are."""

import numpy as np

from .errors import Misaligned, OutOfBounds, UninitializedRead
from .machine import GLOBAL_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, Lanes, Machine
from .syntax import Instruction
from .types import UNSIGNED

NO_TILE = 255
_PAGE = 256  # arrays start on pages of their own, with one empty page between them


class Uninitialized:
    """Wraps an array argument whose elements must not be read before the kernel writes them."""

    def __init__(self, array: np.ndarray):
        self.array = array


def _address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


class GlobalMemory:
    """A copy of all arrays of a launch in one arena; a kernel sees exactly the arrays' bytes."""

    def __init__(self):
        self.arrays: list[tuple[np.ndarray, int]] = []
        self.spans: list[tuple[int, int, str]] = []  # begin, end in the arena, name
        self.pages: list[int] = [-1]
        self.unwritten: list[tuple[int, int]] = []

    def add(self, arrays: list[tuple[str, np.ndarray, bool]]) -> dict[int, int]:
        """Place arrays (name, array, uninitialised); id(array) -> generic address.

        Arrays that overlap on the host overlap here too; addresses keep their remainder by 16.
        """
        addresses: dict[int, int] = {}
        clusters: list[list] = []  # [begin, end, members] in host addresses
        for entry in sorted(arrays, key=lambda e: (_address_of(e[1]), e[1].nbytes)):
            begin = _address_of(entry[1])
            end = begin + entry[1].nbytes
            if clusters and begin < clusters[-1][1]:
                clusters[-1][1] = max(clusters[-1][1], end)
                clusters[-1][2].append(entry)
            else:
                clusters.append([begin, end, [entry]])
        for begin, end, members in clusters:
            names = "/".join(dict.fromkeys(name for name, _, _ in members))
            start = self.reserve(end - begin, names, begin % 16)
            for _, array, uninitialized in members:
                offset = start + _address_of(array) - begin
                addresses[id(array)] = GLOBAL_BASE + offset
                self.arrays.append((array, offset))
                if uninitialized:
                    self.unwritten.append((offset, offset + array.nbytes))
        return addresses

    def reserve(self, nbytes: int, name: str, remainder: int = 0) -> int:
        """Arena offset of `nbytes` new bytes, aligned to a page plus `remainder`."""
        start = len(self.pages) * _PAGE + remainder
        count = -(-(nbytes + remainder) // _PAGE)
        self.pages += [len(self.spans)] * count + [-1]
        self.spans.append((start, start + nbytes, name))
        return start

    def seal(self) -> None:
        """All arrays are known: make the arena and copy them in."""
        self.data = np.zeros(len(self.pages) * _PAGE, np.uint8)
        self.page_span = np.array(self.pages)
        self.begin = np.array([s[0] for s in self.spans] + [0])
        self.end = np.array([s[1] for s in self.spans] + [0])
        self.views = {n: self.data.view(dtype) for n, dtype in UNSIGNED.items()}
        for array, offset in self.arrays:
            flat = array.reshape(-1).view(np.uint8)
            self.data[offset : offset + array.nbytes] = flat
        self.written = None
        if self.unwritten:
            self.written = np.ones(len(self.data), np.bool_)
            for begin, end in self.unwritten:
                self.written[begin:end] = False

    def copy_back(self) -> None:
        for array, offset in self.arrays:
            if array.flags.writeable:
                flat = array.reshape(-1).view(np.uint8)
                flat[:] = self.data[offset : offset + array.nbytes]

    def outside(self, offsets: np.ndarray, nbytes: int) -> np.ndarray | None:
        """A mask of the accesses that lie in no array, or None when all is well."""
        low, high = int(offsets.min()), int(offsets.max()) + nbytes
        if low >= 0 and high <= len(self.data):
            span = self.pages[low // _PAGE]
            inside = span >= 0 and self.spans[span][0] <= low and high <= self.spans[span][1]
            if inside:  # the usual case: all lanes in one array
                return None
        clipped = np.clip(offsets, 0, len(self.data) - 1)
        span = self.page_span[clipped // _PAGE]
        good = (span >= 0) & (offsets == clipped)
        good &= (offsets >= self.begin[span]) & (offsets + nbytes <= self.end[span])
        return None if good.all() else ~good

    def describe(self, offset: int) -> str:
        """Where an offset lies, in words."""
        before = [s for s in self.spans if s[0] <= offset]
        if offset == -GLOBAL_BASE:
            return "a null pointer"
        if not before or offset > len(self.data):
            return f"address {offset + GLOBAL_BASE:#x}, far from any array"
        begin, end, name = before[-1]
        return f"byte {offset - begin} of {name} ({end - begin} bytes)"


class Memory:
    """The memory of a batch of blocks; bounds, alignment, races and initialisation are checked."""

    def __init__(self, machine: Machine, global_memory: GlobalMemory, params: np.ndarray, dynamic):
        self.machine, self.globals, self.params = machine, global_memory, params
        kernel = machine.kernel
        static = kernel.sizes["shared"]
        self.dynamic_offset = -(-static // 1024) * 1024
        self.limit = self.dynamic_offset + dynamic if dynamic else static
        machine.dynamic_shared, machine.shared_limit = dynamic, self.limit
        self.stride = -(-max(self.limit, 1) // 1024) * 1024
        # 0xCD everywhere: what nobody wrote looks odd wherever it ends up.
        self.shared = np.full(machine.num_blocks * self.stride, 0xCD, np.uint8)
        self.local_size = -(-max(kernel.sizes["local"], 1) // 16) * 16
        self.local = None
        self.shared_views = {n: self.shared.view(dtype) for n, dtype in UNSIGNED.items()}
        self.param_views = {n: params.view(dtype) for n, dtype in UNSIGNED.items()}
        self.block_base = machine.block_of.astype(np.int64) * self.stride
        self.shared_races = self.global_races = self.traffic = None
        # The swizzle with which TMA wrote every 16 bytes, for wgmma to read them with the same.
        self.tile_swizzle = None
        if any(ins.op == "wgmma" for ins in kernel.code):
            self.tile_swizzle = np.full(len(self.shared) // 16, NO_TILE, np.uint8)

    def locate(self, space: str, address, nbytes, lanes: Lanes, ins, write=False, atomic=False):
        """Checked byte offsets of one access a lane: (flat views by item size, offsets)."""
        if nbytes > 1 and (address & (nbytes - 1)).any():
            i = int(np.flatnonzero(address & (nbytes - 1))[0])
            self.machine.fail(
                Misaligned,
                f"misaligned {space} access of {nbytes} bytes at {self._name(space, address[i])}",
                lanes.ids[i],
                ins,
            )
        if self.traffic is not None:
            self.traffic.count(self.machine, space, address, nbytes, lanes)
        if space == "global" or space == "const":
            return self._locate_global(address, nbytes, lanes, ins, write, atomic, space)
        if space == "shared":
            offsets = self.shared_offsets(address, nbytes, lanes, ins, write)
            if write and self.tile_swizzle is not None:
                self.tile_swizzle[offsets >> 4] = NO_TILE
            if self.shared_races is not None:
                self.shared_races.access(lanes, offsets, nbytes, ins, write, atomic)
            return self.shared_views, offsets
        if space == "local":
            return self._locate_local(address, nbytes, lanes, ins, write)
        bad = (address < 0) | (address + nbytes > len(self.params))
        if bad.any() or write:
            i = int(np.flatnonzero(bad | write)[0])
            what = "a write to" if write else f"an access at byte {address[i]} of"
            self.machine.fail(OutOfBounds, f"{what} the parameters", lanes.ids[i], ins)
        return self.param_views, address

    def _name(self, space: str, address: int) -> str:
        if space == "global":
            return self.globals.describe(int(address) - GLOBAL_BASE)
        return f"{int(address):#x}"

    def shared_offsets(self, address, nbytes, lanes: Lanes, ins: Instruction, write: bool):
        """Bounds only: offsets into the batch's shared memory."""
        if int(address.min()) < 0 or int(address.max()) + nbytes > self.limit:
            i = int(np.flatnonzero((address < 0) | (address + nbytes > self.limit))[0])
            self.machine.fail(
                OutOfBounds,
                f"shared {'write' if write else 'read'} of {nbytes} bytes at {int(address[i])}, "
                f"the block has {self.limit} bytes",
                lanes.ids[i],
                ins,
            )
        return address + self.block_base[lanes.at]

    def locate_barrier(self, address, lanes: Lanes, ins: Instruction) -> None:
        """Check that mbarriers lie in shared memory, 8 bytes each."""
        if (address & 7).any():
            i = int(np.flatnonzero(address & 7)[0])
            what = f"misaligned mbarrier at {int(address[i]):#x}"
            self.machine.fail(Misaligned, what, lanes.ids[i], ins)
        self.shared_offsets(address, 8, lanes, ins, False)

    def _locate_global(self, address, nbytes, lanes, ins, write, atomic, space):
        memory, offsets = self.globals, address - GLOBAL_BASE
        outside = memory.outside(offsets, nbytes)
        if outside is not None:
            i = int(np.flatnonzero(outside)[0])
            kind = "atomic" if atomic and write else "write" if write else "read"
            self.machine.fail(
                OutOfBounds,
                f"global {kind} of {nbytes} bytes at {memory.describe(int(offsets[i]))}",
                lanes.ids[i],
                ins,
            )
        if memory.written is not None:
            covered = offsets[:, None] + np.arange(nbytes)
            if not write or atomic:
                fresh = ~memory.written[covered].all(axis=1)
                if fresh.any():
                    i = int(np.flatnonzero(fresh)[0])
                    self.machine.fail(
                        UninitializedRead,
                        f"read of {memory.describe(int(offsets[i]))}, which nothing has written",
                        lanes.ids[i],
                        ins,
                    )
            if write:
                memory.written[covered] = True
        if self.global_races is not None and space != "const":
            self.global_races.access(lanes, offsets, nbytes, ins, write, atomic)
        return memory.views, offsets

    def _locate_local(self, address, nbytes, lanes, ins, write):
        if self.local is None:
            self.local = np.full(self.machine.size * self.local_size, 0xCD, np.uint8)
            self.local_views = {n: self.local.view(dtype) for n, dtype in UNSIGNED.items()}
        limit = self.machine.kernel.sizes["local"]
        bad = (address < 0) | (address + nbytes > limit)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self.machine.fail(
                OutOfBounds,
                f"local {'write' if write else 'read'} of {nbytes} bytes at {int(address[i])}, "
                f"a thread has {limit} bytes",
                lanes.ids[i],
                ins,
            )
        return self.local_views, address + lanes.ids * self.local_size

    def split_generic(self, address: np.ndarray, lanes: Lanes):
        """Generic addresses -> a list of (space, addresses in it, lanes, selection or None)."""
        if int(address.min()) >= GLOBAL_BASE:
            return [("global", address, lanes, None)]
        parts = []
        edges = (
            ("global", 0, SHARED_BASE, 0),  # null and its neighbours: reported as global
            ("shared", SHARED_BASE, LOCAL_BASE, SHARED_BASE),
            ("local", LOCAL_BASE, PARAM_BASE, LOCAL_BASE),
            ("param", PARAM_BASE, GLOBAL_BASE, PARAM_BASE),
            ("global", GLOBAL_BASE, 1 << 62, 0),
        )
        for space, low, high, base in edges:
            chosen = (address >= low) & (address < high)
            if chosen.all():
                return [(space, address - base, lanes, None)]
            if chosen.any():
                parts.append((space, address[chosen] - base, lanes.where(chosen), chosen))
        return parts
