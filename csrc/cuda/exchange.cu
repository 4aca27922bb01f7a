// Rows go straight to their place in a peer's slab, a warp a row, and are counted there; whoever
// takes them waits for the count. Plain stores: 512 bytes of a row at a time, coalesced.
#include "moekernels/exchange.h"

#include <algorithm>

#include "common/home.cuh"
#include "common/launch.cuh"
#include "common/move.cuh"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kTile = 8;         // rows that a warp sends before it counts them
constexpr int64_t kSendBlocks = 16;  // of the card's 132: a link is full with that many
constexpr int64_t kReceiveBlocks = 264;

__device__ void wait(const PeerSlabs& peers, const uint32_t* word, uint32_t least) {
  await(word, least, peers.own().base, peers.rank, peers.patience, peers.stuck);
}

__device__ int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
__device__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// One block; a warp for each question that the table answers, a lane for each peer.
__global__ void __launch_bounds__(kThreads) gather_all_counts(const CountsArgs args) {
  const PeerSlabs& peers = args.peers;
  const SlabShape& shape = peers.shape;
  const Slab own = peers.own();
  const int64_t all = shape.peers * shape.experts, rank = peers.rank;
  const uint32_t number = *own.called() + 1;
  for (int64_t p = 0; p < shape.peers; ++p) {
    int32_t* table = peers.of(p).table(number) + rank * all;
    for (int64_t i = threadIdx.x; i < all; i += kThreads) {
      table[i] = static_cast<int32_t>(max_of(args.counts[i], 0));
    }
  }
  __syncthreads();
  const int64_t begin = peers.stamped() ? nanoseconds() : 0;
  if (threadIdx.x < shape.peers) {
    if (peers.stamped()) {
      const Record there = peers.stamps(threadIdx.x);
      *there.began(rank) = *there.ended(rank) = begin;
    }
    store_release(peers.of(threadIdx.x).ready(rank), number);
    wait(peers, own.ready(threadIdx.x), number);
  }
  __shared__ unsigned long long most[2];
  if (threadIdx.x == 0) {
    *own.called() = number;
    most[0] = most[1] = 0;
  }
  __syncthreads();
  if (peers.stamped() && threadIdx.x == 0) {
    const Record here = peers.stamps(rank);
    *here.need() = Record::early(begin);
    *here.waited(true) = nanoseconds() - begin;
    *here.readers(true) = 1;
  }
  const int32_t* table = own.table(number);
  const int question = threadIdx.x / kWarp;
  const int64_t peer = threadIdx.x % kWarp;
  if (question == 0 && peer < shape.peers) {  // where own rows go at this peer
    int64_t rows = 0;
    for (int64_t x = peer * shape.experts; x < (peer + 1) * shape.experts; ++x) {
      for (int64_t s = 0; s < shape.peers; ++s) {
        if (s == rank) args.out[x].place = rows;
        rows += table[s * all + x];
      }
    }
    atomicMax(&most[0], static_cast<unsigned long long>(rows));
  } else if (question == 1 && peer < shape.peers) {  // where this peer's results go home to
    int64_t row = 0;
    for (int64_t x = 0; x < all; ++x) {
      const int64_t local = x - rank * shape.experts;
      if (inside(local, shape.experts)) args.back[local * shape.peers + peer].place = row;
      row += table[peer * all + x];
    }
    atomicMax(&most[1], static_cast<unsigned long long>(row));
  } else if (question == 2 && peer == 0) {  // own rows by expert
    int64_t row = 0;
    for (int64_t x = 0; x < all; ++x) {
      args.out[x].begin = row;
      row += table[rank * all + x];
    }
    args.out[all] = {row, 0};
  } else if (question == 3 && peer == 0) {  // rows that come, by local expert, then by peer
    int64_t row = 0;
    for (int64_t x = 0; x < shape.experts; ++x) {
      args.offsets[x] = row;
      args.held[x] = min_of(row, args.room);
      for (int64_t s = 0; s < shape.peers; ++s) {
        const int64_t rows = table[s * all + rank * shape.experts + x];
        args.back[x * shape.peers + s].begin = row;
        args.came[s * shape.experts + x] = rows;
        row += rows;
      }
    }
    args.offsets[shape.experts] = row;
    args.held[shape.experts] = min_of(row, args.room);
    args.back[all] = {row, 0};
  }
  __syncthreads();
  if (threadIdx.x < 2) args.needed[threadIdx.x] = static_cast<int64_t>(most[threadIdx.x]);
  if (threadIdx.x == 0 && args.most != nullptr) {
    *args.most = max_of(*args.most, static_cast<int64_t>(most[0]));
  }
}

template <class Word>
__device__ void copy_row(const char* from, bool used, char* to, int64_t row_bytes) {
  for (int64_t at = 0; at < row_bytes; at += kPieceBytes<Word>) {
    move_piece<Word>(from, used, to, row_bytes, {0, at});
  }
}

__device__ void copy_weight(const char* from, bool used, char* to, int64_t bytes) {
  for (int64_t i = lane_id(); i < bytes / 4; i += kWarp) {
    reinterpret_cast<uint32_t*>(to)[i] = used ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
  }
}

