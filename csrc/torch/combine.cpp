// The sum of each token's weighted rows, and its gradient: checks, memory, launch.
#include "moekernels/combine.h"

#include "device.h"

namespace moekernels::binding {
namespace {

// token_of is the backward's; it is checked here, where the caller can still be told.
Tensor combine(const Tensor& rows, const Tensor& row_of, const OptionalTensor& weights,
               const OptionalTensor& token_of) {
  check_tensor("combine", "rows", rows, kFloats, {{"R"}, {"H"}});
  check_tensor("combine", "row_of", row_of, kInt32, {{"T"}, {"K"}}, &rows);
  const int64_t tokens = row_of.size(0), top_k = row_of.size(1), hidden = rows.size(1);
  const ScalarType wide_dtype = wide(rows.scalar_type());
  check_optional("combine", "weights", weights, {wide_dtype}, {{"T", tokens}, {"K", top_k}}, rows);
  check_optional("combine", "token_of", token_of, kInt32, {{"R", rows.size(0)}}, rows);
  Tensor out = empty_large({tokens, hidden}, rows.scalar_type(), rows);
  const CombineArgs args{
      .rows = rows.const_data_ptr(),
      .row_of = row_of.const_data_ptr<int32_t>(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .num_rows = rows.size(0),
      .tokens = tokens,
      .top_k = top_k,
      .hidden = hidden,
      .dtype = dtype_of(rows),
  };
  run(rows, [&](auto stream) { cuda::combine(args, stream); }, [&] {
    parallel(tokens, grain_of((top_k + 1) * hidden * size_of(args.dtype)),
             [&](int64_t begin, int64_t end) { cpu::combine(args, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& dout, const Tensor& rows,
                                            const Tensor& row_of, const Tensor& token_of,
                                            const Tensor& weights) {
  check_tensor("combine_backward", "rows", rows, kFloats, {{"R"}, {"H"}});
  check_tensor("combine_backward", "row_of", row_of, kInt32, {{"T"}, {"K"}}, &rows);
  const int64_t num_rows = rows.size(0), hidden = rows.size(1);
  const int64_t tokens = row_of.size(0), top_k = row_of.size(1);
  const ScalarType dtype = rows.scalar_type(), wide_dtype = wide(dtype);
  check_tensor("combine_backward", "dout", dout, {dtype}, {{"T", tokens}, {"H", hidden}}, &rows);
  check_tensor("combine_backward", "token_of", token_of, kInt32, {{"R", num_rows}}, &rows);
  check_tensor("combine_backward", "weights", weights, {wide_dtype}, {{"T", tokens}, {"K", top_k}},
               &rows);
  Tensor drows = empty_large({num_rows, hidden}, dtype, rows);
  Tensor dweights = empty({tokens, top_k}, wide_dtype, rows);
  const CombineBackwardArgs args{
      .dout = dout.const_data_ptr(),
      .rows = rows.const_data_ptr(),
      .row_of = row_of.const_data_ptr<int32_t>(),
      .token_of = token_of.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr(),
      .drows = drows.mutable_data_ptr(),
      .dweights = dweights.mutable_data_ptr(),
      .num_rows = num_rows,
      .tokens = tokens,
      .top_k = top_k,
      .hidden = hidden,
      .dtype = dtype_of(rows),
  };
  run(rows, [&](auto stream) { cuda::combine_backward(args, stream); }, [&] {
    parallel(tokens, grain_of(2 * top_k * hidden * size_of(args.dtype)),
             [&](int64_t begin, int64_t end) { cpu::combine_backward(args, begin, end); });
    parallel(num_rows, 4096,
             [&](int64_t begin, int64_t end) { cpu::combine_clear(args, begin, end); });
  });
  return {drows, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_combine(Tensor rows, Tensor row_of, Tensor? weights, Tensor? token_of=None) -> Tensor");
  m.def(
      "_combine_backward(Tensor dout, Tensor rows, Tensor row_of, Tensor token_of, Tensor weights)"
      " -> (Tensor, Tensor)");
}

MOEKERNELS_IMPL(m) {
  m.impl("_combine", TORCH_BOX(&combine));
  m.impl("_combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace moekernels::binding
