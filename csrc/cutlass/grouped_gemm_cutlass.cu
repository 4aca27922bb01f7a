// grouped_gemm and its dgrad, which is the same product with the weights turned.
#include "moekernels/grouped_gemm_cutlass.h"

#include "product_cutlass.cuh"

namespace moekernels::cuda {
namespace {

// Calls f(null pointer of the product's type).
template <class F>
auto with_product(const GroupedGemmArgs& args, const F& f) {
  return with_cutlass_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return args.transposed ? f(static_cast<CutlassProduct<T, T, Rows, Rows, false>*>(nullptr))
                           : f(static_cast<CutlassProduct<T, T, Rows, Columns, false>*>(nullptr));
  });
}

}  // namespace

const char* why_not_cutlass(const GroupedGemmArgs& args) {
  const int64_t bytes = size_of(args.dtype);
  return why_not(
      GemmOp::forward, args.dtype, args.num_rows, args.out_width, args.in, args.experts,
      gemm_alignment(reinterpret_cast<int64_t>(args.rows), reinterpret_cast<int64_t>(args.w),
                     reinterpret_cast<int64_t>(args.out), args.in * bytes, args.out_width * bytes));
}

int64_t cutlass_scratch_bytes(const GroupedGemmArgs& args) {
  return with_product(args, [&](auto* product) { return product->scratch_bytes(args.experts); });
}

void grouped_gemm_cutlass(const GroupedGemmArgs& args, void* scratch, Stream stream) {
  const int64_t bytes = size_of(args.dtype);
  const GroupProblems problems{
      .offsets = args.offsets,
      .experts = args.experts,
      .num_rows = args.num_rows,
      .m = -1,
      .n = static_cast<int32_t>(args.out_width),
      .k = static_cast<int32_t>(args.in),
      .a = {static_cast<char*>(const_cast<void*>(args.rows)), args.in * bytes, 0, args.in},
      .b = {static_cast<char*>(const_cast<void*>(args.w)), 0, args.in * args.out_width * bytes,
            args.transposed ? args.out_width : args.in},
      .d = {static_cast<char*>(args.out), args.out_width * bytes, 0, args.out_width},
      .zero_empty = false,
  };
  with_product(args, [&](auto* product) {
    product->run("grouped_gemm_cutlass", problems, scratch, stream);
  });
}

}  // namespace moekernels::cuda
