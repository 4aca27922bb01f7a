#include "group_problems.h"

#include "common/launch.cuh"
#include "moekernels/gemm_tiles.h"

namespace moekernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksAGroup = 32;  // the rows of no expert may be most of the output

// kBlocksAGroup blocks for each expert, and for the rows of none. An expert without rows gets a
// problem without tiles (m = 0) in either case: CUTLASS cannot make a tensor map of no depth.
__global__ void group_problems(const GroupProblems args, const GroupArrays arrays) {
  const int64_t group = blockIdx.x / kBlocksAGroup, part = blockIdx.x % kBlocksAGroup;
  const RowRange rows = rows_of_group(args.offsets, group, args.experts, args.num_rows);
  const int32_t count = static_cast<int32_t>(rows.end - rows.begin);
  if (group < args.experts && part == 0 && threadIdx.x == 0) {
    arrays.sizes[group] = {args.m < 0 || count == 0 ? count : args.m, args.n,
                           args.k < 0 ? count : args.k};
    const auto write = [&](const GroupOperands& to, const GroupOperand& operand) {
      to.address[group] =
          operand.data + rows.begin * operand.row_bytes + group * operand.expert_bytes;
      to.stride[group] = operand.stride;
    };
    write(arrays.a, args.a);
    write(arrays.b, args.b);
    write(arrays.d, args.d);
  }
  const int64_t bytes = group == args.experts           ? count * args.d.row_bytes
                        : args.zero_empty && count == 0 ? args.d.expert_bytes
                                                        : 0;
  char* to = args.d.data + rows.begin * args.d.row_bytes + group * args.d.expert_bytes;
  constexpr int64_t kVector =
      sizeof(int4);  // every row and address is of whole ones: TMA asks for that as well
  for (int64_t at = (part * kThreads + threadIdx.x) * kVector; at < bytes;
       at += kBlocksAGroup * kThreads * kVector) {
    *reinterpret_cast<int4*>(to + at) = int4{0, 0, 0, 0};
  }
}

}  // namespace

void write_group_problems(const GroupProblems& problems, const GroupArrays& arrays, Stream stream) {
  launch("group_problems", group_problems, (problems.experts + 1) * kBlocksAGroup, kThreads, 0,
         stream, problems, arrays);
}

}  // namespace moekernels::cuda
