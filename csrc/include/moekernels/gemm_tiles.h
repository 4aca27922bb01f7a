// Which tile of which expert a thread block works on: plain index arithmetic, 64 bits wide, for
// every grouped product. The rows past offsets[E] are the last group, number E, whose outputs are
// zero.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct RowRange {
  int64_t begin, end;
};

// One tile of rows; group -1: there is no such tile.
struct RowTile {
  int64_t group, begin, end;  // rows [begin, end) of the tile, all of one group
};

MOEKERNELS_BOTH inline int64_t tile_count(int64_t length, int64_t tile) {
  return (length + tile - 1) / tile;
}

// The rows of a group, whatever `offsets` holds: within [0, rows], never of negative length.
MOEKERNELS_BOTH inline RowRange rows_of_group(const int64_t* offsets, int64_t group,
                                              int64_t experts, int64_t rows) {
  const auto inside = [rows](int64_t row) { return row < 0 ? 0 : row > rows ? rows : row; };
  const int64_t begin = inside(offsets[group]),
                end = group < experts ? inside(offsets[group + 1]) : rows;
  return {begin, end < begin ? begin : end};
}

// The most row tiles that any ascending offsets give, the last group's among them: what a grid is
// made of without reading the offsets. A group adds at most one tile that is not full, and no more
// groups than rows hold any.
MOEKERNELS_BOTH inline int64_t row_tiles_bound(int64_t rows, int64_t experts, int64_t tile) {
  const int64_t groups = rows < experts + 1 ? rows : experts + 1;
  return (rows + groups * (tile - 1)) / tile;
}

// Tile number `index` in the order of the groups. Kernels find it with a warp (common/tiles.cuh);
// this is its meaning.
MOEKERNELS_BOTH inline RowTile row_tile(const int64_t* offsets, int64_t experts, int64_t rows,
                                        int64_t tile, int64_t index) {
  for (int64_t group = 0; group <= experts; ++group) {
    const RowRange range = rows_of_group(offsets, group, experts, rows);
    const int64_t count = tile_count(range.end - range.begin, tile);
    if (index < count) {
      const int64_t begin = range.begin + index * tile;
      return {group, begin, begin + tile < range.end ? begin + tile : range.end};
    }
    index -= count;
  }
  return {-1, 0, 0};
}

// How the columns of a tile map to those of the weights: `split` of them from `first`, the others
// from `second`; in both halves those at `count` and beyond do not exist. A plain product has one
// half; a gated up-projection whose gate and up columns lie F apart has two.
struct TileColumns {
  int64_t split, first, second, count;
  MOEKERNELS_BOTH int64_t within(int64_t column) const {
    return column < split ? column : column - split;
  }
  MOEKERNELS_BOTH int64_t at(int64_t column) const {
    return (column < split ? first : second) + within(column);
  }
  // How many columns from `column` on exist and lie side by side, at most `most`.
  MOEKERNELS_BOTH int64_t valid(int64_t column, int64_t most) const {
    const int64_t left = count - within(column);
    return left < 0 ? 0 : left < most ? left : most;
  }
};

MOEKERNELS_BOTH inline TileColumns plain_columns(int64_t tile_n, int64_t index, int64_t width) {
  return {tile_n, index * tile_n, 0, width - index * tile_n};
}

// Tile `index` of a gated up-projection holds tile_n / 2 columns of F, gate and up.
MOEKERNELS_BOTH inline TileColumns gated_columns(int64_t tile_n, int64_t index, int64_t ffn,
                                                 bool interleaved) {
  const int64_t begin = index * (tile_n / 2);
  if (interleaved) return {tile_n, 2 * begin, 0, 2 * (ffn - begin)};
  return {tile_n / 2, begin, ffn + begin, ffn - begin};
}

}  // namespace moekernels
