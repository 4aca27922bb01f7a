#include "slabs.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#if defined(__linux__)
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace moekernels::host {

Lost::Lost(int peer, double seconds, bool gone)
    : std::runtime_error("a peer's message did not come"),
      peer(peer),
      seconds(seconds),
      gone(gone) {}

#if defined(__linux__)
namespace {

constexpr uint64_t kPage = 4096, kChunk = 1 << 18;  // bytes of memory taken at once, at least
constexpr uint64_t kSmallest = 256;                 // bytes of a block

std::string said(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

uint64_t rounded(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

// Blocks come in four sizes a doubling, so that messages of nearly one size share them.
uint64_t block_size(uint64_t bytes) {
  uint64_t step = kSmallest / 4;
  while (step * 8 < bytes) step *= 2;
  return rounded(bytes > kSmallest ? bytes : kSmallest, step);
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, int64_t nanoseconds) {
  const timespec limit{.tv_sec = nanoseconds / 1'000'000'000,
                       .tv_nsec = nanoseconds % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
}

// When a process was started, in the kernel's ticks; 0 where it is gone or a zombie.
uint64_t birth(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return 0;
  std::istringstream rest(line.substr(line.rfind(')') + 1));
  std::string state, skipped;
  rest >> state;
  for (int field = 4; field < 22; ++field) rest >> skipped;
  uint64_t ticks = 0;
  rest >> ticks;
  return state == "Z" || state == "X" ? 0 : ticks;
}

bool reached(uint32_t value, uint32_t wanted) { return static_cast<int32_t>(value - wanted) >= 0; }

}  // namespace

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

Slabs::Slabs(int rank, int size, uint64_t space)
    : rank_(rank),
      size_(size),
      space_(rounded(space, kPage)),
      slabs_(size, nullptr),
      sent_(kLanes * size),
      expected_(kLanes * size) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  top_ = rounded(sizeof(Channel) * kLanes * size, kPage);
  if (top_ > space_) throw std::runtime_error("a slab must hold more than its channels");
  fd_ = memfd_create("moekernels", MFD_CLOEXEC);
  if (fd_ < 0) throw std::runtime_error(said("no memory file can be made"));
  if (ftruncate(fd_, static_cast<off_t>(space_)) != 0) {
    const std::string text = said("no memory file of that size can be made");
    close(fd_);
    throw std::runtime_error(text);
  }
  try {
    commit(top_);
  } catch (...) {
    close(fd_);
    throw;
  }
}

Slabs::~Slabs() {
  for (char* slab : slabs_) {
    if (slab != nullptr) munmap(slab, space_);
  }
  if (fd_ >= 0) close(fd_);
}

void Slabs::connect(const std::vector<int>& pids, const std::vector<int>& fds) {
  pids_ = pids;
  for (int peer = 0; peer < size_; ++peer) {
    const std::string path =
        "/proc/" + std::to_string(pids.at(peer)) + "/fd/" + std::to_string(fds.at(peer));
    const int fd = peer == rank_ ? fd_ : open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) throw std::runtime_error(said(path.c_str()));
    void* slab = mmap(nullptr, space_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    const std::string text = slab == MAP_FAILED ? said("a peer's memory cannot be mapped") : "";
    if (peer != rank_) close(fd);
    if (slab == MAP_FAILED) throw std::runtime_error(text);
    madvise(slab, space_, MADV_DONTDUMP);
    slabs_[peer] = static_cast<char*>(slab);
    births_.push_back(birth(pids[peer]));
  }
}

// Pages are taken here, where that can fail, not by a signal when they are written to.
void Slabs::commit(uint64_t end) {
  if (end <= committed_) return;
  end = rounded(end, end - committed_ > kChunk ? kPage : kChunk);
  end = end < space_ ? end : space_;
  const int error =
      posix_fallocate(fd_, static_cast<off_t>(committed_), static_cast<off_t>(end - committed_));
  if (error != 0) {
    errno = error;
    throw std::runtime_error(said(
        ("no room for " + std::to_string((end + (1 << 20) - 1) >> 20) + " MiB of shared memory")
            .c_str()));
  }
  committed_ = end;
}

bool Slabs::is_free(const Block& block) const {
  for (const Reader& r : block.readers) {
    const Slot& slot = channel(rank_, r.lane, r.peer).slots[r.number % kSlots];
    if (!reached(slot.taken.load(std::memory_order_acquire), r.number)) return false;
  }
  return true;
}

char* Slabs::allocate(uint64_t bytes) {
  const uint64_t size = block_size(bytes);
  Block* best = nullptr;
  for (Block& block : blocks_) {
    const bool fits = block.bytes >= size && block.bytes <= 8 * size;
    if (fits && (best == nullptr || block.bytes < best->bytes) && is_free(block)) best = &block;
  }
  if (best == nullptr) {
    if (size > space_ - top_) {
      throw std::runtime_error("no room for a message of " + std::to_string(bytes) +
                               " bytes in a slab of " + std::to_string(space_));
    }
    commit(top_ + size);
    blocks_.push_back({top_, size, {}});
    top_ += size;
    best = &blocks_.back();
  }
  best->readers.clear();
  last_ = best - blocks_.data();
  return slabs_[rank_] + best->offset;
}

void Slabs::post(int lane, int peer, uint64_t bytes, uint32_t tag) {
  const uint32_t number = ++sent_[lane * size_ + peer];
  Channel& out = channel(rank_, lane, peer);
  Slot& slot = out.slots[number % kSlots];
  const auto free = [&] { return number <= kSlots || reached(slot.taken.load(), number - kSlots); };
  if (!free()) wait_until(slot.taken, out.writers, peer, free);
  Block& block = blocks_[last_];
  block.readers.push_back({lane, peer, number});
  slot.tag = tag;
  slot.offset = block.offset;
  slot.bytes = bytes;
  slot.posted = now();
  out.posted.store(number);  // in one order with `readers`, so that no sleeper is missed
  if (out.readers.load() != 0) futex_wake(out.posted);
}

Slabs::Message Slabs::wait(int lane, int peer, uint32_t number, uint32_t tag) {
  Channel& in = channel(peer, lane, rank_);
  wait_until(in.posted, in.readers, peer, [&] { return reached(in.posted.load(), number); });
  const Slot& slot = in.slots[number % kSlots];
  if (slot.tag != tag) {
    throw std::runtime_error("peer " + std::to_string(peer) + " sent message " +
                             std::to_string(slot.tag) + " where " + std::to_string(tag) +
                             " was expected: ranks of one group run different programs");
  }
  return {slabs_[peer] + slot.offset, slot.bytes, slot.posted};
}

void Slabs::taken(int lane, int peer, uint32_t number) {
  Channel& in = channel(peer, lane, rank_);
  Slot& slot = in.slots[number % kSlots];
  slot.taken.store(number);
  if (in.writers.load() != 0) futex_wake(slot.taken);
}

bool Slabs::is_gone(int peer) const { return birth(pids_[peer]) != births_[peer]; }

template <class Done>
void Slabs::wait_until(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers, int peer,
                       const Done& done) {
  for (int i = 0; i < spins; ++i) {
    if (done()) return;
  }
  const int64_t began = now(), look = 1'000'000'000;
  while (true) {
    sleepers.fetch_add(1);
    const uint32_t value = word.load();
    if (!done()) futex_wait(word, value, look);
    sleepers.fetch_sub(1);
    if (done()) return;
    const int64_t waited = now() - began;
    if (waited < look) continue;
    const bool gone = is_gone(peer);
    if (done()) return;  // it may have been its last deed
    if (gone || static_cast<double>(waited) > patience * 1e9) {
      throw Lost(peer, std::round(static_cast<double>(waited) / 1e8) / 10, gone);
    }
  }
}

#else  // another system: the collective exchange does all

int64_t now() { return 0; }
Slabs::Slabs(int, int, uint64_t) { throw std::runtime_error("ranks share memory on Linux only"); }
Slabs::~Slabs() = default;
void Slabs::connect(const std::vector<int>&, const std::vector<int>&) {}
char* Slabs::allocate(uint64_t) { return nullptr; }
void Slabs::post(int, int, uint64_t, uint32_t) {}
Slabs::Message Slabs::wait(int, int, uint32_t, uint32_t) { return {}; }
void Slabs::taken(int, int, uint32_t) {}

#endif

}  // namespace moekernels::host
