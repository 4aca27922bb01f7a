// What CUTLASS wants to know of each group - its sizes, addresses and strides - written on the
// device from `offsets`, and the part of the output that no group writes set to zero.
#pragma once

#include "moekernels/common.h"

namespace moekernels::cuda {

// An operand of group e whose rows begin at `begin` lies at data + begin * row_bytes + e *
// expert_bytes.
struct GroupOperand {
  char* data;
  int64_t row_bytes, expert_bytes;
  int64_t stride;  // elements from one line to the next
};

// D [m, n] = A [m, k] B [k, n] for every expert. Either m or k is how many rows the expert has.
struct GroupProblems {
  const int64_t* offsets;
  int64_t experts, num_rows;
  int32_t m, n, k;  // the one that differs between experts is -1
  GroupOperand a, b, d;
  // wgrad that sets: experts without rows have a gradient of zero. Row products zero the rows of no
  // expert.
  bool zero_empty;
};

// cute::Shape<int, int, int>
struct GroupSizes {
  int32_t m, n, k;
};

struct GroupOperands {
  void** address;
  int64_t* stride;
};

// The arrays [E] that group_problems writes.
struct GroupArrays {
  GroupSizes* sizes;
  GroupOperands a, b, d;
};

// The arrays within a scratch of group_arrays_bytes, a multiple of 256.
inline GroupArrays group_arrays(void* scratch, int64_t experts) {
  int64_t* words = static_cast<int64_t*>(scratch);
  const auto operands = [&](int64_t i) {
    return GroupOperands{reinterpret_cast<void**>(words + 2 * i * experts),
                         words + (2 * i + 1) * experts};
  };
  return {reinterpret_cast<GroupSizes*>(words + 6 * experts), operands(0), operands(1),
          operands(2)};
}

inline int64_t group_arrays_bytes(int64_t experts) {
  const int64_t bytes = experts * static_cast<int64_t>(6 * sizeof(int64_t) + sizeof(GroupSizes));
  return (bytes + 255) / 256 * 256;
}

void write_group_problems(const GroupProblems& problems, const GroupArrays& arrays, Stream stream);

}  // namespace moekernels::cuda
