// grouped_gemm by CUTLASS's Hopper grouped GEMM: a second backend and a baseline, built with
// MOEKERNELS_CUTLASS=1 alone.
#pragma once

#include "moekernels/grouped_gemm.h"

namespace moekernels::cuda {

// Why CUTLASS cannot take a product on the current device; null: it can.
const char* why_not_cutlass(const GroupedGemmArgs& args);
const char* why_not_cutlass(const GroupedWgradArgs& args);

// What a product needs beside its arguments, in bytes: from its shape and the device alone.
int64_t cutlass_scratch_bytes(const GroupedGemmArgs& args);
int64_t cutlass_scratch_bytes(const GroupedWgradArgs& args);

// Products that why_not_cutlass has nothing against. `scratch` is aligned to 256 bytes.
void grouped_gemm_cutlass(const GroupedGemmArgs& args, void* scratch, Stream stream);
// Without token_of.
void grouped_wgrad_cutlass(const GroupedWgradArgs& args, void* scratch, Stream stream);

}  // namespace moekernels::cuda
