#include "gemm.h"

#include <sys/mman.h>

namespace moekernels::binding {

void check_offsets(const char* op, const Tensor& offsets, int64_t experts, int64_t rows, const Tensor& like) {
  check_tensor(op, "offsets", offsets, kInt64, {{"E+1", experts + 1}}, &like);
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  check(at[0] == 0 && at[experts] <= rows, op, ": offsets must ascend from 0 to at most R=", rows, ", got ", at[0],
        " ... ", at[experts]);
  for (int64_t e = 0; e < experts; ++e) {
    check(at[e] <= at[e + 1], op, ": offsets must ascend, got offsets[", e, "] = ", at[e], " and offsets[", e + 1,
          "] = ", at[e + 1]);
  }
}

Tensor empty_large(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  Tensor out = empty(shape, dtype, like);
  constexpr uintptr_t kHugePage = 2 << 20;
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes >= static_cast<int64_t>(2 * kHugePage)) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    // Advice only: where it is refused the memory is as good as before.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
  return out;
}

}  // namespace moekernels::binding
