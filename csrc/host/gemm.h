// The choice of a CUDA GEMM's kernel and tile, and the walk over tiles, for Python: tests and
// `moekernels info`.
#pragma once

#include <pybind11/pybind11.h>

namespace moekernels::host {
void bind_gemm(pybind11::module_& m);
}
