// What a launch of the sm_90a products takes from the state of this library (csrc/cuda/state_sm90.cu).
#pragma once

#include "moekernels/sm90.h"
#include "probe_sm90.cuh"

namespace moekernels::cuda::sm90 {

Settings settings();
// Of the next launch; all zero unless something is watched or traced.
Probe next_probe();

}  // namespace moekernels::cuda::sm90