// The run that holds a row: the last that begins at or before it.
__device__ int64_t run_of(const Run* runs, int64_t num_runs, int64_t row) {
  int64_t low = 0, high = num_runs;
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    runs[middle].begin <= row ? low = middle : high = middle;
  }
  return low;
}

// Rows [row, end) of one run, all lanes of a warp.
template <class Word>
__device__ void send_run(const SendArgs& args, const Slab& peer, const Run& run, int64_t row,
                         int64_t end) {
  const int64_t room = args.back ? peer.shape.back : peer.shape.rows;
  for (; row < end; ++row) {
    const int64_t to = run.place + row - run.begin;
    if (to >= room) break;  // the step is repeated with larger slots
    const bool here = row < args.num_rows;
    const int64_t slot = args.slot_of == nullptr || !here ? row : args.slot_of[row];
    const bool used = here && (args.slot_of == nullptr || inside(slot, args.slots_of));
    const int64_t source = args.slot_of == nullptr ? row : slot / args.top_k;
    const char* from = static_cast<const char*>(args.rows) + (used ? source : 0) * args.row_bytes;
    copy_row<Word>(from, used, peer.rows(args.slot, args.back) + to * args.row_bytes,
                   args.row_bytes);
    if (args.weight_bytes == 0) continue;
    from = static_cast<const char*>(args.weights) + (used ? slot : 0) * args.weight_bytes;
    copy_weight(from, used, peer.weights(args.slot, args.back) + to * args.weight_bytes,
                args.weight_bytes);
  }
}

// A warp sends tiles of rows; those of the next rank come first, so that not all begin with one.
template <class Word>
__global__ void __launch_bounds__(kThreads) send_tiles(const SendArgs args) {
  const PeerSlabs& peers = args.peers;
  const SlabShape& shape = peers.shape;
  const Slab own = peers.own();
  const Record stamps = peers.stamps(peers.rank);
  if (peers.stamped() && threadIdx.x == 0) {
    note_most(stamps.sending(), Record::early(nanoseconds()));
  }
  const uint32_t uses = *own.sent(args.slot, args.back);
  const int64_t total = args.runs[args.num_runs].begin;
  const int64_t tiles = (total + kTile - 1) / kTile;
  const int64_t next = args.back ? 0 : (peers.rank + 1) % shape.peers * shape.experts;
  const int64_t first = min_of(args.runs[next].begin, total) / kTile;
  for (int64_t tile = args.first / kTile + warp_of_grid(); tile < tiles;
       tile += gridDim.x * int64_t{kWarps}) {
    int64_t row = (tile + first) % tiles * kTile;
    const int64_t end = min_of(row + kTile, total);
    row = max_of(row, args.first);
    int64_t index = run_of(args.runs, args.num_runs, row);
    for (; row < end; ++index) {
      const Run run = args.runs[index];
      const int64_t stop = min_of(end, args.runs[index + 1].begin);
      if (stop <= row) continue;
      const int64_t to = args.back ? index % shape.peers : index / shape.experts;
      const Slab peer = peers.of(to);
      if (lane_id() == 0) wait(peers, own.freed(args.slot, to, args.back), uses);
      __syncwarp();
      send_run<Word>(args, peer, run, row, stop);
      __syncwarp();  // the lane that counts is behind all lanes' stores
      if (lane_id() == 0) {
        if (args.back) {
          count_home(peer, args.slot, run.place + row - run.begin, stop - row, args.units);
        } else {
          add_release(peer.arrived(args.slot, index % shape.experts),
                      static_cast<uint32_t>(stop - row));
        }
        if (peers.stamped()) note_most(stamps.given(to), nanoseconds());
      }
      row = stop;
    }
  }
  if (!last_block(own.ticket(args.slot, args.back, true))) return;
  if (threadIdx.x == 0) *own.sent(args.slot, args.back) = uses + 1;
  if (peers.stamped() && threadIdx.x < shape.peers) {
    const int64_t to = threadIdx.x;
    *peers.stamps(to).began(peers.rank) = Record::early(*stamps.sending());
    *peers.stamps(to).ended(peers.rank) = *stamps.given(to);
  }
}

// What the warps of a block that takes rows say of their times.
struct BlockTimes {
  unsigned long long need, waited, readers, copied;

  __device__ void begin() {
    if (threadIdx.x == 0) need = waited = readers = copied = 0;
    __syncthreads();
  }
  __device__ void add(int64_t first_need, int64_t waiting, int64_t copying) {
    atomicMax(&copied, static_cast<unsigned long long>(copying));
    if (first_need == 0) return;  // it had no rows that come
    atomicMax(&need, static_cast<unsigned long long>(first_need));
    atomicAdd(&waited, static_cast<unsigned long long>(waiting));
    atomicAdd(&readers, 1ull);
  }
  __device__ void end(const Record& to) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    note_most(to.copied(), static_cast<int64_t>(copied));
    if (readers == 0) return;
    note_most(to.need(), static_cast<int64_t>(need));
    note_sum(to.waited(true), static_cast<int64_t>(waited));
    note_sum(to.readers(true), static_cast<int64_t>(readers));
  }
};

