// Rows of a routing to the ranks of their experts, and home.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "peers.h"

namespace moekernels::host {
namespace {

int64_t header(int64_t experts) { return (experts * 8 + 63) / 64 * 64; }

int64_t total(const int64_t* counts, int64_t n) { return std::accumulate(counts, counts + n, 0LL); }

// How many of the rows [begin, begin + n) lie in front of `room`.
int64_t within(int64_t begin, int64_t n, int64_t room) {
  return std::clamp<int64_t>(room - begin, 0, n);
}

// A narrow row in 16-byte words: a call for each would take longer than the copy.
void copy_row(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kWord = 16, kNarrow = 1024;
  if (bytes > kNarrow || bytes % kWord != 0) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += kWord) std::memcpy(to + i, from + i, kWord);
}

// Where the runs of counts [P, e] lie: call(peer, expert, row by expert then peer, row by peer then
// expert, rows). `by_peer` is theirs to use.
template <class Call>
void for_runs(const std::vector<int64_t>& counts, std::vector<int64_t>& by_peer, int64_t experts,
              const Call& call) {
  const int peers = static_cast<int>(by_peer.size());
  std::fill(by_peer.begin(), by_peer.end(), 0);
  int64_t row = 0;
  for (int64_t x = 0; x < experts; ++x) {
    for (int p = 0; p < peers; ++p) {
      const int64_t n = counts[p * experts + x];
      if (n != 0) call(p, x, row, by_peer[p], n);
      row += n;
      by_peer[p] += n;
    }
  }
}

}  // namespace

Route::Route(int64_t layer, int peers, int64_t experts, int64_t tokens, int64_t top_k,
             intptr_t token_of, intptr_t slot_of, intptr_t outgoing)
    : layer(layer),
      experts(experts),
      token_of_(reinterpret_cast<const int32_t*>(token_of)),
      slot_of_(reinterpret_cast<const int32_t*>(slot_of)),
      outgoing_(reinterpret_cast<const int64_t*>(outgoing)),
      tokens_(tokens),
      slots_(tokens * top_k),
      begins_(peers * experts + 1) {
  std::partial_sum(outgoing_, outgoing_ + peers * experts, begins_.begin() + 1);
}

template <class Weight>
void Route::copy_as(const char* x, const char* weights, int64_t row_bytes, int64_t first,
                    int64_t end, char* row, char* weight) const {
  for (int64_t r = first; r < end; ++r, row += row_bytes) {
    const auto slot = static_cast<uint32_t>(slot_of_[r]);
    const auto token = static_cast<uint32_t>(token_of_[r]);
    if (slot >= slots_ || token >= tokens_) {
      throw std::runtime_error("a row's slot is outside the tokens");
    }
    copy_row(row, x + token * row_bytes, row_bytes);
    if constexpr (!std::is_void_v<Weight>) {
      std::memcpy(weight, weights + slot * sizeof(Weight), sizeof(Weight));
      weight += sizeof(Weight);
    }
  }
}

void Route::copy(const char* x, const char* weights, Width width, int64_t first, int64_t end,
                 char* row, char* weight) const {
  const auto copy = width.weight == 0   ? &Route::copy_as<void>
                    : width.weight == 4 ? &Route::copy_as<float>
                                        : &Route::copy_as<double>;
  (this->*copy)(x, weights, width.row, first, end, row, weight);
}

std::vector<int64_t>& Route::room(Part part) {
  for (Came& c : came_) {
    if (c.part == part) return c.counts;
  }
  return came_.emplace_back(Came{part, {}}).counts;
}

const std::vector<int64_t>& Route::came(Part part) const {
  for (const Came& c : came_) {
    if (c.part == part) return c.counts;
  }
  throw std::runtime_error("combine: the rows that come back were never dispatched");
}

void Peers::Exchange::copy_back(int64_t begin, int64_t n, char* row, char* weight) const {
  const int64_t here = within(begin, n, room);
  std::memcpy(row, rows + begin * width.row, here * width.row);
  std::memcpy(weight, weights + begin * width.weight, here * width.weight);
  if (here == n) return;
  std::memset(row + here * width.row, 0, (n - here) * width.row);
  std::memset(weight + here * width.weight, 0, (n - here) * width.weight);
}

int Peers::post_rows(Route& route, intptr_t rows, intptr_t weights, Width width, Part part,
                     Way way) {
  const int exchange = open(4 * route.layer + way);
  Exchange& e = exchanges_[exchange];
  e.rows = reinterpret_cast<const char*>(rows);
  e.weights = reinterpret_cast<const char*>(weights);
  e.route = &route;
  e.part = part;
  e.width = width;
  return exchange;
}

int Peers::post_out(Route& route, intptr_t x, intptr_t weights, Width width, Part part) {
  const int64_t began = now();
  const int exchange =
      post_rows(route, x, weights, width, part, width.weight != 0 ? kOut : kGradOut);
  Exchange& e = exchanges_[exchange];
  const int64_t head = header(part.size());
  for_peers([&](int p) {
    const int64_t first = route.begin(p, part.first), n = route.begin(p, part.end) - first;
    const int64_t bytes = head + n * (width.row + width.weight);
    char* block = allocate(bytes);
    std::memcpy(block, route.outgoing(p) + part.first, part.size() * 8);
    char* row = block + head;
    route.copy(e.rows, e.weights, width, first, first + n, row, row + n * width.row);
    post(0, p, bytes, kRowsOut);
  });
  e.stamps.post = now();
  e.stamps.moving = e.stamps.post - began;
  return exchange;
}

