// Copies of rows: words as wide as the addresses allow, a piece of kUnroll words a lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "warp.cuh"

namespace moekernels::cuda {

constexpr int kMoveThreads = 256;
constexpr int kUnroll = 4;

// Calls f(word) with the widest word that divides all values: addresses and sizes in bytes.
template <class F>
void with_word(std::initializer_list<int64_t> values, const F& f) {
  int64_t bits = 0;
  for (int64_t value : values) bits |= value;
  if (bits % 16 == 0) return f(uint4{});
  if (bits % 8 == 0) return f(uint2{});
  if (bits % 4 == 0) return f(uint32_t{});
  if (bits % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

template <class Word>
constexpr int64_t kPieceBytes = 32 * kUnroll * sizeof(Word);

// At least one, so that a row without elements still has a warp.
template <class Word>
__host__ __device__ int64_t pieces_of_row(int64_t row_bytes) {
  return row_bytes <= kPieceBytes<Word> ? 1
                                        : (row_bytes + kPieceBytes<Word> - 1) / kPieceBytes<Word>;
}

template <class Word>
int64_t move_blocks(int64_t rows, int64_t row_bytes) {
  const int64_t warps = rows * pieces_of_row<Word>(row_bytes);
  return (warps + kMoveThreads / 32 - 1) / (kMoveThreads / 32);
}

struct Piece {
  int64_t row, begin;  // begin in bytes
};

template <class Word>
__device__ Piece piece_of_warp(int64_t row_bytes) {
  const int64_t warp = warp_of_grid(), pieces = pieces_of_row<Word>(row_bytes);
  if (pieces == 1) return {warp, 0};
  const int64_t row = warp / pieces;
  return {row, (warp - row * pieces) * kPieceBytes<Word>};
}

// Moves one piece of a row, or zeroes it where the row is not used.
template <class Word>
__device__ void move_piece(const char* from, bool used, char* to, int64_t row_bytes, Piece piece) {
  const int64_t words = row_bytes / sizeof(Word), first = piece.begin / sizeof(Word) + lane_id();
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  Word words_of_lane[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * 32;
    words_of_lane[u] = used && i < words ? source[i] : Word{};
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * 32;
    if (i < words) target[i] = words_of_lane[u];
  }
}

}  // namespace moekernels::cuda
