// Compiled once for each ISA level: CMake sets MOEKERNELS_ISA to the level's namespace. One thread
// does what the CUDA kernels' blocks do; it is their oracle, and what a group of one rank takes.
#include "moekernels/exchange.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

using Clock = std::chrono::steady_clock;

void store(uint32_t* word, uint32_t value) {
  std::atomic_ref<uint32_t>(*word).store(value, std::memory_order_release);
}
void add(uint32_t* word, uint32_t value) {
  std::atomic_ref<uint32_t>(*word).fetch_add(value, std::memory_order_release);
}

void wait(const PeerSlabs& peers, uint32_t* word, uint32_t least) {
  const std::atomic_ref<uint32_t> flag(*word);
  const auto began = Clock::now();
  for (;;) {
    const uint32_t value = flag.load(std::memory_order_acquire);
    if (static_cast<int32_t>(value - least) >= 0) return;
    const std::chrono::nanoseconds waited = Clock::now() - began;
    if (peers.patience > 0 && waited.count() > peers.patience) {
      const int64_t at = reinterpret_cast<char*>(word) - peers.own().base;
      throw std::runtime_error("exchange: rank " + std::to_string(peers.rank) +
                               " waits for the word at byte " + std::to_string(at) +
                               " of its slab to reach " + std::to_string(least) + ", it holds " +
                               std::to_string(value));
    }
    std::this_thread::yield();
  }
}

}  // namespace

void gather_counts(const CountsArgs& args) {
  const PeerSlabs& peers = args.peers;
  const SlabShape& shape = peers.shape;
  const Slab own = peers.own();
  const int64_t all = shape.peers * shape.experts, mine = peers.rank * shape.experts;
  const uint32_t number = ++*own.called();
  for (int64_t p = 0; p < shape.peers; ++p) {
    int32_t* table = peers.of(p).table(number) + peers.rank * all;
    for (int64_t i = 0; i < all; ++i) {
      table[i] = static_cast<int32_t>(std::max<int64_t>(args.counts[i], 0));
    }
    store(peers.of(p).ready(peers.rank), number);
  }
  for (int64_t p = 0; p < shape.peers; ++p) wait(peers, own.ready(p), number);
  const int32_t* table = own.table(number);
  int64_t begin = 0;
  args.needed[0] = args.needed[1] = 0;
  for (int64_t p = 0; p < shape.peers; ++p) {
    int64_t rows = 0, home = 0;
    for (int64_t x = p * shape.experts; x < (p + 1) * shape.experts; ++x) {
      args.out[x].begin = begin;
      begin += table[peers.rank * all + x];
      for (int64_t s = 0; s < shape.peers; ++s) {
        if (s == peers.rank) args.out[x].place = rows;
        rows += table[s * all + x];
      }
    }
    args.needed[0] = std::max(args.needed[0], rows);
    for (int64_t x = 0; x < all; ++x) {
      if (x >= mine && x < mine + shape.experts)
        args.back[(x - mine) * shape.peers + p].place = home;
      home += table[p * all + x];
    }
    args.needed[1] = std::max(args.needed[1], home);
  }
  args.out[all] = {begin, 0};
  int64_t row = 0;
  for (int64_t x = 0; x < shape.experts; ++x) {
    args.offsets[x] = row;
    args.held[x] = std::min(row, args.room);
    for (int64_t s = 0; s < shape.peers; ++s) {
      args.back[x * shape.peers + s].begin = row;
      args.came[s * shape.experts + x] = table[s * all + mine + x];
      row += table[s * all + mine + x];
    }
  }
  args.offsets[shape.experts] = row;
  args.held[shape.experts] = std::min(row, args.room);
  if (args.most != nullptr) *args.most = std::max(*args.most, args.needed[0]);
  args.back[all] = {row, 0};
}

void send_rows(const SendArgs& args) {
  const PeerSlabs& peers = args.peers;
  const Slab own = peers.own();
  const uint32_t uses = (*own.sent(args.slot, args.back))++;
  const int64_t room = args.back ? peers.shape.back : peers.shape.rows;
  for (int64_t i = 0; i < args.num_runs; ++i) {
    const Run& run = args.runs[i];
    const int64_t end = args.runs[i + 1].begin;
    if (end <= run.begin) continue;
    const int64_t to = args.back ? i % peers.shape.peers : i / peers.shape.experts;
    const Slab peer = peers.of(to);
    wait(peers, own.freed(args.slot, to, args.back), uses);
    for (int64_t row = run.begin; row < end; ++row) {
      const int64_t place = run.place + row - run.begin;
      if (place >= room) break;
      const bool here = row < args.num_rows;
      const int64_t slot = args.slot_of == nullptr || !here ? row : args.slot_of[row];
      const int64_t source = args.slot_of == nullptr ? row : slot / args.top_k;
      char* target = peer.rows(args.slot, args.back) + place * args.row_bytes;
      char* weight = peer.weights(args.slot, args.back) + place * args.weight_bytes;
      if (!here || (args.slot_of != nullptr && (slot < 0 || slot >= args.slots_of))) {
        std::memset(target, 0, args.row_bytes);
        std::memset(weight, 0, args.weight_bytes);
        continue;
      }
      const char* rows = static_cast<const char*>(args.rows);
      const char* weights = static_cast<const char*>(args.weights);
      std::memcpy(target, rows + source * args.row_bytes, args.row_bytes);
      if (weights != nullptr) {
        std::memcpy(weight, weights + slot * args.weight_bytes, args.weight_bytes);
      }
    }
    uint32_t* counter =
        args.back ? peer.returned(args.slot) : peer.arrived(args.slot, i % peers.shape.experts);
    add(counter, static_cast<uint32_t>((end - run.begin) * args.units));
  }
}

void receive_rows(const ReceiveArgs& args) {
  const PeerSlabs& peers = args.peers;
  const Slab own = peers.own();
  const int64_t groups = args.back ? 1 : peers.shape.experts;
  const int64_t room = args.back ? peers.shape.back : peers.shape.rows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = args.back ? *args.total : args.offsets[g + 1] - args.offsets[g];
    uint32_t* expected = own.expected(args.slot, args.back ? peers.shape.experts : g);
    *expected += static_cast<uint32_t>(rows * args.units);
    wait(peers, args.back ? own.returned(args.slot) : own.arrived(args.slot, g), *expected);
  }
  const int64_t used = std::min({*args.total, room, args.num_rows});
  const int64_t unused = args.num_rows - used;
  char* rows = static_cast<char*>(args.rows);
  std::memcpy(rows, own.rows(args.slot, args.back), used * args.row_bytes);
  std::memset(rows + used * args.row_bytes, 0, unused * args.row_bytes);
  if (args.weights != nullptr) {
    char* weights = static_cast<char*>(args.weights);
    std::memcpy(weights, own.weights(args.slot, args.back), used * args.weight_bytes);
    std::memset(weights + used * args.weight_bytes, 0, unused * args.weight_bytes);
  }
  const uint32_t uses = ++*own.received(args.slot, args.back);
  for (int64_t p = 0; p < peers.shape.peers; ++p) {
    store(peers.of(p).freed(args.slot, peers.rank, args.back), uses);
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
