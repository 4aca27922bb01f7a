// Where an op runs: the CPU kernel, or the CUDA launcher on torch's current stream with the
// tensor's device current.
#pragma once

#include "tensor.h"

// The library that the ops are registered in, and the dispatch keys. The emulated build (see
// CMakeLists.txt) registers the CUDA path of every op for CPU tensors, in a library of its own, so
// that tests can run the launchers without a GPU.
#ifdef MOEKERNELS_EMULATED
#define MOEKERNELS_OPS moekernels_emulated
#elif !defined(MOEKERNELS_OPS)  // a hub folder has a name of its own (tools/hub.py)
#define MOEKERNELS_OPS moekernels
#endif

#if defined(MOEKERNELS_WITH_CUDA) && !defined(MOEKERNELS_EMULATED)
#define MOEKERNELS_CUDA_IMPL(impl) \
  STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CUDA, library) { impl(library); }
#else
#define MOEKERNELS_CUDA_IMPL(impl)
#endif

// MOEKERNELS_IMPL(m) { m.impl("_op", TORCH_BOX(&op)); } registers ops for every backend of this
// build.
#define MOEKERNELS_IMPL(m)                                                           \
  static void register_ops(torch::stable::detail::StableLibrary& m);                 \
  STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CPU, library) { register_ops(library); } \
  MOEKERNELS_CUDA_IMPL(register_ops)                                                 \
  static void register_ops(torch::stable::detail::StableLibrary& m)

namespace moekernels::binding {

#ifdef MOEKERNELS_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

// The device of `like` is current while f(stream) runs; without a build for CUDA nothing calls it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& like);
  ~CudaScope();
  Stream stream() const { return stream_; }

 private:
  void* guard_ = nullptr;
  Stream stream_ = nullptr;
};

// Calls cuda(stream) for tensors on a CUDA device and cpu() for all others. `cuda` must be a
// generic lambda: a build without CUDA has no launchers, and never instantiates it.
template <class Cuda, class Cpu>
void run(const Tensor& like, const Cuda& cuda, const Cpu& cpu) {
  if constexpr (kWithCuda) {
    if (on_cuda(like)) {
      const CudaScope scope(like);
      cuda(scope.stream());
      return;
    }
  }
  cpu();
}

}  // namespace moekernels::binding
