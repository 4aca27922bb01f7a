// Facts about the build that need no tensor: what `moekernels info` prints.
#include "cutlass.h"
#include "device.h"
#include "moekernels/common.h"

namespace moekernels::binding {
namespace {

std::string cpu_isa() { return cpu::isa_name(); }

// Throws where a variable that the kernels read holds a word that they do not know. Called once,
// after loading: the ISA level is chosen while the library loads, when nothing may be thrown.
void check_environment() {
  const char* isa = cpu::unknown_isa();
  check(isa == nullptr, "MOEKERNELS_ISA must be ", cpu::kIsaNames, ", got '",
        isa == nullptr ? "" : isa, "'");
  cutlass_wanted();
  processes_here();
}

// "sm_80, sm_90a", or "" without CUDA kernels.
std::string cuda_archs() { return MOEKERNELS_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_cpu_isa() -> str");
  m.def("_cuda_archs() -> str");
  m.def("_check_environment() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("_check_environment", TORCH_BOX(&check_environment));
}

}  // namespace moekernels::binding
