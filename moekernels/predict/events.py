"""Plays a kernel on a card by discrete events, one for each stage that a producer fills.

A stage is asked for when its slot of the ring is free; it passes the SM's link, the one server of
the L2 cache and, where the cache has lost or never held it, the one server of the DRAM. The tensor
cores take the stages in order. At a tile's end the epilogue takes issue slots and memory, beside
the next tile or before it, as the kernel says. A few waves are played; what is left takes the time
of the later ones.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from moekernels.predict.card import Card
from moekernels.predict.kernel import Kernel, Problem
from moekernels.predict.walk import tiles_of

MOST_LOADS, LEAST_WAVES = 10_000, 4  # that are played
LEAST_OF_SEGMENTS = 2  # waves: all segments of a tile are one
MOST_STEPS = 256  # of a tile
EPILOGUE_GAP = 300.0  # cycles, to begin and to end one


@dataclass(frozen=True)
class Predicted:
    """seconds: of the launch. tflops: of the products that the problem asks for, no waste counted,
    of each of the kernel's segments.
    tensor: the share of the time in which the tensor cores work; dram: bytes moved."""

    seconds: float
    tflops: float
    tensor: float
    dram: float


@dataclass(frozen=True)
class Tile:
    """One tile of one SM, or of a pair of them. key: what of A and of B it reads."""

    steps: int
    rows: int  # that exist
    key: tuple[tuple, tuple]


def tiles(problem: Problem, kernel: Kernel) -> Iterator[Tile]:
    """The tiles of a launch in the order that the kernel's walk gives."""
    along_m, along_n = 1 + (kernel.pair == "m"), 1 + (kernel.pair == "n")
    tile_m, tile_n = kernel.tile_m * along_m, kernel.tile_n * along_n
    columns = -(-problem.n // tile_n)
    of_groups = problem.counts
    if problem.over_rows:
        of_groups = tuple(problem.m if rows else 0 for rows in problem.counts)
    steps = -(-problem.k // kernel.depth)
    for group, row, column, rows in tiles_of(list(of_groups), tile_m, columns, kernel.band):
        if problem.over_rows:
            steps = -(-problem.counts[group] // kernel.depth)
        yield Tile(steps, rows, ((group, row), (group, -1 - column)))


def total_work(problem: Problem, kernel: Kernel) -> tuple[float, int]:
    """Of all tiles of a segment: the sum of steps, by their products; the mean steps of one."""
    columns = -(-problem.n // (kernel.tile_n * (1 + (kernel.pair == "n"))))
    tile_m = kernel.tile_m * (1 + (kernel.pair == "m"))

    def along_m(rows: int) -> float:
        full, rest = divmod(rows, tile_m)
        return full + (kernel.share(rest) if rest else 0.0)

    groups = [rows for rows in problem.counts if rows]
    if problem.over_rows:
        depths = [-(-rows // kernel.depth) for rows in groups]
        return columns * along_m(problem.m) * sum(depths), sum(depths) // max(1, len(depths))
    steps = -(-problem.k // kernel.depth)
    return columns * sum(map(along_m, groups)) * steps, steps


class Cache:
    """What L2 holds: the least recently used goes first."""

    def __init__(self, nbytes: int):
        self.left = nbytes
        self.lines: OrderedDict[Hashable, int] = OrderedDict()

    def misses(self, key: Hashable, nbytes: int) -> int:
        """Bytes that have to come from DRAM."""
        if key in self.lines:
            self.lines.move_to_end(key)
            return 0
        self.lines[key] = nbytes
        self.left -= nbytes
        while self.left < 0:
            self.left += self.lines.popitem(last=False)[1]
        return nbytes


class Machine:
    """The servers that all SMs share."""

    def __init__(self, card: Card):
        self.card, self.cache = card, Cache(card.l2_bytes)
        self.l2 = self.dram = 0.0  # when they are free
        self.dram_rate = card.dram / (card.clock_ghz * 1e9)
        self.dram_bytes = 0.0

    def from_dram(self, at: float, nbytes: float) -> float:
        if nbytes:
            self.dram = max(self.dram, at) + nbytes / self.dram_rate
            self.dram_bytes += nbytes
        return self.dram

    def from_l2(self, at: float, nbytes: float) -> float:
        self.l2 = max(self.l2, at) + nbytes / self.card.l2_rate
        return self.l2


def epilogue_cycles(problem: Problem, kernel: Kernel, card: Card, share: float = 1.0) -> float:
    """Of a tile of which a share of the rows exists: its instructions or bytes, whichever is
    longer."""
    moved = kernel.tile_m * kernel.tile_n * share * kernel.passes(problem)
    instructions = kernel.issue / (4 * card.ipc) * share
    return max(instructions, moved / card.link_rate) + EPILOGUE_GAP


class Unit:
    """An SM, or a cluster of two that go in step: its ring, tensor cores and epilogue."""

    def __init__(self, machine: Machine, kernel: Kernel, problem: Problem):
        self.machine, self.kernel, self.problem = machine, kernel, problem
        self.card = machine.card
        self.sms = 2 if kernel.pair else 1
        self.free = [0.0] * kernel.stages
        self.stage = self.step = 0
        self.issued = self.link = 0.0  # when the producer and the link are free
        self.multiplied = 0.0  # the end of the products so far
        self.stored = [0.0, 0.0]  # the ends of the epilogues of the last two tiles
        self.busy = 0.0
        self.done: list[tuple[float, float]] = []
        a, b = kernel.loads
        self.a, self.b = a, b
        # What the cluster asks the cache for, and what passes each SM's link.
        self.from_l2 = (a if kernel.pair == "n" else a * self.sms) + (
            b if kernel.pair == "m" else b * self.sms
        )

    def begin(self, tile: Tile, segment: int = 0) -> None:
        self.tile, self.segment, self.step = tile, segment, 0
        # The products of a tile wait for the epilogue that holds their accumulators.
        self.multiplied = max(self.multiplied, self.stored[0]) + self.card.tile_gap

    def ready(self) -> float:
        """When the next stage can be asked for."""
        return max(self.issued, self.free[self.stage])

    def load(self, at: float) -> bool:
        """Asks for the next stage at this time and multiplies it; True: the tile is over."""
        machine, kernel, tile = self.machine, self.kernel, self.tile
        card = self.card
        (a_key, b_key), step = tile.key, (self.segment, self.step)
        missed = machine.cache.misses((a_key, step), self.a * (2 if kernel.pair == "m" else 1))
        missed += machine.cache.misses((b_key, step), self.b * (2 if kernel.pair == "n" else 1))
        self.link = max(self.link, at) + (self.a + self.b) / card.link_rate
        full = max(self.link, machine.from_l2(at, self.from_l2)) + card.l2_latency
        if missed:
            full = max(full, machine.from_dram(at, missed) + card.l2_latency + card.dram_latency)
        self.issued = at + card.issue
        tensor = kernel.tensor * kernel.share(tile.rows)
        self.multiplied = max(self.multiplied, full + card.sync) + tensor + card.step_gap
        self.multiplied += card.gather_gap if kernel.gathered else 0.0
        self.busy += tensor
        self.free[self.stage] = self.multiplied + card.sync * (2 if kernel.pair else 1)
        self.stage = (self.stage + 1) % kernel.stages
        self.step += 1
        return self.step >= tile.steps

    def end(self) -> tuple[float, float, float]:
        """The tile's epilogue -> when it moves how many bytes of L2 and of DRAM."""
        kernel, problem, tile = self.kernel, self.problem, self.tile
        share = min(1.0, tile.rows / (kernel.tile_m * (2 if kernel.pair == "m" else 1)))
        elements = kernel.tile_m * kernel.tile_n * share
        takes = epilogue_cycles(problem, kernel, self.card, share)
        begin = self.multiplied
        if kernel.epilogue == "hidden":
            begin = max(begin, self.stored[1]) + kernel.pack
            self.stored = [begin, begin + takes]
        elif kernel.epilogue == "pingpong":
            self.stored = [self.stored[1], max(begin, self.stored[0]) + takes]
        else:
            self.stored = [begin + takes, begin + takes]
        self.done.append((self.stored[1], tile.steps * kernel.share(tile.rows)))
        elements *= self.sms
        moved = elements * (problem.reads + problem.writes)
        # Where a segment before has brought the sums, they may still be there.
        if kernel.segments > 1 and not self.machine.cache.misses(tile.key, int(4 * elements)):
            moved = 0.0
        return begin, elements * kernel.passes(problem), moved


@functools.cache
def predict(problem: Problem, kernel: Kernel, card: Card) -> Predicted:
    """The time of one launch. Beyond so many steps a tile, time grows by the same for each."""
    _, steps = total_work(problem, kernel)
    if steps <= MOST_STEPS:
        return play(problem, kernel, card)
    parts = (MOST_STEPS, MOST_STEPS // 2)
    long, short = (play(problem.shortened(part / steps), kernel, card) for part in parts)
    more = (steps - parts[0]) / (parts[0] - parts[1])
    seconds = long.seconds + more * (long.seconds - short.seconds)
    dram = long.dram + more * (long.dram - short.dram)
    tflops = kernel.segments * problem.flops / seconds / 1e12
    return Predicted(seconds, tflops, long.tensor, dram)


def play(problem: Problem, kernel: Kernel, card: Card) -> Predicted:
    """The same, played out."""
    machine = Machine(card)
    per_unit = 2 if kernel.pair else 1
    count = (kernel.grid or card.multiprocessors) // per_unit
    work, steps = total_work(problem, kernel)
    if not work:
        return Predicted(card.launch_s, 0.0, 0.0, 0.0)
    work *= kernel.segments
    least = LEAST_WAVES if kernel.segments == 1 else LEAST_OF_SEGMENTS
    waves = max(least, MOST_LOADS // (count * max(1, steps * kernel.segments)))
    played = list(itertools.islice(tiles(problem, kernel), waves * count))
    count = min(count, len(played))
    units = [Unit(machine, kernel, problem) for _ in range(count)]
    queues = [played[i::count] for i in range(count)]
    # (when, which unit, its tile's place, 0, 0), or for an epilogue (when, -1, 0, its bytes of L2
    # and of DRAM)
    heap: list[tuple[float, int, int, float, float]] = []
    for i, unit in enumerate(units):
        unit.begin(queues[i][0])
        heap.append((unit.ready(), i, 0, 0.0, 0.0))
    heapq.heapify(heap)
    while heap:
        at, i, place, passed, moved = heapq.heappop(heap)
        if i < 0:
            machine.from_l2(at, passed)
            machine.from_dram(at, moved)
            continue
        unit = units[i]
        if unit.tile.steps == 0 or unit.load(at):
            begin, passed, moved = unit.end()
            heapq.heappush(heap, (begin, -1, 0, passed, moved))
            if unit.segment + 1 < kernel.segments:
                unit.begin(unit.tile, unit.segment + 1)
            else:
                place += 1
                if place == len(queues[i]):
                    continue
                unit.begin(queues[i][place])
        heapq.heappush(heap, (unit.ready(), i, place, 0.0, 0.0))
    end = max(u.done[-1][0] for u in units)
    done = sum(t.steps * kernel.share(t.rows) for t in played) * kernel.segments
    if done < work:
        # What was not played goes at the pace of the later half of what was.
        pace = 0.0
        for unit in units:
            half = len(unit.done) // 2
            later = unit.done[half:]
            pace += sum(n for _, n in later) / (later[-1][0] - unit.done[half - 1][0])
        end += (work - done) / pace
    moved = machine.dram_bytes * work / done
    end = max(end, moved / machine.dram_rate)  # what an epilogue sends there, nobody waits for
    seconds = end / (card.clock_ghz * 1e9) + card.launch_s
    busy = sum(u.busy for u in units) * per_unit * work / done
    return Predicted(
        seconds,
        kernel.segments * problem.flops / seconds / 1e12,
        busy / (end * card.multiprocessors),
        moved,
    )
