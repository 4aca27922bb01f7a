// What a launch of the sm_90a products takes from the state of this library
// (csrc/cuda/state_sm90.cu).
#pragma once

#include "moekernels/sm90.h"
#include "probe.cuh"

namespace moekernels::cuda::sm90 {

Settings settings();
// Notes a launch by its name, a literal; what it is to tell of itself, all zero unless something is
// watched or traced.
Probe note_launch(const char* name);

}  // namespace moekernels::cuda::sm90
