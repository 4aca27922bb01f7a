// In which order the persistent kernels work off the tiles of a grouped product: plain index
// arithmetic, fixed by the shape and the groups' sizes alone. Kernels call it as it is, tests on
// the host.
#pragma once

#include <cstdint>

#include "moekernels/gemm_tiles.h"

namespace moekernels {

// The tiles of all groups lie one after the other; first_row_tile [groups+1] counts those before
// each group, in rows of tiles. An empty group has none.
struct TileGrid {
  const int32_t* first_row_tile;
  int32_t groups, column_tiles;
  int32_t band;
};

struct TilePosition {
  int32_t group, row_tile, column_tile;
};

// So many rows of tiles are worked off column by column: what runs at one time shares the tiles of
// both operands in L2. 16 rows of tiles by 8 columns are a wave of the 132 SMs of an H200.
constexpr int32_t kTileBand = 16;

// The index-th of row_tiles x column_tiles tiles. A band of -n: at most n, of one height as far as
// that goes, so that no short one is left.
MOEKERNELS_BOTH inline void place_in_bands(int32_t index, int32_t row_tiles, int32_t column_tiles,
                                           int32_t band, TilePosition& position) {
  if (band < 0) {
    const int32_t bands = (row_tiles - 1 - band) / -band;
    band = (row_tiles + bands - 1) / bands;
  }
  const int32_t in_band = band * column_tiles;
  const int32_t before = index / in_band, first = before * band;
  const int32_t height = row_tiles - first < band ? row_tiles - first : band;
  const int32_t rest = index - before * in_band;
  position.column_tile = rest / height;
  position.row_tile = first + rest - position.column_tile * height;
}

// Moves `position` on to the index-th tile; false behind the last. The index must not fall from
// call to call: a walk over all tiles passes each group once, which costs an empty one a load.
MOEKERNELS_BOTH inline bool find_tile(const TileGrid& grid, int32_t index, TilePosition& position) {
  int32_t group = position.group;
  while (group < grid.groups && index >= grid.first_row_tile[group + 1] * grid.column_tiles)
    ++group;
  position.group = group;
  if (group >= grid.groups) return false;
  const int32_t first = grid.first_row_tile[group];
  place_in_bands(index - first * grid.column_tiles, grid.first_row_tile[group + 1] - first,
                 grid.column_tiles, grid.band, position);
  return true;
}

// Whether 32 bits count the tiles of `rows` in any division, with room for a walk past their end.
inline bool tile_order_fits(int64_t rows, int64_t groups, int64_t columns, int64_t tile_rows,
                            int64_t tile_columns) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t row_tiles = row_tiles_bound(rows, groups, tile_rows),
                column_tiles = tile_count(columns, tile_columns);
  return rows < int64_t{1} << 31 && columns < int64_t{1} << 31 && row_tiles <= kMost &&
         column_tiles <= kMost && row_tiles * column_tiles <= kMost;
}

}  // namespace moekernels
