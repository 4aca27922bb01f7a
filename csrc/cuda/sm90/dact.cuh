// The epilogue of down's dgrad on sm_90a, which applies the activation's derivative. A tile goes
// through the warp's staging as in up.cuh.
#pragma once

#include "style.cuh"

namespace moekernels::cuda::sm90 {

// C is da = dy w2 in fp32. dh = weight da act'(h), weighted_a = weight act(h), and <da, act(h)> of
// every 64 columns. A warp's 128 accumulators are 16 rows of 256 columns, or of 128 columns 16 rows
// and the 16 that lie 64 further on.
template <class T, int kColumnsOfTile = 256>
struct StoreDAct {
  using Type = T;
  static constexpr int kColumns = kColumnsOfTile, kPartColumns = 64;
  static constexpr int kStrips = 256 / kColumns, kParts = kColumns / kPartColumns;
  static constexpr bool kPrefetches = true;
  // Items of a lane, 16 rows of 8 chunks by 32 lanes, and how many are under way at once: in the
  // smaller tile more would not fit the registers.
  static constexpr int kItems = 4, kAtOnce = kStrips > 1 ? 2 : kItems;
  struct Args {
    const T* h;     // [R, G]; dh may take its place
    T* dh;          // [R, G]
    T* weighted_a;  // [R, F] or null
    float* dots;    // [R, parts] or null
    int64_t parts;
    ExpertStyle style;
    RowUse use;
  };

  // The tile's part of h comes to L2 while the product runs.
  template <class Tile>
  static __device__ void prefetch(const Args& to, const Tile& tile, int lane) {
    const ExpertStyle& style = to.style;
    const int64_t column = int64_t{tile.column_tile} * kColumns;
    const int64_t count = column + kColumns < style.ffn ? kColumns : style.ffn - column;
#pragma unroll 1  // the producer has few registers
    for (int64_t r = tile.row + lane; r < tile.row_end && r < tile.row + 128; r += 32) {
      const T* h = to.h + r * style.width();
      if (style.apart()) {
        prefetch_bytes(h + column, count * sizeof(T));
        prefetch_bytes(h + style.ffn + column, count * sizeof(T));
      } else {
        const int gates = style.gated() ? 2 : 1;
        prefetch_bytes(h + gates * column, gates * count * sizeof(T));
      }
    }
  }

  template <class Tile>
  static __device__ void clear(const Args& to, const Tile& tile, int64_t row, int lane) {
    const ExpertStyle& style = to.style;
    const int64_t column = int64_t{tile.column_tile} * kColumns;
    const int64_t end = column + kColumns < style.ffn ? column + kColumns : style.ffn;
    const int gates = style.gated() ? 2 : 1;
    if (style.apart()) {
      clear_rows(to.dh, row, tile.row_end, style.width(), column, end, lane);
      clear_rows(to.dh, row, tile.row_end, style.width(), style.ffn + column, style.ffn + end,
                 lane);
    } else {
      clear_rows(to.dh, row, tile.row_end, style.width(), gates * column, gates * end, lane);
    }
    if (to.weighted_a != nullptr)
      clear_rows(to.weighted_a, row, tile.row_end, style.ffn, column, end, lane);
  }

  // Rows of 64 fp32 numbers, in pairs of 16-byte chunks permuted by the row; the chunks of every
  // other four pairs change places, so that the 8 lanes that read a row's low or high chunks at
  // once meet 32 banks.
  static __device__ uint32_t staged_chunk_of(int row, int pair, int half) {
    const int place = pair ^ (row & 7);
    return row * 256 + (place << 5) + ((half ^ place >> 2) << 4);
  }

