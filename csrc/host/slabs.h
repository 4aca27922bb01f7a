// Memory that the ranks of one machine share: a slab for each rank of a group, written by it and
// mapped by all, and messages that lie in it.
//
// A slab is a file in memory without a name, so that nothing is left of it when its last rank is
// gone, however that ended, and no size of /dev/shm bounds it. A message is a block of the sender's
// slab and a number on the channel to its reader; the reader copies it out and says so, which frees
// the block. Nothing is ever reset: every wait is for a number to be reached, in 32 bits that wrap.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace moekernels::host {

inline constexpr int kLanes = 2;   // channels of a pair that do not wait for one another
inline constexpr int kSlots = 16;  // messages of a channel that may lie unread

// Nanoseconds of the clock that all processes of a machine share.
int64_t now();

// A wait that ended without its message: the peer is gone, or patience is.
struct Lost : std::runtime_error {
  Lost(int peer, double seconds, bool gone);
  int peer;
  double seconds;
  bool gone;
};

class Slabs {
 public:
  // `space`: bytes of addresses, of which memory is taken as messages need it.
  Slabs(int rank, int size, uint64_t space);
  ~Slabs();
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  // The descriptor by which peers open this slab, as /proc/<pid>/fd/<fd>.
  int fd() const { return fd_; }
  // Map the slabs of all ranks; std::runtime_error where one cannot be reached.
  void connect(const std::vector<int>& pids, const std::vector<int>& fds);

  int rank() const { return rank_; }
  int size() const { return size_; }
  uint64_t held() const { return committed_; }  // bytes of memory that the own slab takes

  // A block of the own slab to fill and to `post`, before another is asked for; to several peers,
  // if they get the same. It comes back when all who were sent it have taken it.
  char* allocate(uint64_t bytes);
  void post(int lane, int peer, uint64_t bytes, uint32_t tag);

  // The number of the next message from a peer on a lane; every message is to be asked for once, in
  // the order in which it is sent.
  uint32_t expect(int lane, int peer) { return ++expected_[lane * size_ + peer]; }

  struct Message {
    const char* data;
    uint64_t bytes;
    int64_t posted;  // when, by `now`
  };
  // Waits for it. Throws Lost, or std::runtime_error where it is not what was expected.
  Message wait(int lane, int peer, uint32_t number, uint32_t tag);
  void taken(int lane, int peer, uint32_t number);

  int spins = 50;           // before a wait sleeps: more where every rank has a core of its own
  double patience = 600.0;  // seconds

 private:
  struct Slot {
    std::atomic<uint32_t> taken;  // number of the last message here that was copied out
    uint32_t tag;
    uint64_t offset, bytes;
    int64_t posted;
  };
  struct alignas(64) Channel {
    std::atomic<uint32_t> posted;            // number of the last message
    std::atomic<uint32_t> readers, writers;  // asleep
    Slot slots[kSlots];
  };
  struct Reader {
    int lane, peer;
    uint32_t number;
  };
  struct Block {
    uint64_t offset, bytes;
    std::vector<Reader> readers;
  };

  Channel& channel(int from, int lane, int to) const {
    return reinterpret_cast<Channel*>(slabs_[from])[lane * size_ + to];
  }
  bool is_free(const Block& block) const;
  void commit(uint64_t end);
  template <class Done>
  void wait_until(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers, int peer,
                  const Done& done);
  bool is_gone(int peer) const;

  int rank_, size_, fd_ = -1;
  uint64_t space_, top_, committed_ = 0;
  std::vector<char*> slabs_;
  std::vector<int> pids_;
  std::vector<uint64_t> births_;
  std::vector<uint32_t> sent_, expected_;
  std::vector<Block> blocks_;
  size_t last_ = 0;  // of them, the one that was asked for
};

}  // namespace moekernels::host
