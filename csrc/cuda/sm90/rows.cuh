// How the rows of a tile leave the registers of a warp: 16 rows by 128 columns of 16 bits through 4
// KiB of shared memory that is the warp's own, so that every access to global memory is 16 bytes a
// lane and whole lines a warp.
#pragma once

#include "common/vec.cuh"
#include "common/warp.cuh"
#include "ptx.cuh"

namespace moekernels::cuda::sm90 {

// 16 bytes of global memory at once: said in PTX, since the compiler splits some of them into
// words.
template <class T>
__device__ inline void put(T* to, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Where `exists`, without a branch.
template <class T>
__device__ inline void put_if(bool exists, T* to, const uint4& v) {
  asm volatile(
      "{\n.reg .pred exists;\nsetp.ne.b32 exists, %5, 0;\n"
      "@exists st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(__cvta_generic_to_global(to)),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(exists))
      : "memory");
}
template <class T>
__device__ inline uint4 get(const T* from) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

// 16-byte chunks of a staged row are permuted by the row, so that neither writing by columns nor
// reading by rows meets bank conflicts.
__device__ inline uint32_t staged_at(int row, int chunk) {
  return row * 256 + ((chunk ^ (row & 7)) << 4);
}

// Stages 16 blocks of 8 columns; pair(block, half) gives this lane's two elements of row (lane / 4
// + 8 half), packed.
template <class F>
__device__ inline void stage_rows(char* staging, int lane, const F& pair) {
  __syncwarp();  // what was staged before has been read
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t m[4] = {pair(2 * i, 0), pair(2 * i, 1), pair(2 * i + 1, 0), pair(2 * i + 1, 1)};
    store_matrices(shared_address(staging) + staged_at(lane % 16, 2 * i + lane / 16), m);
  }
  __syncwarp();
}

// Adds a bias to every row; lane i brings that of columns 8 i to 8 i + 7 of the tile.
template <class T, int kCount>
__device__ inline void add_bias(float (&d)[kCount], const uint4& bias, char* staging, int lane) {
  __syncwarp();
  reinterpret_cast<uint4*>(staging)[lane] = bias;
  __syncwarp();
#pragma unroll
  for (int block = 0; block < kCount / 4; ++block) {
    const float2 add =
        unpack(*reinterpret_cast<const uint32_t*>(staging + block * 16 + lane % 4 * 4), T{});
    d[4 * block] += add.x;
    d[4 * block + 1] += add.y;
    d[4 * block + 2] += add.x;
    d[4 * block + 3] += add.y;
  }
}

__device__ inline uint4 staged_chunk(const char* staging, int row, int chunk) {
  return *reinterpret_cast<const uint4*>(staging + staged_at(row, chunk));
}

// Writes zeros to up to 16 rows from `row`, columns [column, column_end) of `width`; all multiples
// of 8.
template <class T>
__device__ inline void clear_rows(T* out, int64_t row, int64_t row_end, int64_t width,
                                  int64_t column, int64_t column_end, int lane) {
  const int64_t end = row + 16 < row_end ? row + 16 : row_end;
  for (int64_t r = row; r < end; ++r) {
    for (int64_t c = column + lane * 8; c < column_end; c += 32 * 8) {
      put(out + r * width + c, uint4{});
    }
  }
}

// A row's part in the epilogues: its routing weight, and whether a token is behind it.
struct RowUse {
  const int32_t* token_of;  // or null
  const float* weights;     // or null
  int64_t tokens;
  __device__ bool used(int64_t row) const {
    return token_of == nullptr || inside(token_of[row], tokens);
  }
  __device__ float weight(int64_t row) const { return weights == nullptr ? 1.0f : weights[row]; }
};

// out = use.weight (C + bias): grouped_gemm, its dgrad, the down-projection.
template <class T, int kColumnsOfTile>
struct StoreRows {
  using Type = T;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr bool kPrefetches = false;
  struct Args {
    T* out;         // [R, width]
    const T* bias;  // [E, width] or null
    int64_t width;
    RowUse use;
  };

  template <class Tile>
  static __device__ void prefetch(const Args&, const Tile&, int) {}

  template <class Tile>
  static __device__ void clear(const Args& to, const Tile& tile, int64_t row, int lane) {
    const int64_t column = int64_t{tile.column_tile} * kColumns;
    const int64_t end = column + kColumns < to.width ? column + kColumns : to.width;
    clear_rows(to.out, row, tile.row_end, to.width, column, end, lane);
  }