  template <int kPart>
  static __device__ void stage(float (&d)[128], char* staging, int lane) {
    __syncwarp();
#pragma unroll
    for (int block = 0; block < 8; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* c = d + (kPart * 8 + block) * 4 + half * 2;
        const int r = lane / 4 + 8 * half;
        *reinterpret_cast<float2*>(staging + staged_chunk_of(r, block, lane % 4 / 2) +
                                   lane % 2 * 8) = {c[0], c[1]};
      }
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void stage_part(int part, float (&d)[128], char* staging,
                                                    int lane) {
    switch (part) {
      case 0: stage<0>(d, staging, lane); break;
      case 1: stage<1>(d, staging, lane); break;
      case 2: stage<2>(d, staging, lane); break;
      default: stage<3>(d, staging, lane);
    }
  }

  // What a lane works on: 8 columns of F in every fourth row, and where its first row has them.
  // Distances are 32 bits, so that the address of another row is one instruction.
  struct Place {
    T *dh, *a;
    float* dots;
    int32_t width, ffn, parts;  // of a row of h and dh, of weighted_a, of dots
    int32_t second;             // from a chunk of h to its other
    int rows;                   // from its first to the end of the group
    bool keeps_a;
  };
  struct RowState {
    float weight;
    bool used;
  };
  static __device__ __forceinline__ void read_rows(RowState (&rows)[kAtOnce], const RowUse& use,
                                                   int64_t first, int64_t row_end) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t r = first + 4 * i;
      rows[i].used = r < row_end && use.used(r);
      rows[i].weight = rows[i].used ? use.weight(r) : 0.0f;
    }
  }
  template <class P>
  static __device__ P* row_of(P* first, int n, int32_t width) {
    return first + int64_t{width} * (4 * n);
  }

