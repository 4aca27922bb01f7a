// Chooses the ISA level once, when the library is loaded.
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

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

Bf16Unit detect_bf16_unit() {
  Bf16Unit best = Bf16Unit::none;
#if defined(__x86_64__)
  if (isa() != Isa::avx512) return best;
  if (__builtin_cpu_supports("avx512bf16")) best = Bf16Unit::dot;
#if defined(MOEKERNELS_AMX_IN_C)
  if (best == Bf16Unit::dot) best = Bf16Unit::tiles;
#else
  // The kernel grants a process its tile registers on request; a sandbox may refuse.
  constexpr long kRequestState = 0x1023, kTileData = 18;
  if (__builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, kRequestState, kTileData) == 0) {
    best = Bf16Unit::tiles;
  }
#endif
#endif
  if (const char* wanted = std::getenv("MOEKERNELS_ISA")) {
    Bf16Unit limit = !std::strcmp(wanted, "avx512")        ? Bf16Unit::none
                     : !std::strcmp(wanted, "avx512_bf16") ? Bf16Unit::dot
                                                           : Bf16Unit::tiles;
    if (limit < best) best = limit;
  }
  return best;
}

}  // namespace

Bf16Unit bf16_unit() {
  static const Bf16Unit chosen = detect_bf16_unit();
  return chosen;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* unknown_isa() {
  const char* wanted = std::getenv("MOEKERNELS_ISA");
  if (wanted == nullptr) return nullptr;
  const std::string_view name = wanted;
  for (std::string_view rest = kIsaNames; !rest.empty();) {
    const size_t length = std::min(rest.find('|'), rest.size());
    if (rest.substr(0, length) == name) return nullptr;
    rest.remove_prefix(std::min(length + 1, rest.size()));
  }
  return wanted;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      switch (bf16_unit()) {
        case Bf16Unit::tiles: return "amx";
        case Bf16Unit::dot: return "avx512_bf16";
        default: return "avx512";
      }
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace moekernels::cpu
