// Only moves bytes: a warp moves a piece of a row, all its loads under way before the first store.
#include "moekernels/permute.h"

#include "common/launch.cuh"
#include "permute.cuh"
#include "sm90/entry.cuh"

namespace moekernels::cuda {
namespace {

template <class Word>
__global__ void __launch_bounds__(kMoveThreads) permute_rows(const PermuteArgs args) {
  permute_piece<Word>(args);
}

}  // namespace

void permute(const PermuteArgs& args, Stream stream) {
  if constexpr (sm90::kBuilt) {
    if (sm90::permute(args, stream)) return;
  }
  with_word_of(args, [&](auto word) {
    using Word = decltype(word);
    launch("permute", permute_rows<Word>, move_blocks<Word>(args.num_rows, args.row_bytes),
           kMoveThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
