// Compiled once for each ISA level: CMake sets MOEKERNELS_ISA to the level's namespace. One thread
// does what the CUDA kernels' blocks do; it is their oracle, and what a group of one rank takes.
#include "moekernels/exchange.h"

#include <algorithm>
#include <cstring>

#include "exchange_flags.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

void wait(const PeerSlabs& peers, uint32_t* word, uint32_t least) {
  wait_for_flag(word, least, {peers.own().base, peers.rank, peers.patience});
}

}  // namespace

void gather_counts(const CountsArgs& args) {
  const PeerSlabs& peers = args.peers;
  const SlabShape& shape = peers.shape;
  const Slab own = peers.own();
  const int64_t all = shape.peers * shape.experts, mine = peers.rank * shape.experts;
  const uint32_t number = ++*own.called();
  const int64_t moment = nanoseconds();
  for (int64_t p = 0; p < shape.peers; ++p) {
    int32_t* table = peers.of(p).table(number) + peers.rank * all;
    for (int64_t i = 0; i < all; ++i) {
      table[i] = static_cast<int32_t>(std::max<int64_t>(args.counts[i], 0));
    }
    if (peers.stamped()) {
      const Record there = peers.stamps(p);
      *there.began(peers.rank) = *there.ended(peers.rank) = moment;
    }
    store_flag(peers.of(p).ready(peers.rank), number);
  }
  for (int64_t p = 0; p < shape.peers; ++p) wait(peers, own.ready(p), number);
  if (peers.stamped()) {
    const Record here = peers.stamps(peers.rank);
    *here.need() = Record::early(moment);
    *here.waited(true) = nanoseconds() - moment;
    *here.readers(true) = 1;
  }
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
  const Record stamps = peers.stamps(peers.rank);
  const int64_t began = nanoseconds();
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
    if (args.back) {
      const int64_t count = std::min(end - run.begin, room - run.place);
      for (int64_t block = run.place / kHomeRows; block * kHomeRows < run.place + count; ++block) {
        const int64_t rows = rows_of_block(block, run.place, count);
        add_flag(peer.returned(args.slot, block), static_cast<uint32_t>(rows * args.units));
      }
    } else {
      add_flag(peer.arrived(args.slot, i % peers.shape.experts),
               static_cast<uint32_t>(end - run.begin));
    }
    if (peers.stamped()) *stamps.given(to) = nanoseconds();
  }
  for (int64_t p = 0; peers.stamped() && p < peers.shape.peers; ++p) {
    *peers.stamps(p).began(peers.rank) = began;
    *peers.stamps(p).ended(peers.rank) = *stamps.given(p);
  }
}

void receive_rows(const ReceiveArgs& args) {
  const PeerSlabs& peers = args.peers;
  const Slab own = peers.own();
  const int64_t groups = args.back ? own.home_blocks() : peers.shape.experts;
  const int64_t room = args.back ? peers.shape.back : peers.shape.rows;
  const int64_t total = args.back ? std::min(*args.total, room) : *args.total;
  const int64_t need = nanoseconds();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows =
        args.back ? rows_of_block(g, 0, total) : args.offsets[g + 1] - args.offsets[g];
    uint32_t* expected = own.expected(args.slot, (args.back ? peers.shape.experts : 0) + g);
    *expected += static_cast<uint32_t>(rows * args.units);
    wait(peers, args.back ? own.returned(args.slot, g) : own.arrived(args.slot, g), *expected);
  }
  const int64_t got = nanoseconds();
  const int64_t used = std::min({total, room, args.num_rows});
  const int64_t unused = args.num_rows - used;
  char* rows = static_cast<char*>(args.rows);
  std::memcpy(rows, own.rows(args.slot, args.back), used * args.row_bytes);
  std::memset(rows + used * args.row_bytes, 0, unused * args.row_bytes);
  if (args.weights != nullptr) {
    char* weights = static_cast<char*>(args.weights);
    std::memcpy(weights, own.weights(args.slot, args.back), used * args.weight_bytes);
    std::memset(weights + used * args.weight_bytes, 0, unused * args.weight_bytes);
  }
  if (peers.stamped()) {
    const Record stamps = peers.stamps(peers.rank);
    *stamps.need() = Record::early(need);
    *stamps.waited(true) = got - need;
    *stamps.readers(true) = 1;
    *stamps.copied() = nanoseconds() - got;
    *stamps.rows() = total;
  }
  const uint32_t uses = ++*own.received(args.slot, args.back);
  for (int64_t p = 0; p < peers.shape.peers; ++p) {
    store_flag(peers.of(p).freed(args.slot, peers.rank, args.back), uses);
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