int64_t Peers::arrive(int exchange) {
  Exchange& e = at(exchange);
  arrive(e, kRowsOut, true);
  const int64_t n = e.part.size();
  std::vector<int64_t>& counts = e.route->room(e.part);
  counts.resize(size() * n);
  e.sizes.resize(size());
  for (int p = 0; p < size(); ++p) {
    const void* from = p == rank() ? e.route->outgoing(p) + e.part.first
                                   : static_cast<const void*>(e.messages[p].data);
    std::memcpy(counts.data() + p * n, from, n * 8);
    e.sizes[p] = total(counts.data() + p * n, n);
    if (p == rank()) continue;
    expect_bytes(p, e.messages[p].bytes, header(n) + e.sizes[p] * (e.width.row + e.width.weight));
  }
  return total(e.sizes.data(), size());
}

void Peers::take_out(int exchange, intptr_t rows, intptr_t weights, intptr_t offsets,
                     int64_t room) {
  Exchange& e = at(exchange);
  const int64_t began = now();
  const Width w = e.width;
  const int64_t head = header(e.part.size()), all = within(0, total(e.sizes.data(), size()), room);
  const int64_t mine = e.route->begin(rank(), e.part.first);  // own rows before these
  const std::vector<int64_t>& counts = e.route->came(e.part);
  char *const out = reinterpret_cast<char*>(rows), *const beside = reinterpret_cast<char*>(weights);
  for_runs(counts, e.placed, e.part.size(),
           [&](int p, int64_t, int64_t row, int64_t source, int64_t run) {
    const int64_t n = within(row, run, room);
    char *const to = out + row * w.row, *const weight = beside + row * w.weight;
    if (p == rank()) {
      e.route->copy(e.rows, e.weights, w, mine + source, mine + source + n, to, weight);
      return;
    }
    const char* from = e.messages[p].data + head;
    std::memcpy(to, from + source * w.row, n * w.row);
    from += e.sizes[p] * w.row;
    std::memcpy(weight, from + source * w.weight, n * w.weight);
  });
  std::memset(out + all * w.row, 0, (room - all) * w.row);
  std::memset(beside + all * w.weight, 0, (room - all) * w.weight);
  if (offsets != 0) tell(counts, e.part.size(), room, reinterpret_cast<int64_t*>(offsets));
  e.stamps.moving += now() - began;
  close(e, true);
}

void Peers::tell(const std::vector<int64_t>& counts, int64_t experts, int64_t room,
                 int64_t* offsets) const {
  int64_t row = 0;
  for (int64_t x = 0; x < experts; ++x) {
    *offsets++ = std::min(row, room);
    for (int p = 0; p < size(); ++p) row += counts[p * experts + x];
  }
  *offsets = std::min(row, room);
}

int Peers::post_back(Route& route, intptr_t rows, intptr_t weights, Width width, int64_t room,
                     Part part) {
  const int64_t began = now(), experts = part.size();
  const std::vector<int64_t>& counts = route.came(part);
  const int exchange =
      post_rows(route, rows, weights, width, part, width.weight == 0 ? kBack : kGradBack);
  Exchange& e = exchanges_[exchange];
  e.room = room;
  // Where each expert's rows of a peer begin among all.
  e.begins.resize(size() * experts);
  int64_t begin = 0;
  for (int64_t x = 0; x < experts; ++x) {
    for (int p = 0; p < size(); ++p) {
      e.begins[p * experts + x] = begin;
      begin += counts[p * experts + x];
    }
  }
  for_peers([&](int p) {
    const int64_t* n = counts.data() + p * experts;
    const int64_t all = total(n, experts), bytes = all * (width.row + width.weight);
    char* row = allocate(bytes);
    char* weight = row + all * width.row;
    for (int64_t x = 0; x < experts; ++x) {
      e.copy_back(e.begins[p * experts + x], n[x], row, weight);
      row += n[x] * width.row;
      weight += n[x] * width.weight;
    }
    post(0, p, bytes, kRowsBack);
  });
  e.stamps.post = now();
  e.stamps.moving = e.stamps.post - began;
  return exchange;
}

void Peers::take_back(int exchange, intptr_t rows, intptr_t weights) {
  Exchange& e = at(exchange);
  arrive(e, kRowsBack, true);
  const int64_t began = now(), experts = e.part.size();
  const Width w = e.width;
  const std::vector<int64_t>& counts = e.route->came(e.part);
  for (int p = 0; p < size(); ++p) {
    const int64_t start = e.route->begin(p, e.part.first);
    const int64_t n = e.route->begin(p, e.part.end) - start;
    char* row = reinterpret_cast<char*>(rows) + start * w.row;
    char* weight = reinterpret_cast<char*>(weights) + start * w.weight;
    if (p != rank()) {
      expect_bytes(p, e.messages[p].bytes, n * (w.row + w.weight));
      std::memcpy(row, e.messages[p].data, n * w.row);
      std::memcpy(weight, e.messages[p].data + n * w.row, n * w.weight);
      continue;
    }
    const int64_t* own = counts.data() + p * experts;
    expect_bytes(p, total(own, experts), n);
    for (int64_t x = 0; x < experts; ++x) {
      e.copy_back(e.begins[p * experts + x], own[x], row, weight);
      row += own[x] * w.row;
      weight += own[x] * w.weight;
    }
  }
  e.stamps.moving += now() - began;
  close(e, true);
}

}  // namespace moekernels::host
