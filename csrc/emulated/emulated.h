// The emulated build (tests only): the launchers run as they are, over a CUDA runtime that hands
// every launch to Python, which executes the kernel's PTX on the CPU
// (python_tests/support/emulated.py).
#pragma once

#include <cstdint>

extern "C" {
// Returns 0, or 1 where the kernel failed; Python then holds the exception. params[i] points to the
// i-th argument; `cluster`: blocks of one; `chained`: 1 where the launch may begin before the one
// ahead of it has ended.
using moekernels_launch_fn = int (*)(const char* kernel, uint32_t blocks, uint32_t threads,
                                     uint64_t shared_bytes, void** params, uint32_t cluster,
                                     uint32_t chained);
// Told of every array that an op allocates, and of the host's memory that outlives an op (`lasts`)
// and kernels see.
using moekernels_array_fn = void (*)(const void* data, int64_t bytes, int lasts);

__attribute__((visibility("default"))) void moekernels_emulate(moekernels_launch_fn launch,
                                                               moekernels_array_fn array);
// Whether arrays stay that ops allocate from now on, for launches that are recorded; 0 frees them.
__attribute__((visibility("default"))) void moekernels_emulate_keep(int keep);
// 80, 90, ...: what the emulated device says it is.
__attribute__((visibility("default"))) void moekernels_emulate_capability(int value);
}

namespace moekernels::emulated {
void note_array(const void* data, int64_t bytes);
}
