// grouped_gemm's wgrad: the rows of an expert are the depth of its product.
#include "moekernels/grouped_gemm_cutlass.h"

#include "product_cutlass.cuh"

namespace moekernels::cuda {
namespace {

// Calls f(null pointer of the product's type). A [M, rows] lies in columns: its rows are those of
// the array [R, M].
template <class F>
auto with_product(const GroupedWgradArgs& args, const F& f) {
  return with_cutlass_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return args.accumulate ? f(static_cast<CutlassProduct<T, float, Columns, Rows, true>*>(nullptr))
                           : f(static_cast<CutlassProduct<T, T, Columns, Rows, false>*>(nullptr));
  });
}

}  // namespace

const char* why_not_cutlass(const GroupedWgradArgs& args) {
  const int64_t bytes = size_of(args.dtype);
  return why_not(
      GemmOp::wgrad, args.dtype, args.m, args.n, args.num_rows, args.experts,
      gemm_alignment(reinterpret_cast<int64_t>(args.a), reinterpret_cast<int64_t>(args.b),
                     reinterpret_cast<int64_t>(args.dw), args.m * bytes, args.n * bytes));
}

int64_t cutlass_scratch_bytes(const GroupedWgradArgs& args) {
  return with_product(args, [&](auto* product) { return product->scratch_bytes(args.experts); });
}

void grouped_wgrad_cutlass(const GroupedWgradArgs& args, void* scratch, Stream stream) {
  const int64_t bytes = size_of(args.dtype), out_bytes = args.accumulate ? 4 : bytes;
  const GroupProblems problems{
      .offsets = args.offsets,
      .experts = args.experts,
      .num_rows = args.num_rows,
      .m = static_cast<int32_t>(args.m),
      .n = static_cast<int32_t>(args.n),
      .k = -1,
      .a = {static_cast<char*>(const_cast<void*>(args.a)), args.m * bytes, 0, args.m},
      .b = {static_cast<char*>(const_cast<void*>(args.b)), args.n * bytes, 0, args.n},
      .d = {static_cast<char*>(args.dw), 0, args.m * args.n * out_bytes, args.n},
      .zero_empty = !args.accumulate,
  };
  with_product(args, [&](auto* product) {
    product->run("grouped_wgrad_cutlass", problems, scratch, stream);
  });
}

}  // namespace moekernels::cuda
