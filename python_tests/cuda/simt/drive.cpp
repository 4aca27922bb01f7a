// Calls launchers on small inputs, hostile ones among them, and says where a result is wrong.
// test_sanitize.py links it to kernels into which it has planted a bug.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <vector>

#include "moekernels/all_to_all.h"
#include "moekernels/permute.h"
#include "moekernels/route.h"

namespace {

using moekernels::PermuteArgs;
using moekernels::RouteArgs;
using moekernels::RunsArgs;

// Memory of exactly n elements, junk at first.
template <class T>
struct Array {
  explicit Array(int64_t n) : data(static_cast<T*>(malloc(n * sizeof(T)))) {
    memset(data, 0xCD, n * sizeof(T));
  }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  operator T*() const { return data; }
  T* data;
};

void expect(bool ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "drive: %s\n", what);
  exit(1);
}

void route() {
  constexpr int64_t kTokens = 1111, kExperts = 70, kTopK = 2, kSlots = kTokens * kTopK;
  const int64_t chunk_slots = moekernels::cuda::route_chunk_slots(kSlots, kExperts);
  const int64_t chunks = (kSlots + chunk_slots - 1) / chunk_slots;
  Array<int32_t> ids(kSlots), row_of(kSlots), token_of(kSlots), slot_of(kSlots),
      begins(chunks * kExperts);
  Array<int64_t> counts(kExperts), offsets(kExperts + 1);
  std::vector<int64_t> wanted(kExperts);
  for (int64_t s = 0; s < kSlots; ++s) {
    ids[s] = s % 97 == 5 ? 1 << 20 : s % 89 == 7 ? -3 : static_cast<int32_t>(s / 3 * 31 % kExperts);
    if (ids[s] >= 0 && ids[s] < kExperts) ++wanted[ids[s]];
  }
  RouteArgs args{};
  args.ids = ids;
  args.counts = counts;
  args.offsets = offsets;
  args.row_of = row_of;
  args.token_of = token_of;
  args.slot_of = slot_of;
  args.begins = begins;
  args.slots = args.num_rows = kSlots;
  args.top_k = kTopK;
  args.experts = kExperts;
  args.chunks = chunks;
  args.chunk_slots = chunk_slots;
  args.alignment = 1;
  args.capacity = -1;
  moekernels::cuda::route(args, nullptr);
  for (int64_t e = 0; e < kExperts; ++e) expect(counts[e] == wanted[e], "route: wrong counts");
  for (int64_t s = 0, row = -1; s < kSlots; ++s) {
    if (ids[s] != 0) continue;
    expect(row_of[s] == row + 1 && slot_of[row + 1] == s, "route: not a stable order");
    ++row;
  }
}

void make_runs() {
  constexpr int64_t kPeers = 40, kExperts = 8, kRuns = kPeers * kExperts;
  Array<int64_t> counts(kRuns), begin(kRuns + 1), source(kRuns), offsets(kExperts + 1);
  for (int64_t i = 0; i < kRuns; ++i) counts[i] = i % 5;
  moekernels::cuda::make_runs({counts, begin, source, offsets, kPeers, kExperts, INT64_MAX / kRuns},
                              nullptr);
  expect(begin[kRuns] == std::accumulate(counts.data, counts.data + kRuns, int64_t{0}),
         "make_runs: wrong begins");
}

void permute() {
  constexpr int64_t kTokens = 9, kRows = 19, kRowBytes = 48;
  Array<char> x(kTokens * kRowBytes + 8), rows(kRows * kRowBytes);
  Array<int32_t> token_of(kRows);
  for (int64_t i = 0; i < kTokens * kRowBytes; ++i) x[8 + i] = static_cast<char>(i % 101);
  for (int64_t r = 0; r < kRows; ++r)
    token_of[r] = r % 7 == 6 ? 1000 : static_cast<int32_t>(r * 5 % kTokens);
  PermuteArgs args{};
  args.x = x + 8;  // rows off a 16-byte boundary
  args.token_of = token_of;
  args.rows = rows;
  args.tokens = kTokens;
  args.num_rows = kRows;
  args.row_bytes = kRowBytes;
  moekernels::cuda::permute(args, nullptr);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < kRowBytes; ++i) {
      const bool used = token_of[r] < kTokens;
      expect(rows[r * kRowBytes + i] == (used ? x[8 + token_of[r] * kRowBytes + i] : 0),
             "permute: wrong rows");
    }
  }
}

}  // namespace

int main() {
  try {
    route();
    make_runs();
    permute();
  } catch (const std::exception& error) {
    fprintf(stderr, "drive: %s\n", error.what());
    return 1;
  }
}
