// The epilogue of the experts' first product on sm_90a. A finished tile goes through the warp's
// staging, so that a lane holds 8 neighbouring columns of a row: the activation works on those, and
// memory sees 16 bytes a lane.
#pragma once

#include "style.cuh"

namespace moekernels::cuda::sm90 {

// h = C + b1, a = act(h); a tile has 128 columns of F, gate and up, or 256 of an ungated one.
template <class T>
struct StoreUp {
  using Type = T;
  static constexpr int kColumns = 256;
  static constexpr bool kPrefetches = false;
  struct Args {
    T* h;         // [R, G] or null
    T* a;         // [R, F] or null
    const T* b1;  // [E, G] or null
    ExpertStyle style;
  };

  template <class Tile>
  static __device__ void prefetch(const Args&, const Tile&, int) {}

  static __device__ TileColumns columns_of(const ExpertStyle& style, int32_t tile) {
    return style.gated() ? gated_columns(kColumns, tile, style.ffn, style.interleaved)
                         : plain_columns(kColumns, tile, style.ffn);
  }

  template <class Tile>
  static __device__ void clear(const Args& to, const Tile& tile, int64_t row, int lane) {
    if (to.h == nullptr) return;
    const TileColumns columns = columns_of(to.style, tile.column_tile);
    for (int64_t from = 0; from < kColumns; from += columns.split) {
      const int64_t begin = columns.at(from);
      clear_rows(to.h, row, tile.row_end, to.style.width(), begin,
                 begin + columns.valid(from, columns.split), lane);
    }
  }

  // Columns of the tile that a staged chunk holds: 64 of each half in a part, whether or not the
  // halves differ.
  static constexpr __device__ int column_of(int part, int chunk) {
    return part * 64 + chunk % 8 * 8 + chunk / 8 * 128;
  }

  template <int kPart>
  static __device__ void stage(const float (&d)[128], char* staging, int lane) {
    stage_rows(staging, lane, [&](int block, int half) {
      const float* c = d + column_of(kPart, block) / 2 + half * 2;
      return pack<T>(c[0], c[1]);
    });
  }

  // A lane keeps its 8 columns of F, and takes every kStep-th of `rows` rows.
  template <Activation kind, bool kAlternate>
  static __device__ void activate_part(const Args& to, const TileColumns& columns, int part,
                                       const char* staging, int64_t row, int rows, int lane) {
    constexpr bool kGated = kind <= Activation::swiglu_clamped;
    constexpr int kLanes = kGated ? 8 : 16, kStep = 32 / kLanes;  // lanes of a row
    const ExpertStyle& style = to.style;
    const int i = lane % kLanes, first = kAlternate ? 2 * i : i,
              second = kAlternate ? first + 1 : 8 + i;
    const int column = column_of(part, first);
    if (columns.within(column) >= columns.count) return;
    const int64_t width = (kGated ? 2 : 1) * style.ffn, at = columns.at(column);
    T* h = to.h + (row + lane / kLanes) * width + at;
    T* a = to.a + (row + lane / kLanes) * style.ffn + (kAlternate ? at / 2 : at);
#pragma unroll 1
    for (int r = lane / kLanes; r < rows; r += kStep, h += kStep * width, a += kStep * style.ffn) {
      const uint4 p = staged_chunk(staging, r, first),
                  q = kGated ? staged_chunk(staging, r, second) : uint4{};
      if (to.h != nullptr) {
        put(h, p);
        if (kGated) put(h + (kAlternate ? 8 : style.ffn), q);
      }
      if (to.a == nullptr) continue;
      float g[8], u[8];
      split_gate<T, kAlternate>(p, q, g, u);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        g[e] = moekernels::activate<kind, FastMath>(g[e], u[e], style.alpha, style.limit).a;
      put(a, pack8<T>(g));
    }
  }

  template <class Tile>
  static __device__ void store(const Args& to, const Tile& tile, float (&d)[128], char* staging,
                               int64_t row, int lane) {
    if (row >= tile.row_end) return;
    const TileColumns columns = columns_of(to.style, tile.column_tile);
    if (to.b1 != nullptr) {
      const bool exists = columns.within(lane * 8) < columns.count;
      const T* bias = to.b1 + tile.group * to.style.width();
      add_bias<T>(d, exists ? get(bias + columns.at(lane * 8)) : uint4{}, staging, lane);
    }
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      if (part == 0) {
        stage<0>(d, staging, lane);
      } else {
        stage<1>(d, staging, lane);
      }
      const int rows = static_cast<int>(tile.row_end - row < 16 ? tile.row_end - row : 16);
      with_style(to.style, [&](auto kind, auto alternate) {
        activate_part<decltype(kind)::value, decltype(alternate)::value>(to, columns, part, staging,
                                                                         row, rows, lane);
      });
    }
  }
};

}  // namespace moekernels::cuda::sm90
