"""What a product kernel does to a tile, as far as its time depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

LINE = 128  # bytes of a row of a stage


@dataclass(frozen=True)
class Kernel:
    """A persistent kernel of one producer and two consumer warpgroups.

    epilogue: `direct` stops the consumers, `hidden` runs in a warpgroup of its own behind a buffer,
    `pingpong` gives each consumer a tile of its own, so that one multiplies while the other stores.
    pair: two SMs of a cluster share A (`n`: neighbours along N) or B (`m`), or nothing (``).
    issue: instructions that all warps together issue for a tile's epilogue, from the machine code.
    pack: cycles that a hidden epilogue still stops the consumers for.
    gathered: A comes row by row, by cp.async, not by TMA.
    bulk_sums: L2 adds to what is there, so that what an epilogue reads passes no SM.
    skips: of a tile that has few rows, only the 64s of them that exist are multiplied.
    fp8: operands are bytes, multiplied at twice the rate; one consumer promotes its sums while the
    other multiplies.
    segments: microbatches whose products one launch adds to the same sums, tile by tile.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    epilogue: str = "direct"
    pair: str = ""
    issue: float = 5600.0
    pack: float = 900.0
    gathered: bool = False
    bulk_sums: bool = False
    segments: int = 1
    skips: bool = True
    band: int = 0
    grid: int = 0
    fp8: bool = False

    @property
    def depth(self) -> int:
        """Of K, a step."""
        return LINE if self.fp8 else LINE // 2

    @property
    def loads(self) -> tuple[int, int]:
        """Bytes of A and of B that a step of one SM needs."""
        return self.tile_m * LINE, self.tile_n * LINE

    @property
    def tensor(self) -> float:
        """Cycles of the tensor cores for a step."""
        return self.tile_m * self.tile_n * LINE / 4096

    @property
    def name(self) -> str:
        parts = [f"{self.tile_m}x{self.tile_n}", f"{self.stages} stages", self.epilogue]
        parts += [f"pairs along {self.pair.upper()}"] * bool(self.pair)
        parts += ["gathered"] * self.gathered + ["bulk sums"] * self.bulk_sums + ["FP8"] * self.fp8
        parts += [f"{self.segments} microbatches"] * (self.segments > 1)
        parts += [f"bands of {self.band}"] * bool(self.band)
        return ", ".join(parts)

    def share(self, rows: int) -> float:
        """Of the products of a whole tile, those that one of so many rows takes."""
        if not self.skips or self.epilogue == "pingpong":
            return 1.0
        return min(1.0, -(-rows // 64) * 64 / self.tile_m)

    def passes(self, problem: Problem) -> float:
        """Bytes that pass between an SM and L2 for an element of C."""
        return problem.writes + (0.0 if self.bulk_sums else problem.reads)


@dataclass(frozen=True)
class Problem:
    """C [m, n] = A [m, k] B of each group. For the row products `counts` are the groups' m; for
    wgrad (`over_rows`) they are the groups' k, and m and n are one gradient's.

    reads, writes: bytes that the epilogue moves for an element of C."""

    counts: tuple[int, ...]
    m: int
    n: int
    k: int
    over_rows: bool = False
    reads: float = 0.0
    writes: float = 2.0

    @property
    def flops(self) -> float:
        rows = sum(self.counts)
        return 2.0 * self.m * self.n * rows if self.over_rows else 2.0 * rows * self.n * self.k

    def shortened(self, share: float) -> Problem:
        """The same with a share of the sums' length."""
        if self.over_rows:
            return replace(self, counts=tuple(-int(-rows * share // 1) for rows in self.counts))
        return replace(self, k=max(1, round(self.k * share)))
