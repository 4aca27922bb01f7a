"""The order in which the persistent kernels walk the tiles of a grouped product: the header that
they include, compiled for the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

INCLUDE = Path(__file__).parents[2] / "csrc" / "include"
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on PATH")
BAND = 16

SOURCE = """
#include "moekernels/tile_order.h"
using namespace moekernels;
extern "C" {
int64_t walk(const int32_t* first, int32_t groups, int32_t columns, int32_t band, int64_t begin,
             int32_t stride, int64_t most, TilePosition* out) {
  const TileGrid grid{first, groups, columns, band};
  TilePosition at{};
  int64_t n = 0;
  for (int32_t i = begin; n < most && find_tile(grid, i, at); i += stride) out[n++] = at;
  return n;
}
bool fits(int64_t rows, int64_t groups, int64_t columns, int64_t tile_m, int64_t tile_n) {
  return tile_order_fits(rows, groups, columns, tile_m, tile_n);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tile_order")
    (folder / "order.cpp").write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-ftrapv", "-shared", "-fPIC", f"-I{INCLUDE}"]
    subprocess.run([*command, "order.cpp", "-o", "order.so"], cwd=folder, check=True)
    found = ctypes.CDLL(str(folder / "order.so"))
    found.walk.restype, found.fits.restype = ctypes.c_int64, ctypes.c_bool
    found.fits.argtypes = [ctypes.c_int64] * 5
    return found


def walk(library, row_tiles, columns, begin=0, stride=1, most=1 << 20, band=BAND) -> np.ndarray:
    """[n, 3]: group, row tile, column tile."""
    first = np.concatenate([[0], np.cumsum(row_tiles)]).astype(np.int32)
    out = np.zeros((most, 3), np.int32)
    n = library.walk(
        first.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int32(len(row_tiles)),
        ctypes.c_int32(columns),
        ctypes.c_int32(band),
        ctypes.c_int64(begin),
        ctypes.c_int32(stride),
        ctypes.c_int64(most),
        out.ctypes.data_as(ctypes.c_void_p),
    )
    return out[:n]


GROUPS = [[1], [0], [3, 0, 0, 5], [0, 0, 40, 1], [16, 17, 33, 0], [7] * 9]


@pytest.mark.parametrize("row_tiles", GROUPS)
@pytest.mark.parametrize("columns", [1, 2, 7, 32])
@pytest.mark.parametrize("band", [1, BAND, 64, -1, -BAND])
def test_every_tile_once_group_by_group(library, row_tiles, columns, band):
    tiles = walk(library, row_tiles, columns, band=band)
    expected = {
        (g, r, c) for g, n in enumerate(row_tiles) for r in range(n) for c in range(columns)
    }
    assert len(tiles) == len(expected) and {tuple(t) for t in tiles.tolist()} == expected
    assert (np.diff(tiles[:, 0]) >= 0).all()


@pytest.mark.parametrize("row_tiles", GROUPS)
def test_persistent_blocks_share_the_walk(library, row_tiles):
    tiles = walk(library, row_tiles, 5)
    for blocks in (1, 3, 132):
        for b in range(min(blocks, 4)):
            np.testing.assert_array_equal(walk(library, row_tiles, 5, b, blocks), tiles[b::blocks])


def test_bands_share_operands(library):
    """Down a band first: neighbours in time have the same column of weights, and a band of rows."""
    tiles = walk(library, [40], 6)
    for i in range(0, 2 * BAND * 6, BAND):
        part = tiles[i : i + BAND]
        assert len(set(part[:, 2].tolist())) == 1
        assert len(set((part[:, 1] // BAND).tolist())) == 1
    assert set((tiles[: BAND * 6, 1] // BAND).tolist()) == {0}


def test_past_31_bits_of_elements(library):
    """The most rows there can be, in two experts of which one has nearly all: indices, rows and
    element offsets stay exact far past 2^31 (-ftrapv traps on any overflow)."""
    rows, width, tile = 2**31 - 1, 8192, 128
    row_tiles = [1, 0, -(-(rows - 5) // tile)]
    columns = width // 256
    total = sum(row_tiles) * columns
    assert library.fits(rows, 3, width, tile, 256)
    for index in (columns, 2**28 + 12345, total - 1):
        (tile_at,) = walk(library, row_tiles, columns, index, 132, 1)
        local = index - columns
        band, rest = divmod(local, BAND * columns)
        height = min(BAND, row_tiles[2] - band * BAND)
        column, row = divmod(rest, height)
        assert tile_at.tolist() == [2, band * BAND + row, column]
        element = (5 + int(tile_at[1]) * tile) * width
        assert element < rows * width and (index == columns or element > 2**31)
    assert len(walk(library, row_tiles, columns, total, 132, 1)) == 0


def test_what_32_bits_cannot_count_is_refused(library):
    assert library.fits(1 << 20, 64, 8192, 128, 256)
    assert not library.fits(1 << 31, 64, 256, 128, 256)
    assert not library.fits(1 << 20, 64, 1 << 31, 128, 256)
    assert not library.fits((1 << 31) - 1, 1, 1 << 20, 128, 128)


def test_balanced_bands_leave_no_short_one(library):
    """17 rows of tiles are 9 and 8, not 16 and 1: the second operand is read twice, not three
    times as it were."""
    tiles = walk(library, [17], 3, band=-16)
    assert tiles[: 9 * 3, 1].max() == 8 and tiles[9 * 3 :, 1].min() == 9
    fixed = walk(library, [17], 3, band=16)
    assert fixed[: 16 * 3, 1].max() == 15 and (fixed[16 * 3 :, 1] == 16).all()
