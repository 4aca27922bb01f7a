// Facts about the build that need no tensor: what `moekernels info` prints.
#include "moekernels/common.h"
#include "tensor.h"

namespace moekernels::binding {
namespace {

std::string cpu_isa() { return cpu::isa_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moekernels, m) { m.def("_cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(moekernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace moekernels::binding
