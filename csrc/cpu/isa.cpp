// Chooses the ISA level once, when the library is loaded.
#include <cstdlib>
#include <cstring>

#include "moekernels/common.h"

namespace moekernels::cpu {
namespace {

Isa detect() {
  Isa best = Isa::generic;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    best = Isa::avx512;
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    best = Isa::avx2;
  }
#endif
  if (const char* wanted = std::getenv("MOEKERNELS_ISA")) {
    Isa limit = !std::strcmp(wanted, "generic") ? Isa::generic
                : !std::strcmp(wanted, "avx2")  ? Isa::avx2
                                                : Isa::avx512;
    if (limit < best) best = limit;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace moekernels::cpu