  template <class Tile>
  static __device__ void store(const Args& to, const Tile& tile, float (&d)[kColumns / 2],
                               char* staging, int64_t row, int lane) {
    float weight[2];
    bool used[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + lane / 4 + 8 * half;
      used[half] = r < tile.row_end && to.use.used(r);
      weight[half] = used[half] ? to.use.weight(r) : 0.0f;
    }
    if (to.bias != nullptr) {
      const int64_t column = int64_t{tile.column_tile} * kColumns + lane * 8;
      const bool exists = column < to.width;
      add_bias<T>(d, exists ? get(to.bias + tile.group * to.width + column) : uint4{}, staging,
                  lane);
    }
#pragma unroll
    for (int part = 0; part < kColumns / 128; ++part) {
      const int64_t column = int64_t{tile.column_tile} * kColumns + part * 128;
      if (column >= to.width) break;
      stage_rows(staging, lane, [&](int block, int half) {
        const float* c = d + (part * 16 + block) * 4 + half * 2;
        return used[half] ? pack<T>(c[0] * weight[half], c[1] * weight[half]) : 0u;
      });
      uint4 chunks[8];  // all are under way before the first is stored
#pragma unroll
      for (int i = 0; i < 8; ++i) chunks[i] = staged_chunk(staging, i * 2 + lane / 16, lane % 16);
      const int64_t first = row + lane / 16, at = column + lane % 16 * 8;
      const int64_t rows = at < to.width ? tile.row_end - first : 0;
      T* out = to.out + first * to.width + at;
#pragma unroll
      for (int i = 0; i < 8; ++i, out += 2 * to.width) put_if(2 * i < rows, out, chunks[i]);
    }
  }
};

// dw [E, M, N] (=|+=) C: in T, or added to fp32.
template <class T, int kColumnsOfTile, bool kAccumulate>
struct StoreGradient {
  using Type = T;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr bool kPrefetches = kAccumulate;
  struct Args {
    void* out;
    int64_t m, n;
  };

  // The gradient's lines come to L2 while the product runs.
  template <class Tile>
  static __device__ void prefetch(const Args& to, const Tile& tile, int lane) {
    if constexpr (kAccumulate) {
      const int64_t column = int64_t{tile.column_tile} * kColumns;
      const int64_t count = column + kColumns < to.n ? kColumns : to.n - column;
#pragma unroll 1  // the producer has few registers
      for (int64_t r = tile.row + lane; r < to.m && r < tile.row + 128; r += 32) {
        const float* line =
            static_cast<const float*>(to.out) + (tile.group * to.m + r) * to.n + column;
        prefetch_bytes(line, count * sizeof(float));
      }
    }
  }

  template <class Tile>
  static __device__ void clear(const Args&, const Tile&, int64_t, int) {}

  template <class Tile>
  static __device__ void store(const Args& to, const Tile& tile, float (&d)[kColumns / 2],
                               char* staging, int64_t row, int lane) {
    if constexpr (kAccumulate) {
      add(to, tile, d, row, lane);
    } else {
      const int64_t base = tile.group * to.m;
      ProductTileOf<Tile> rows{tile.group, base + to.m, tile.column_tile};
      StoreRows<T, kColumns>::store({static_cast<T*>(to.out), nullptr, to.n, {nullptr, nullptr, 0}},
                                    rows, d, staging, base + row, lane);
    }
  }

 private:
  template <class Tile>
  struct ProductTileOf {
    int64_t group, row_end;
    int32_t column_tile;
  };

  // A group of 4 lanes holds 8 columns: 32 bytes, a whole sector. 16 loads are under way before the
  // first sum.
  template <class Tile>
  static __device__ void add(const Args& to, const Tile& tile, float (&d)[kColumns / 2],
                             int64_t row, int lane) {
    constexpr int kAtOnce = 8;
    float* out = static_cast<float*>(to.out) + tile.group * to.m * to.n;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += kAtOnce) {
      float2 sum[kAtOnce][2];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = row + lane / 4 + 8 * half;
          const int64_t c = int64_t{tile.column_tile} * kColumns + (first + j) * 8 + lane % 4 * 2;
          if (r < to.m && c < to.n)
            sum[j][half] = *reinterpret_cast<const float2*>(out + r * to.n + c);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = row + lane / 4 + 8 * half;
          const int64_t c = int64_t{tile.column_tile} * kColumns + (first + j) * 8 + lane % 4 * 2;
          const float* part = d + (first + j) * 4 + half * 2;
          if (r < to.m && c < to.n) {
            *reinterpret_cast<float2*>(out + r * to.n + c) = {sum[j][half].x + part[0],
                                                              sum[j][half].y + part[1]};
          }
        }
      }
    }
  }
};

}  // namespace moekernels::cuda::sm90
