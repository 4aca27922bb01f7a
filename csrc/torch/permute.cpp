// Tokens to rows in the experts' order: checks, memory, launch.
#include "moekernels/permute.h"

#include "device.h"

namespace moekernels::binding {
namespace {

// row_of is the backward's; it is checked here, where the caller can still be told.
Tensor permute(const Tensor& x, const Tensor& token_of, const OptionalTensor& row_of) {
  check_tensor("permute", "x", x, kFloats, {{"T"}, {"H"}});
  check_tensor("permute", "token_of", token_of, kInt32, {{"R"}}, &x);
  check_optional("permute", "row_of", row_of, kInt32, {{"T", x.size(0)}, {"K"}}, x);
  const int64_t rows = token_of.size(0);
  Tensor out = empty_large({rows, x.size(1)}, x.scalar_type(), x);
  const PermuteArgs args{
      .x = x.const_data_ptr(),
      .token_of = token_of.const_data_ptr<int32_t>(),
      .rows = out.mutable_data_ptr(),
      .tokens = x.size(0),
      .num_rows = rows,
      .row_bytes = x.size(1) * size_of(dtype_of(x)),
  };
  run(x, [&](auto stream) { cuda::permute(args, stream); }, [&] {
    parallel(rows, grain_of(args.row_bytes),
             [&](int64_t begin, int64_t end) { cpu::permute(args, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_permute(Tensor x, Tensor token_of, Tensor? row_of=None) -> Tensor");
}

MOEKERNELS_IMPL(m) { m.impl("_permute", TORCH_BOX(&permute)); }

}  // namespace moekernels::binding
