// What moves and sums rows between the products of sm_90a, in a chain of launches.
#include "combine.cuh"
#include "dweights.cuh"
#include "mma/launch.cuh"
#include "permute.cuh"
#include "sm90/chained.cuh"
#include "sm90/entry.cuh"
#include "sm90/run.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class Word>
__global__ void __launch_bounds__(kMoveThreads) chained_permute(const PermuteArgs args) {
  follow();
  permute_piece<Word>(args);
}

template <class T, int N, bool weighted>
__global__ void __launch_bounds__(kCombineThreads) chained_combine(const CombineArgs args) {
  follow();
  combine_vector<T, N, weighted>(args);
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    chained_dweights(const ExpertsDWeightsArgs args) {
  follow();
  sum_dweight<T>(args);
}

bool in_chain() { return launches().chain && capability() / 10 == 9; }

}  // namespace

bool permute(const PermuteArgs& args, Stream stream) {
  if (!in_chain()) return false;
  with_word_of(args, [&](auto word) {
    using Word = decltype(word);
    launch_as({.chained = true}, "permute", chained_permute<Word>,
              move_blocks<Word>(args.num_rows, args.row_bytes), kMoveThreads, 0, stream, args);
  });
  return true;
}

bool combine(const CombineArgs& args, Stream stream) {
  if (!in_chain()) return false;
  with_combine(args, [&](auto* type, bool vector, int64_t blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    auto kernel = args.weights ? vector ? chained_combine<T, N, true> : chained_combine<T, 1, true>
                  : vector     ? chained_combine<T, N, false>
                               : chained_combine<T, 1, false>;
    launch_as({.chained = true}, "combine", kernel, blocks, kCombineThreads, 0, stream, args);
  });
  return true;
}

bool experts_dweights(const ExpertsDWeightsArgs& args, Stream stream) {
  if (!in_chain()) return false;
  with_type(args.of.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_as({.chained = true}, "experts_dweights", chained_dweights<T>,
              ceil_div(args.of.num_rows, kCombineWarps), kCombineThreads, 0, stream, args);
  });
  return true;
}

}  // namespace moekernels::cuda::sm90
