// From arguments to the kernel that the choice table names.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "moekernels/gemm_choice.h"
#include "sm90/entry.cuh"

namespace moekernels::cuda {

// 80, 90, ...: of the current device.
inline int capability() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

// The one place where a product's kernel is decided, for this device and this build.
inline GemmChoice choose(GemmProblem problem) {
  problem.capability = capability();
  problem.wgmma = sm90::kBuilt;
  return choose_gemm(problem);
}

// Calls f(null pointer of the dtype's type, tile as a constant). fp32 has the small tile alone.
template <class F>
void with_tile(DType dtype, const GemmChoice& choice, const F& f) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (choice.tile_m == 128) return f(type, std::integral_constant<int, 128>{});
    }
    f(type, std::integral_constant<int, 64>{});
  });
}

// Launches a kernel that may want more shared memory than every device gives unasked.
template <class... Args>
void launch_gemm(const char* name, void (*kernel)(Args...), int64_t blocks, int threads,
                 int64_t shared, Stream stream, const Args&... args) {
  constexpr int64_t kUnasked = 48 << 10;
  if (shared > kUnasked) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name);
  }
  launch(name, kernel, blocks, threads, shared, stream, args...);
}

// A product of rows with the weights of their expert, out = weight (rows w + bias): grouped_gemm,
// its dgrad, and the down-projection, by mma.sync or in fp32. sm90::RowProduct is wgmma's.
struct MmaProduct {
  const void* rows;  // [R, depth]
  const void* w;     // [E, width, depth], or [E, depth, width] where it lies along N
  const int64_t* offsets;
  int64_t num_rows, depth, width, experts;
  bool along_n;
  DType dtype;
  bool tf32;
  void* out;                          // [R, width]
  const void* bias = nullptr;         // [E, width] or null
  const float* weights = nullptr;     // [R] or null
  const int32_t* token_of = nullptr;  // [R] or null: rows without a token give zero
  int64_t tokens = 0;
};
void row_product(const char* name, const MmaProduct& args, const GemmChoice& choice, Stream stream);

}  // namespace moekernels::cuda
