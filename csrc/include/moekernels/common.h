// What every layer shares: dtypes, sizes, the stream. No torch, no CUDA headers here.
// Legend: T tokens, H hidden, F expert hidden, E experts, e local experts, K top-k, R routed rows,
// P peers, S segments.
#pragma once

#include <cstdint>

// Plain functions that device code calls as well.
#ifdef __CUDACC__
#define MOEKERNELS_BOTH __host__ __device__
#else
#define MOEKERNELS_BOTH
#endif

namespace moekernels {

enum class DType : int { f32, bf16, f16, f64 };

// A CUDA stream as an opaque pointer (cudaStream_t); unused on the CPU.
using Stream = void*;

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

namespace cpu {

enum class Isa : int { generic, avx2, avx512 };

// The best level that this machine and this build have;
// MOEKERNELS_ISA=generic|avx2|avx512|avx512_bf16|amx lowers it (for tests).
Isa isa();

// What the avx512 level has for bf16 products: nothing, dot products of pairs (avx512_bf16), or
// tiles (AMX).
enum class Bf16Unit : int { none, dot, tiles };
Bf16Unit bf16_unit();

const char* isa_name();

inline constexpr const char* kIsaNames = "generic|avx2|avx512|avx512_bf16|amx";
// What MOEKERNELS_ISA holds where that names no level, else null.
const char* unknown_isa();

template <class F>
F* select(F* generic, F* avx2, F* avx512) {
  switch (isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return generic;
  }
}

}  // namespace cpu
}  // namespace moekernels

// Declares a CPU kernel that is compiled once for each ISA level, and the pointer through which it
// is called: MOEKERNELS_CPU_KERNEL(permute, const PermuteArgs&, int64_t begin, int64_t end) gives
// moekernels::cpu::permute(args, begin, end).
#if defined(__x86_64__)
#define MOEKERNELS_CPU_KERNEL(name, ...)                                                       \
  namespace moekernels::cpu {                                                                  \
  namespace generic {                                                                          \
  void name(__VA_ARGS__);                                                                      \
  }                                                                                            \
  namespace avx2 {                                                                             \
  void name(__VA_ARGS__);                                                                      \
  }                                                                                            \
  namespace avx512 {                                                                           \
  void name(__VA_ARGS__);                                                                      \
  }                                                                                            \
  inline void (*const name)(__VA_ARGS__) = select(&generic::name, &avx2::name, &avx512::name); \
  }
#else
#define MOEKERNELS_CPU_KERNEL(name, ...)                   \
  namespace moekernels::cpu {                              \
  namespace generic {                                      \
  void name(__VA_ARGS__);                                  \
  }                                                        \
  inline void (*const name)(__VA_ARGS__) = &generic::name; \
  }
#endif
