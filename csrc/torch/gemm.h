// What the bindings of grouped_gemm and experts share: their workers, and offsets.
#pragma once

#include "device.h"
#include "moekernels/permute.h"

namespace moekernels::binding {

// E of offsets [E+1]: for ops that no other argument tells it.
int64_t experts_of(const char* op, const Tensor& offsets);

// offsets [E+1] int64, ascending from 0 to at most `rows`. Their values are read on the CPU only:
// on CUDA that would wait for the device.
void check_offsets(const char* op, const Tensor& offsets, int64_t experts, int64_t rows,
                   const Tensor& like);

// Runs f(worker, workers) on torch's threads, on the caller's alone where there are too few
// products to share.
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

// On CUDA: x [T, H] seen through token_of [R] as rows [R, H] of their own, which the products then
// read as they lie: where they do not gather them. This costs about 3 % of a layer of wide experts,
// gathering inside a product 6 % of that product.
template <class CudaStream>
Tensor permuted(const Tensor& x, const Tensor& token_of, CudaStream stream) {
  const int64_t rows = token_of.size(0);
  Tensor out = empty_large({rows, x.size(1)}, x.scalar_type(), x);
  const PermuteArgs args{.x = x.const_data_ptr(),
                         .token_of = token_of.const_data_ptr<int32_t>(),
                         .rows = out.mutable_data_ptr(),
                         .tokens = x.size(0),
                         .num_rows = rows,
                         .row_bytes = x.size(1) * size_of(dtype_of(x))};
  cuda::permute(args, stream);
  return out;
}

}  // namespace moekernels::binding
