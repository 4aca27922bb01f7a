// What a warp of permute does: it moves a piece of a row, all its loads under way before the first
// store.
#pragma once

#include "common/move.cuh"
#include "moekernels/permute.h"

namespace moekernels::cuda {

// Calls f(word) with the widest word that the rows allow.
template <class F>
void with_word_of(const PermuteArgs& args, const F& f) {
  with_word(
      {reinterpret_cast<int64_t>(args.x), reinterpret_cast<int64_t>(args.rows), args.row_bytes}, f);
}

template <class Word>
__device__ __forceinline__ void permute_piece(const PermuteArgs& args) {
  const Piece piece = piece_of_warp<Word>(args.row_bytes);
  if (piece.row >= args.num_rows) return;
  const int64_t token = args.token_of[piece.row];
  const bool used = inside(token, args.tokens);
  move_piece<Word>(static_cast<const char*>(args.x) + (used ? token * args.row_bytes : 0), used,
                   static_cast<char*>(args.rows) + piece.row * args.row_bytes, args.row_bytes,
                   piece);
}

}  // namespace moekernels::cuda
