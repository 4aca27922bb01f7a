// Only moves bytes: a warp moves a piece of a row, all its loads under way before the first store.
#include "moekernels/permute.h"

#include "common/launch.cuh"
#include "common/move.cuh"

namespace moekernels::cuda {
namespace {

template <class Word>
__global__ void __launch_bounds__(kMoveThreads) permute_rows(const PermuteArgs args) {
  const Piece piece = piece_of_warp<Word>(args.row_bytes);
  if (piece.row >= args.num_rows) return;
  const int64_t token = args.token_of[piece.row];
  const bool used = inside(token, args.tokens);
  move_piece<Word>(static_cast<const char*>(args.x) + (used ? token * args.row_bytes : 0), used,
                   static_cast<char*>(args.rows) + piece.row * args.row_bytes, args.row_bytes,
                   piece);
}

}  // namespace

void permute(const PermuteArgs& args, Stream stream) {
  with_word(
      {reinterpret_cast<int64_t>(args.x), reinterpret_cast<int64_t>(args.rows), args.row_bytes},
      [&](auto word) {
    using Word = decltype(word);
    launch("permute", permute_rows<Word>, move_blocks<Word>(args.num_rows, args.row_bytes),
           kMoveThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
