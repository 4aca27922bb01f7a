// Checks that grouped_gemm and experts share.
#include "gemm.h"

namespace moekernels::binding {

int64_t experts_of(const char* op, const Tensor& offsets) {
  check(offsets.dim() == 1 && offsets.size(0) >= 1, op, ": offsets must be int64 [E+1], got ",
        name_of(offsets.scalar_type()), " ", shape_of(offsets));
  return offsets.size(0) - 1;
}

void check_offsets(const char* op, const Tensor& offsets, int64_t experts, int64_t rows,
                   const Tensor& like) {
  check_tensor(op, "offsets", offsets, kInt64, {{"E+1", experts + 1}}, &like);
  if (on_cuda(offsets)) return;  // the kernels hold them within the rows
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  check(at[0] == 0 && at[experts] <= rows, op, ": offsets must ascend from 0 to at most R=", rows,
        ", got ", at[0], " ... ", at[experts]);
  for (int64_t e = 0; e < experts; ++e) {
    check(at[e] <= at[e + 1], op, ": offsets must ascend, got offsets[", e, "] = ", at[e],
          " and offsets[", e + 1, "] = ", at[e + 1]);
  }
}

}  // namespace moekernels::binding
