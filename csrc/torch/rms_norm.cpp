// Rows over their root mean square, alone or behind a sum: checks, memory, launch.
#include "moekernels/rms_norm.h"

#include "device.h"

namespace moekernels::binding {
namespace {

// Returns y, x + added (empty without `added`) and the inverse of each row's root mean square.
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& added,
                                            const Tensor& weight, double eps) {
  const char* op = "rms_norm";
  check_tensor(op, "x", x, kFloats, {{"R"}, {"H"}});
  const ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_optional(op, "added", added, {dtype}, {{"R", rows}, {"H", hidden}}, x);
  check_tensor(op, "weight", weight, {dtype}, {{"H", hidden}}, &x);
  Tensor y = empty_large({rows, hidden}, dtype, x);
  Tensor sum = empty_large({added ? rows : 0, hidden}, dtype, x);
  Tensor rstd = empty({rows}, wide(dtype), x);
  const RmsNormArgs args{
      .x = x.const_data_ptr(),
      .added = pointer_of(added),
      .weight = weight.const_data_ptr(),
      .sum = added ? sum.mutable_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr(),
      .num_rows = rows,
      .hidden = hidden,
      .eps = eps,
      .dtype = dtype_of(x),
  };
  run(x, [&](auto stream) { cuda::rms_norm(args, stream); }, [&] {
    parallel(rows, grain_of((added ? 4 : 2) * hidden * size_of(args.dtype)),
             [&](int64_t begin, int64_t end) { cpu::rms_norm(args, begin, end); });
  });
  return {y, sum, rstd};
}

// x: what was normalised. Returns dx, which dsum is a part of, and dweight.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const OptionalTensor& dsum,
                                             const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  const char* op = "rms_norm_backward";
  check_tensor(op, "x", x, kFloats, {{"R"}, {"H"}});
  const ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_tensor(op, "dy", dy, {dtype}, {{"R", rows}, {"H", hidden}}, &x);
  check_optional(op, "dsum", dsum, {dtype}, {{"R", rows}, {"H", hidden}}, x);
  check_tensor(op, "weight", weight, {dtype}, {{"H", hidden}}, &x);
  check_tensor(op, "rstd", rstd, {wide(dtype)}, {{"R", rows}}, &x);
  const int64_t pieces = rms_norm_pieces(rows);
  Tensor dx = empty_large({rows, hidden}, dtype, x);
  Tensor dweight = empty({hidden}, dtype, x);
  Tensor parts = empty({pieces, hidden}, wide(dtype), x);
  const RmsNormBackwardArgs args{
      .dy = dy.const_data_ptr(),
      .dsum = pointer_of(dsum),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .rstd = rstd.const_data_ptr(),
      .dx = dx.mutable_data_ptr(),
      .parts = parts.mutable_data_ptr(),
      .dweight = dweight.mutable_data_ptr(),
      .num_rows = rows,
      .hidden = hidden,
      .dtype = dtype_of(x),
  };
  run(x, [&](auto stream) { cuda::rms_norm_backward(args, stream); }, [&] {
    parallel(pieces, grain_of(4 * kRmsNormPiece * hidden * size_of(args.dtype)),
             [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(args, begin, end); });
    parallel(hidden, grain_of(pieces * size_of(args.dtype)),
             [&](int64_t begin, int64_t end) { cpu::rms_norm_dweight(args, begin, end); });
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_rms_norm(Tensor x, Tensor? added, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) "
      "-> (Tensor, Tensor)");
}

MOEKERNELS_IMPL(m) {
  m.impl("_rms_norm", TORCH_BOX(&rms_norm));
  m.impl("_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace moekernels::binding
