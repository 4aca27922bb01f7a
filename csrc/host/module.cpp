// _host: the host-side algorithms that deserve C++, and the facts of the build. Nothing here
// touches a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <vector>

#include "gemm.h"
#include "moekernels/registers.h"
#include "partition.h"
#include "peers.h"
#include "placement.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side algorithms and build facts of moekernels.";
  py::dict build;
  build["compiler"] = MOEKERNELS_COMPILER;
  build["torch"] = MOEKERNELS_TORCH_VERSION;
  build["cuda_archs"] = MOEKERNELS_CUDA_ARCHS;
#ifdef MOEKERNELS_SM90
  build["wgmma"] = true;
#else
  build["wgmma"] = false;
#endif
#ifdef MOEKERNELS_CUTLASS
  build["cutlass"] = true;
#else
  build["cutlass"] = false;
#endif
  m.attr("build") = build;
  py::dict activations;
  for (const char* name : moekernels::kActivations) {
    const auto activation = static_cast<moekernels::Activation>(py::len(activations));
    activations[name] = moekernels::is_gated(activation);
  }
  m.attr("activations") = activations;  // name: whether it is gated
  m.attr("gate_scores") = py::cast(std::vector<std::string>(std::begin(moekernels::kGateScores),
                                                            std::end(moekernels::kGateScores)));
  m.attr("group_scores") = py::cast(std::vector<std::string>(std::begin(moekernels::kGroupScores),
                                                             std::end(moekernels::kGroupScores)));
  moekernels::host::bind_gemm(m);
  moekernels::host::bind_peers(m);

  m.def("karmarkar_karp", &moekernels::host::karmarkar_karp, py::arg("costs"), py::arg("parts"),
        py::call_guard<py::gil_scoped_release>(),
        "Largest differencing: the indices of costs in `parts` groups of nearly equal sums.");
  m.def("place_experts",
        [](std::vector<double> loads, std::vector<int> node_of, std::vector<double> parting,
           const std::vector<int>& start) {
    return moekernels::host::place_experts(
        {std::move(loads), std::move(node_of), std::move(parting)}, start);
  },
        py::arg("loads"), py::arg("node_of"), py::arg("parting"), py::arg("start"),
        py::call_guard<py::gil_scoped_release>(), "The rank of each expert; see placement.h.");
}
