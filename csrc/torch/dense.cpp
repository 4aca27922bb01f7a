// Products of whole matrices by the kernels of grouped_gemm, as of one expert, on the CPU: checks,
// memory, launch. On CUDA torch's own are what these are here.
#include "gemm.h"
#include "moekernels/grouped_gemm.h"

namespace moekernels::binding {
namespace {

Tensor dense(const Tensor& x, const Tensor& w, bool transposed) {
  const char* op = "dense";
  check_tensor(op, "x", x, kFloats, {{"T"}, {"I"}});
  const ScalarType dtype = x.scalar_type();
  const int64_t tokens = x.size(0), in = x.size(1);
  if (transposed) {
    check_tensor(op, "w", w, {dtype}, {{"I", in}, {"O"}}, &x);
  } else {
    check_tensor(op, "w", w, {dtype}, {{"O"}, {"I", in}}, &x);
  }
  const int64_t out_width = w.size(transposed ? 1 : 0), offsets[] = {0, tokens};
  Tensor y = empty_large({tokens, out_width}, dtype, x);
  const GroupedGemmArgs args{
      .dtype = dtype_of(x),
      .rows = x.const_data_ptr(),
      .w = w.const_data_ptr(),
      .offsets = offsets,
      .out = y.mutable_data_ptr(),
      .num_rows = tokens,
      .in = in,
      .out_width = out_width,
      .experts = 1,
      .transposed = transposed,
  };
  with_workers(tokens * in * out_width,
               [&](int64_t worker, int64_t workers) { cpu::grouped_gemm(args, worker, workers); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_dense(Tensor x, Tensor w, bool transposed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CPU, m) { m.impl("_dense", TORCH_BOX(&dense)); }

}  // namespace moekernels::binding
