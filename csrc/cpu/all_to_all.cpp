// Only moves bytes. Compiled once for each ISA level.
#include "moekernels/all_to_all.h"

#include <cstring>

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// Calls move(by expert, by source, n) for the pieces of runs that lie in [row_begin, row_end) by
// expert.
template <class Move>
void for_each_run(const Runs& runs, int64_t row_begin, int64_t row_end, const Move& move) {
  int64_t low = 0, high = runs.runs;  // the run that holds row_begin
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    runs.begin[middle] <= row_begin ? low = middle : high = middle;
  }
  for (int64_t run = low; row_begin < row_end; ++run) {
    const int64_t end = runs.begin[run + 1] < row_end ? runs.begin[run + 1] : row_end;
    move(row_begin, runs.source[run] + row_begin - runs.begin[run], end - row_begin);
    row_begin = end;
  }
}

}  // namespace

void pack(const PackArgs& args, int64_t row_begin, int64_t row_end) {
  const char* x = static_cast<const char*>(args.x);
  const char* weights = static_cast<const char*>(args.weights);
  const int64_t width = args.row_bytes + args.weight_bytes, slots = args.tokens * args.top_k;
  for (int64_t r = row_begin; r < row_end; ++r) {
    char* to = static_cast<char*>(args.message) + r * width;
    const int64_t slot = args.slot_of[r];
    if (slot < 0 || slot >= slots) {
      std::memset(to, 0, width);
      continue;
    }
    std::memcpy(to, x + slot / args.top_k * args.row_bytes, args.row_bytes);
    if (weights != nullptr) {
      std::memcpy(to + args.row_bytes, weights + slot * args.weight_bytes, args.weight_bytes);
    }
  }
}

void regroup(const RegroupArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t width = args.row_bytes + args.weight_bytes;
  const char* message = static_cast<const char*>(args.message);
  char* rows = static_cast<char*>(args.rows);
  char* weights = static_cast<char*>(args.weights);
  for_each_run(args.runs, row_begin, row_end, [&](int64_t row, int64_t source, int64_t n) {
    const char* from = message + source * width;
    char* to = rows + row * args.row_bytes;
    if (weights == nullptr) {
      std::memcpy(to, from, n * width);
      return;
    }
    for (int64_t i = 0; i < n; ++i, from += width, to += args.row_bytes) {
      std::memcpy(to, from, args.row_bytes);
      std::memcpy(weights + (row + i) * args.weight_bytes, from + args.row_bytes,
                  args.weight_bytes);
    }
  });
}

void ungroup(const UngroupArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t width = args.row_bytes + args.weight_bytes;
  const char* rows = static_cast<const char*>(args.rows);
  const char* weights = static_cast<const char*>(args.weights);
  char* message = static_cast<char*>(args.message);
  for_each_run(args.runs, row_begin, row_end, [&](int64_t row, int64_t source, int64_t n) {
    const char* from = rows + row * args.row_bytes;
    char* to = message + source * width;
    if (weights == nullptr) {
      std::memcpy(to, from, n * width);
      return;
    }
    for (int64_t i = 0; i < n; ++i, from += args.row_bytes, to += width) {
      std::memcpy(to, from, args.row_bytes);
      std::memcpy(to + args.row_bytes, weights + (row + i) * args.weight_bytes, args.weight_bytes);
    }
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