  // Computes also what does not exist, from zeros: stores alone ask, which costs no branch.
  template <Activation kind, bool kAlternate>
  static __device__ void activate_part(const ExpertStyle& style, const Place& at,
                                       const uint4 (&first)[kAtOnce],
                                       const uint4 (&second)[kAtOnce],
                                       const RowState (&rows)[kAtOnce], const char* staging,
                                       float (&dots)[kAtOnce], int begin, int lane) {
    constexpr bool kGated = kind <= Activation::swiglu_clamped;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int n = begin + i;
      const bool exists = 4 * n < at.rows;
      const int r = 4 * n + lane / 8;
      const float4 low =
          *reinterpret_cast<const float4*>(staging + staged_chunk_of(r, lane % 8, 0));
      const float4 high =
          *reinterpret_cast<const float4*>(staging + staged_chunk_of(r, lane % 8, 1));
      const float da[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float weight = rows[i].weight;
      float g[8], u[8], a[8];
      split_gate<T, kAlternate>(first[i], second[i], g, u);  // zero in rows that are not used
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const Activated<float> act =
            moekernels::activate<kind, FastMath>(g[e], u[e], style.alpha, style.limit);
        const float weighted = da[e] * weight;
        dots[i] = fmaf(da[e], act.a, e == 0 ? 0.0f : dots[i]);
        a[e] = weight * act.a;
        g[e] = weighted * act.by_gate;
        u[e] = weighted * act.by_up;
      }
      T* dh = row_of(at.dh, n, at.width);
      if (!kAlternate) {
        put_if(exists, dh, pack8<T>(g));
        if (kGated) put_if(exists, dh + at.second, pack8<T>(u));
      } else {
        put_if(
            exists, dh,
            {pack<T>(g[0], u[0]), pack<T>(g[1], u[1]), pack<T>(g[2], u[2]), pack<T>(g[3], u[3])});
        put_if(
            exists, dh + 8,
            {pack<T>(g[4], u[4]), pack<T>(g[5], u[5]), pack<T>(g[6], u[6]), pack<T>(g[7], u[7])});
      }
      put_if(exists && at.keeps_a, row_of(at.a, n, at.ffn), pack8<T>(a));
    }
  }

  template <class Tile>
  static __device__ Place place_of(const Args& to, const Tile& tile, int64_t first_row,
                                   int32_t column) {
    const ExpertStyle& style = to.style;
    const int scale = columns_of_h(style);
    return {
        .dh = to.dh + first_row * style.width() + scale * column,
        .a = to.weighted_a + first_row * style.ffn + column,
        .dots = to.dots + first_row * to.parts + tile.column_tile * (kColumns / kPartColumns),
        .width = static_cast<int32_t>(style.width()),
        .ffn = static_cast<int32_t>(style.ffn),
        .parts = static_cast<int32_t>(to.parts),
        .second = scale == 2 ? 8 : static_cast<int32_t>(style.ffn),
        .rows = static_cast<int>(tile.row_end - first_row),
        .keeps_a = to.weighted_a != nullptr,
    };
  }
  // Columns of h that lie together for one of F.
  static __device__ int columns_of_h(const ExpertStyle& style) {
    return style.gated() && style.interleaved ? 2 : 1;
  }

  // C of a row that is not used is zero, whatever its gradient holds.
  static __device__ void clear_unused(float (&d)[128], const RowUse& use, int32_t row,
                                      int32_t row_end, int lane) {
#pragma unroll
    for (int half = 0; half < 2 * kStrips; ++half) {
      const int64_t r = row + 64 * (half / 2) + lane / 4 + 8 * (half % 2);
      if (r >= row_end || use.used(r)) continue;
#pragma unroll
      for (int block = 0; block < kColumns / 8; ++block) {
        const int i = half / 2 * (kColumns / 2) + 4 * block + 2 * (half % 2);
        d[i] = d[i + 1] = 0.0f;
      }
    }
  }

  // Sums over the 8 lanes of a row, in one order whatever else runs.
  static __device__ void write_dots(const Args& to, const Place& at, const float (&dots)[kAtOnce],
                                    int begin, int lane) {
    const int written = to.dots != nullptr && lane % 8 == 0 ? at.rows : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int n = begin + i;
      float dot = 4 * n < at.rows ? dots[i] : 0.0f;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
      if (4 * n < written) *row_of(at.dots, n, at.parts) = dot;
    }
  }

  template <class Tile>
  static __device__ void store(const Args& to, const Tile& tile, float (&d)[128], char* staging,
                               int32_t row, int lane) {
    const ExpertStyle& style = to.style;
#pragma unroll 1
    for (int strip = 0; strip < kStrips; ++strip, row += 64) {
      if (row >= tile.row_end) return;
      const int64_t first_row = row + lane / 8;
      int32_t column = tile.column_tile * kColumns + lane % 8 * 8;  // of F
      Place at = place_of(to, tile, first_row, column);
      RowState rows[kAtOnce];
      if (kAtOnce == kItems) read_rows(rows, to.use, first_row, tile.row_end);  // for every part
      if (strip == 0) clear_unused(d, to.use, row, tile.row_end, lane);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        if (column >= at.ffn) at.rows = 0;
#pragma unroll 1
        for (int begin = 0; begin < kItems; begin += kAtOnce) {
          if (kAtOnce < kItems) read_rows(rows, to.use, first_row + 4 * begin, tile.row_end);
          uint4 first[kAtOnce], second[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int n = begin + i;
            first[i] = second[i] = uint4{};
            if (rows[i].used && 4 * n < at.rows) {
              const T* h = row_of(to.h + (at.dh - to.dh), n, at.width);
              first[i] = get(h);
              if (style.gated()) second[i] = get(h + at.second);
            }
          }
          if (begin == 0) stage_part(strip * kParts + part, d, staging, lane);
          float dots[kAtOnce];
          with_style(style, [&](auto kind, auto alternate) {
            activate_part<decltype(kind)::value, decltype(alternate)::value>(
                style, at, first, second, rows, staging, dots, begin, lane);
          });
          write_dots(to, at, dots, begin, lane);
        }
        column += kPartColumns;
        at.dh += columns_of_h(style) * kPartColumns;
        at.a += kPartColumns;
        ++at.dots;
      }
    }
  }
};

}  // namespace moekernels::cuda::sm90