// A warp takes tiles of rows as soon as all of their expert's have come.
template <class Word>
__global__ void __launch_bounds__(kThreads) receive_tiles(const ReceiveArgs args) {
  const PeerSlabs& peers = args.peers;
  const SlabShape& shape = peers.shape;
  const Slab own = peers.own();
  const int64_t room = args.back ? shape.back : shape.rows;
  // Results that find no room are not counted; rows are.
  const int64_t total = args.back ? min_of(*args.total, room) : *args.total;
  const int64_t groups = args.back ? own.home_blocks() : shape.experts;
  const int64_t before_home = args.back ? shape.experts : 0;  // of `expected`
  const char* from = own.rows(args.slot, args.back);
  const char* weights = own.weights(args.slot, args.back);
  char* rows = static_cast<char*>(args.rows);
  __shared__ BlockTimes times;
  if (peers.stamped()) times.begin();
  const int64_t start = peers.stamped() ? nanoseconds() : 0;
  int64_t need = 0, waiting = 0;
  const auto end_of = [&](int64_t group) {
    return args.back ? min_of((group + 1) * kHomeRows, total) : args.offsets[group + 1];
  };
  int64_t group = 0, begin = 0, end = end_of(0);
  bool waited = false;
  for (int64_t tile = warp_of_grid(); tile * kTile < args.num_rows;
       tile += gridDim.x * int64_t{kWarps}) {
    for (int64_t row = tile * kTile; row < min_of((tile + 1) * kTile, args.num_rows); ++row) {
      const bool used = row < total && row < room;
      for (; used && row >= end; waited = false) {
        begin = end;
        end = end_of(++group);
      }
      if (used && !waited) {
        if (lane_id() == 0) {
          const uint32_t* counter =
              args.back ? own.returned(args.slot, group) : own.arrived(args.slot, group);
          const uint32_t before = *own.expected(args.slot, before_home + group);
          const int64_t now = peers.stamped() ? nanoseconds() : 0;
          wait(peers, counter, before + static_cast<uint32_t>((end - begin) * args.units));
          if (peers.stamped()) {
            need = max_of(need, Record::early(now));
            waiting += nanoseconds() - now;
          }
        }
        __syncwarp();
        waited = true;
      }
      copy_row<Word>(from + (used ? row : 0) * args.row_bytes, used, rows + row * args.row_bytes,
                     args.row_bytes);
      if (args.weight_bytes > 0) {
        copy_weight(weights + (used ? row : 0) * args.weight_bytes, used,
                    static_cast<char*>(args.weights) + row * args.weight_bytes, args.weight_bytes);
      }
    }
  }
  if (peers.stamped()) {
    if (lane_id() == 0) times.add(need, waiting, nanoseconds() - start - waiting);
    times.end(peers.stamps(peers.rank));
  }
  if (!last_block(own.ticket(args.slot, args.back, false))) return;
  if (peers.stamped() && threadIdx.x == 0) *peers.stamps(peers.rank).rows() = total;
  // Rows that found no room were counted like the others, and nobody waited for them yet.
  for (int64_t g = threadIdx.x; g < groups; g += kThreads) {
    const int64_t rows_of =
        args.back ? rows_of_block(g, 0, total) : args.offsets[g + 1] - args.offsets[g];
    uint32_t* expected = own.expected(args.slot, before_home + g);
    const uint32_t reached = *expected + static_cast<uint32_t>(rows_of * args.units);
    wait(peers, args.back ? own.returned(args.slot, g) : own.arrived(args.slot, g), reached);
    *expected = reached;
  }
  __syncthreads();
  if (threadIdx.x < shape.peers) {
    const uint32_t uses = *own.received(args.slot, args.back) + 1;
    store_release(peers.of(threadIdx.x).freed(args.slot, peers.rank, args.back), uses);
  }
  __syncthreads();
  if (threadIdx.x == 0) *own.received(args.slot, args.back) += 1;
}

int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

int64_t blocks_for(int64_t rows, int64_t most) {
  return std::max<int64_t>(1, std::min(most, ceil_div(rows, kTile * kWarps)));
}

}  // namespace

void gather_counts(const CountsArgs& args, Stream stream) {
  launch("exchange_counts", gather_all_counts, 1, kThreads, 0, stream, args);
}

void send_rows(const SendArgs& args, Stream stream) {
  const int64_t rows = args.num_rows - args.first;
  with_word({address(args.rows), address(args.peers.own().base), args.row_bytes}, [&](auto word) {
    launch("exchange_send", send_tiles<decltype(word)>, blocks_for(rows, kSendBlocks), kThreads, 0,
           stream, args);
  });
}

void receive_rows(const ReceiveArgs& args, Stream stream) {
  with_word({address(args.rows), address(args.peers.own().base), args.row_bytes}, [&](auto word) {
    launch("exchange_receive", receive_tiles<decltype(word)>,
           blocks_for(args.num_rows, kReceiveBlocks), kThreads, 0, stream, args);
  });
}

}  // namespace moekernels::cuda
