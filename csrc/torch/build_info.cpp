// Facts about the build that need no tensor: what `moekernels info` prints.
#include "moekernels/common.h"
#include "tensor.h"

namespace moekernels::binding {
namespace {

std::string cpu_isa() { return cpu::isa_name(); }

// "sm_80, sm_90a", or "" without CUDA kernels.
std::string cuda_archs() { return MOEKERNELS_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moekernels, m) {
  m.def("_cpu_isa() -> str");
  m.def("_cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(moekernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cuda_archs", TORCH_BOX(&cuda_archs));
}

}  // namespace moekernels::binding
