// Compiled once for each ISA level: CMake sets MOEKERNELS_ISA to the level's namespace.
#include "moekernels/permute.h"

#include <cstring>

namespace moekernels::cpu::MOEKERNELS_ISA {

void permute(const PermuteArgs& args, int64_t row_begin, int64_t row_end) {
  const char* x = static_cast<const char*>(args.x);
  char* rows = static_cast<char*>(args.rows);
  for (int64_t r = row_begin; r < row_end; ++r) {
    int64_t t = args.token_of[r];
    char* row = rows + r * args.row_bytes;
    if (t >= 0 && t < args.tokens) {
      std::memcpy(row, x + t * args.row_bytes, args.row_bytes);
    } else {
      std::memset(row, 0, args.row_bytes);
    }
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
