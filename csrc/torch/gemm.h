// What the bindings of grouped_gemm and experts share: their workers, and offsets.
#pragma once

#include "tensor.h"

namespace moekernels::binding {

// offsets [E+1] int64, ascending from 0 to at most `rows`. Read here on the CPU only.
void check_offsets(const char* op, const Tensor& offsets, int64_t experts, int64_t rows, const Tensor& like);

// Runs f(worker, workers) on torch's threads, on the caller's alone where there are too few products to share.
template <class F>
void with_workers(int64_t products, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 18;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, products / kWorthAThread + 1);
  if (workers <= 1) {
    f(int64_t{0}, int64_t{1});
    return;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(worker, workers);
  });
}

}  // namespace moekernels::binding
