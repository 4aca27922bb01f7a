// Words by which ranks on a CPU signal, and their clock: what csrc/cuda/common/flags.cuh is to
// those on GPUs. Included into the namespace of an ISA level.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>

namespace moekernels::cpu::MOEKERNELS_ISA {

inline int64_t nanoseconds() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void store_flag(uint32_t* word, uint32_t value) {
  std::atomic_ref<uint32_t>(*word).store(value, std::memory_order_release);
}
inline void add_flag(uint32_t* word, uint32_t value) {
  std::atomic_ref<uint32_t>(*word).fetch_add(value, std::memory_order_release);
}

// Who waits: where its memory begins, its rank, and for how many nanoseconds; 0: for ever.
struct Waiter {
  const char* base;
  int64_t rank, patience;
};

inline void wait_for_flag(uint32_t* word, uint32_t least, const Waiter& by) {
  const std::atomic_ref<uint32_t> flag(*word);
  const int64_t began = nanoseconds();
  for (;;) {
    const uint32_t value = flag.load(std::memory_order_acquire);
    if (static_cast<int32_t>(value - least) >= 0) return;
    if (by.patience > 0 && nanoseconds() - began > by.patience) {
      const int64_t at = reinterpret_cast<char*>(word) - by.base;
      throw std::runtime_error("exchange: rank " + std::to_string(by.rank) +
                               " waits for the word at byte " + std::to_string(at) +
                               " of its slab to reach " + std::to_string(least) + ", it holds " +
                               std::to_string(value));
    }
    std::this_thread::yield();
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
