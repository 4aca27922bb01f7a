// Large outputs on the CPU, from memory that is kept when it is freed: how much, whose, until when.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <new>

#include "device.h"
#include "tensor.h"

namespace moekernels::binding {
namespace {

constexpr int64_t kLarge = 4 << 20, kGranule = 1 << 20;

// The memory that this process may use: the machine's, or what its control groups allow, whichever
// is less. `root` holds its proc and sys, "" those of the machine.
int64_t memory_allowed(std::string root) {
  int64_t allowed = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  const auto lower_to = [&](const std::string& file) {
    int64_t limit = 0;
    if (std::ifstream(file) >> limit && limit > 0)
      allowed = std::min(allowed, limit);  // "max" is no number
  };
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // 0::/path, or in version 1 4:memory:/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool memory = ("," + controllers + ",").find(",memory,") != std::string::npos;
    if (!controllers.empty() && !memory) continue;
    const std::string mount =
        root + (controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    const char* name = controllers.empty() ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      lower_to(mount + path + name);
      if (path.find('/') == std::string::npos) break;
    }
  }
  return allowed;
}

// Few sizes, so that outputs of about the same size take each other's memory: at most an eighth is
// not used.
int64_t rounded_up(int64_t bytes) {
  int64_t step = kGranule;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Large outputs come back: a step frees the gradients and activations that the next step allocates
// at the same sizes, and the page faults of fresh memory cost as much as the products. (Asking for
// huge pages instead takes five faults out of six on some machines, and sextuples their cost on
// virtual ones whose host takes free memory back.) Kept is at most an eighth of this process's
// share of the memory, and nothing that nobody took for ten seconds.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // outlives every tensor
    return *pool;
  }

  void* take(int64_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = kept_.size(); i-- > 0;) {
        if (kept_[i].bytes == bytes) {
          void* memory = kept_[i].memory;
          kept_.erase(kept_.begin() + i);
          held_ -= bytes;
          return memory;
        }
      }
      release(Clock::now());
    }
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  }

  // As if so many seconds had gone by in which nobody took anything.
  void idle(double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto gone =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    for (Block& block : kept_) block.since -= gone;
    release(Clock::now());
  }

  void give(void* memory, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const Clock::time_point now = Clock::now();
    kept_.push_back({memory, bytes, now});
    held_ += bytes;
    release(now);
  }

  int64_t held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kPatience{10};
  struct Block {
    void* memory;
    int64_t bytes;
    Clock::time_point since;
  };

  void release(Clock::time_point now) {  // the oldest goes first
    while (!kept_.empty() && (held_ > limit_ || now - kept_.front().since > kPatience)) {
      munmap(kept_.front().memory, kept_.front().bytes);
      held_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> kept_;
  int64_t held_ = 0;
  const int64_t limit_ = memory_allowed("") / 8 / processes_here();
};

[[maybe_unused]] int64_t pool_held() { return Pool::get().held(); }
[[maybe_unused]] void pool_idle(double seconds) { Pool::get().idle(seconds); }

}  // namespace

int64_t processes_here() {
  const char* size = std::getenv("LOCAL_WORLD_SIZE");
  if (size == nullptr || *size == '\0') return 1;
  int64_t processes = 0;
  const char* end = size + std::strlen(size);
  const auto [stop, error] = std::from_chars(size, end, processes);
  check(error == std::errc() && stop == end && processes > 0,
        "LOCAL_WORLD_SIZE must be a whole number of at least 1, got '", size, "'");
  return processes;
}

Tensor empty_large(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> sizes(shape), strides(shape.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  const int64_t wanted = strides[0] * sizes[0] *
                         (dtype == ScalarType::Double  ? 8
                          : dtype == ScalarType::Float ? 4
                                                       : 2);
  if (wanted < kLarge || !like.is_cpu()) return empty(shape, dtype, like);
  const int64_t bytes = rounded_up(wanted);
  return torch::stable::from_blob(Pool::get().take(bytes), sizes, strides, like.device(), dtype,
                                  [bytes](void* memory) { Pool::get().give(memory, bytes); });
}

#ifndef MOEKERNELS_EMULATED  // both libraries may be loaded at once
STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_memory_allowed(str root) -> int");
  m.def("_pool_held() -> int");
  m.def("_pool_idle(float seconds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CompositeExplicitAutograd, m) {
  m.impl("_memory_allowed", TORCH_BOX(&memory_allowed));
  m.impl("_pool_held", TORCH_BOX(&pool_held));
  m.impl("_pool_idle", TORCH_BOX(&pool_idle));
}
#endif

}  // namespace moekernels::binding
