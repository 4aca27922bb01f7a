"""The order in which a persistent kernel works off its tiles: moekernels/tile_order.h in Python."""

from __future__ import annotations

import random
from collections.abc import Iterator

BAND = 16  # rows of tiles, kTileBand


def place_in_bands(index: int, row_tiles: int, column_tiles: int, band: int) -> tuple[int, int]:
    """The index-th of row_tiles x column_tiles tiles -> (row tile, column tile)."""
    if band < 0:
        bands = -(-row_tiles // -band)
        band = -(-row_tiles // bands)
    before, rest = divmod(index, band * column_tiles)
    height = min(band, row_tiles - before * band)
    column, row = divmod(rest, height)
    return before * band + row, column


def expert_counts(rows: int, experts: int, seed: int = 0) -> list[int]:
    """Rows of each expert [E] under a uniform random routing, by the normal law."""
    draw, left, counts = random.Random(seed), rows, []
    for i in range(experts, 0, -1):
        mean = left / i
        spread = (left * (1 / i) * (1 - 1 / i)) ** 0.5
        counts.append(left if i == 1 else max(0, min(left, round(draw.gauss(mean, spread)))))
        left -= counts[-1]
    return counts


def tiles_of(
    counts: list[int], tile_rows: int, column_tiles: int, band: int = BAND
) -> Iterator[tuple[int, int, int, int]]:
    """Every tile in order: (group, row tile, column tile, rows that exist)."""
    for group, rows in enumerate(counts):
        row_tiles = -(-rows // tile_rows)
        for index in range(row_tiles * column_tiles):
            row, column = place_in_bands(index, row_tiles, column_tiles, band or BAND)
            yield group, row, column, min(tile_rows, rows - row * tile_rows)
