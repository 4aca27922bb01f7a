// AMX's tiles: C tile [16, 16] fp32 += A tile [16, 32 k] B tile [16 pairs, 16]. With
// MOEKERNELS_AMX_IN_C they are memory of each thread and the instructions plain loops, so that
// tests run what is built on them where no tile is (_C_amx).
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a tile's row
constexpr int64_t kTileK = 32;      // bf16 along k
constexpr int64_t kColumns = 2 * kTileRows;

#if defined(MOEKERNELS_AMX_IN_C)

struct Tile {
  unsigned char row[kTileRows][kTileBytes];
};
inline thread_local Tile tiles_in_c[8];

template <int tile>
inline void tile_zero() {
  tiles_in_c[tile] = {};
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r)
    std::memcpy(tiles_in_c[tile].row[r], static_cast<const char*>(from) + r * stride, kTileBytes);
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles_in_c[tile].row[r], kTileBytes);
}
template <int c, int a, int b>
inline void tile_dot() {
  for (int64_t m = 0; m < kTileRows; ++m) {
    Vec<float> sum = load_unaligned<Vec<float>>(tiles_in_c[c].row[m]);
    for (int64_t k = 0; k < kTileRows; ++k) {
      const auto pair = load_unaligned<uint32_t>(tiles_in_c[a].row[m] + 4 * k);
      const auto line = load_unaligned<Uint>(tiles_in_c[b].row[k]);
      sum = sum + bits_as<float>(pair << 16) * bits_as<Vec<float>>(line << 16);
      sum = sum + bits_as<float>(pair & 0xffff0000) * bits_as<Vec<float>>(line & 0xffff0000);
    }
    store_unaligned(tiles_in_c[c].row[m], sum);
  }
}
inline void enter_tiles() {}
inline void leave_tiles() {
  for (Tile& tile : tiles_in_c) std::memset(&tile, 0xff, sizeof tile);  // NaN: nothing is kept
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int c, int a, int b>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

inline void enter_tiles() {
  static const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void leave_tiles() { asm volatile("tilerelease"); }

#endif

}  // namespace
}  // namespace moekernels::cpu::MOEKERNELS_ISA
