#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <new>

#include "tensor.h"

namespace moekernels::binding {
namespace {

constexpr int64_t kLarge = 4 << 20, kGranule = 1 << 20;

// Large outputs come back: a step frees the gradients and activations that the next step allocates at the same sizes,
// and the page faults of fresh memory cost as much as the products. (Asking for huge pages instead takes five faults out
// of six on some machines, and sextuples their cost on virtual ones whose host takes free memory back.) At most an
// eighth of the machine's memory is kept.
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
          total_ -= bytes;
          return memory;
        }
      }
    }
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  }

  void give(void* memory, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back({memory, bytes});
    total_ += bytes;
    while (total_ > limit_) {  // the oldest goes first
      munmap(kept_.front().memory, kept_.front().bytes);
      total_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> kept_;
  int64_t total_ = 0;
  const int64_t limit_ = sysconf(_SC_PHYS_PAGES) / 8 * sysconf(_SC_PAGESIZE);
};

}  // namespace

Tensor empty_large(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> sizes(shape), strides(shape.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  const int64_t wanted = strides[0] * sizes[0] * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  if (wanted < kLarge || !like.is_cpu()) return empty(shape, dtype, like);
  const int64_t bytes = (wanted + kGranule - 1) / kGranule * kGranule;
  return torch::stable::from_blob(Pool::get().take(bytes), sizes, strides, like.device(), dtype,
                                  [bytes](void* memory) { Pool::get().give(memory, bytes); });
}

}  // namespace moekernels::binding
