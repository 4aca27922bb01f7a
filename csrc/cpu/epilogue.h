// What happens to a block of C on its way to memory.
#pragma once

#include <cstring>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

// out [rows, columns] = C, rounded to dtype, past the caches where it will not be read again soon.
inline void write_block(DType dtype, const void* c, int64_t rows, int64_t columns, void* out,
                        int64_t ld, bool past_caches) {
  with_storage(dtype, [&]<class T>(T) {
    using S = Wide<T>;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = static_cast<const S*>(c) + r * columns;
      T* to = static_cast<T*>(out) + r * ld;
      const bool aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
      for_vectors<S>(columns, [&](int64_t j, auto n) {
        if (past_caches && aligned && n == kLanes<S>) {
          stream(to + j, load(from + j));
        } else {
          store(to + j, load(from + j, n), n);
        }
      });
    }
  });
}

// Rows [used, rows) belong to no expert: zero them, each worker its share.
inline void zero_tail(void* out, int64_t row_bytes, int64_t used, int64_t rows, int64_t worker,
                      int64_t workers) {
  const int64_t begin = used + (rows - used) * worker / workers;
  const int64_t end = used + (rows - used) * (worker + 1) / workers;
  if (begin < end)
    std::memset(static_cast<char*>(out) + begin * row_bytes, 0, (end - begin) * row_bytes);
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
