// Only moves bytes. A message's rows hold their weight behind them, so they begin where the
// weight's size allows, and words are as wide as that.
#include "moekernels/all_to_all.h"

#include "common/launch.cuh"
#include "common/move.cuh"
#include "common/scan.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kScanThreads = 256;

// The weight behind a row, in halves of 16 bits: a row of an odd number of 2-byte elements ends at
// an odd half.
__device__ void move_weight(const char* from, bool used, char* to, int64_t bytes) {
  for (int64_t i = lane_id(); i < bytes / 2; i += kWarp) {
    reinterpret_cast<uint16_t*>(to)[i] =
        used ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t{0};
  }
}

template <class Word>
__global__ void __launch_bounds__(kMoveThreads)
    pack_rows(const PackArgs args, const int64_t num_rows) {
  const Piece piece = piece_of_warp<Word>(args.row_bytes);
  if (piece.row >= num_rows) return;
  const int64_t slot = args.slot_of[piece.row];
  const bool used = inside(slot, args.tokens * args.top_k);
  const char* from =
      static_cast<const char*>(args.x) + (used ? slot / args.top_k * args.row_bytes : 0);
  char* to = static_cast<char*>(args.message) + piece.row * (args.row_bytes + args.weight_bytes);
  move_piece<Word>(from, used, to, args.row_bytes, piece);
  if (piece.begin == 0 && args.weight_bytes > 0) {
    move_weight(static_cast<const char*>(args.weights) + (used ? slot * args.weight_bytes : 0),
                used, to + args.row_bytes, args.weight_bytes);
  }
}

// One block. Counts that are negative count as zero, those above the rows as the rows.
__global__ void __launch_bounds__(kScanThreads) make_all_runs(const RunsArgs args) {
  __shared__ int64_t scratch[kScanThreads / kWarp];
  const int64_t runs = args.peers * args.experts;
  int64_t source = 0, begin = 0;
  for (int64_t first = 0; first < runs; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    const bool mine = i < runs;
    const int64_t by_source = mine ? min(max(args.counts[i], int64_t{0}), args.rows) : 0;
    int64_t sum;
    const int64_t before = block_exclusive_sum<kScanThreads>(by_source, scratch, &sum);
    if (mine) args.source[i % args.experts * args.peers + i / args.experts] = source + before;
    source += sum;

    const int64_t expert = i / args.peers, peer = i % args.peers;
    const int64_t by_expert =
        mine ? min(max(args.counts[peer * args.experts + expert], int64_t{0}), args.rows) : 0;
    const int64_t start = begin + block_exclusive_sum<kScanThreads>(by_expert, scratch, &sum);
    if (mine) args.begin[i] = start;
    if (mine && peer == 0 && args.offsets != nullptr) args.offsets[expert] = start;
    begin += sum;
  }
  if (threadIdx.x != 0) return;
  args.begin[runs] = begin;
  if (args.offsets == nullptr) return;
  args.offsets[args.experts] = begin;
  for (int64_t e = 0; args.peers == 0 && e < args.experts; ++e) args.offsets[e] = 0;
}

// The row by source of a row by expert, -1 where counts do not reach it.
__device__ int64_t source_of(const Runs& runs, int64_t row, int64_t num_rows) {
  int64_t low = 0, high = runs.runs;  // the last run that begins at or before the row
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    runs.begin[middle] <= row ? low = middle : high = middle;
  }
  if (runs.runs == 0 || row >= runs.begin[low + 1]) return -1;
  const int64_t source = runs.source[low] + row - runs.begin[low];
  return source < num_rows ? source : -1;
}

template <class Word>
__global__ void __launch_bounds__(kMoveThreads) regroup_rows(const RegroupArgs args) {
  const Piece piece = piece_of_warp<Word>(args.row_bytes);
  if (piece.row >= args.num_rows) return;
  const int64_t source = source_of(args.runs, piece.row, args.num_rows);
  const bool used = source >= 0;
  const char* from = static_cast<const char*>(args.message) +
                     (used ? source : 0) * (args.row_bytes + args.weight_bytes);
  move_piece<Word>(from, used, static_cast<char*>(args.rows) + piece.row * args.row_bytes,
                   args.row_bytes, piece);
  if (piece.begin == 0 && args.weight_bytes > 0) {
    move_weight(from + args.row_bytes, used,
                static_cast<char*>(args.weights) + piece.row * args.weight_bytes,
                args.weight_bytes);
  }
}

template <class Word>
__global__ void __launch_bounds__(kMoveThreads) ungroup_rows(const UngroupArgs args) {
  const Piece piece = piece_of_warp<Word>(args.row_bytes);
  if (piece.row >= args.num_rows) return;
  const int64_t source = source_of(args.runs, piece.row, args.num_rows);
  if (source < 0) return;
  char* to = static_cast<char*>(args.message) + source * (args.row_bytes + args.weight_bytes);
  move_piece<Word>(static_cast<const char*>(args.rows) + piece.row * args.row_bytes, true, to,
                   args.row_bytes, piece);
  if (piece.begin == 0 && args.weight_bytes > 0) {
    move_weight(static_cast<const char*>(args.weights) + piece.row * args.weight_bytes, true,
                to + args.row_bytes, args.weight_bytes);
  }
}

inline int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

}  // namespace

void pack(const PackArgs& args, int64_t num_rows, Stream stream) {
  with_word({address(args.x), address(args.message), args.row_bytes, args.weight_bytes},
            [&](auto word) {
    using Word = decltype(word);
    launch("pack", pack_rows<Word>, move_blocks<Word>(num_rows, args.row_bytes), kMoveThreads, 0,
           stream, args, num_rows);
  });
}

void make_runs(const RunsArgs& args, Stream stream) {
  launch("regroup", make_all_runs, 1, kScanThreads, 0, stream, args);
}

void regroup(const RegroupArgs& args, Stream stream) {
  with_word({address(args.message), address(args.rows), args.row_bytes, args.weight_bytes},
            [&](auto word) {
    using Word = decltype(word);
    launch("regroup", regroup_rows<Word>, move_blocks<Word>(args.num_rows, args.row_bytes),
           kMoveThreads, 0, stream, args);
  });
}

void ungroup(const UngroupArgs& args, Stream stream) {
  with_word({address(args.message), address(args.rows), args.row_bytes, args.weight_bytes},
            [&](auto word) {
    using Word = decltype(word);
    launch("ungroup", ungroup_rows<Word>, move_blocks<Word>(args.num_rows, args.row_bytes),
           kMoveThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
