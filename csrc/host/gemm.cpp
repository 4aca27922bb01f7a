#include "gemm.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "moekernels/gemm_choice.h"
#include "moekernels/gemm_tiles.h"

namespace py = pybind11;

namespace moekernels::host {
namespace {

constexpr const char* kOps[] = {"forward", "up", "down", "dgrad", "dact", "wgrad"};
constexpr const char* kKernels[] = {"mma", "fma", "wgmma"};
constexpr const char* kDTypes[] = {"fp32", "bf16", "fp16"};

template <size_t n>
int index_of(const char* const (&names)[n], const std::string& name) {
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  throw std::invalid_argument("choose_gemm does not know " + name);
}

py::dict choice(const std::string& op, const std::string& dtype, int64_t m, int64_t n, int64_t k,
                int64_t experts, int64_t alignment, int capability, bool wgmma, bool tf32) {
  const GemmChoice chosen = choose_gemm({.op = static_cast<GemmOp>(index_of(kOps, op)),
                                         .dtype = static_cast<DType>(index_of(kDTypes, dtype)),
                                         .m = m,
                                         .n = n,
                                         .k = k,
                                         .experts = experts,
                                         .alignment = alignment,
                                         .tf32 = tf32,
                                         .capability = capability,
                                         .wgmma = wgmma});
  py::dict out;
  out["kernel"] = kKernels[static_cast<int>(chosen.kernel)];
  out["tile"] = py::make_tuple(chosen.tile_m, chosen.tile_n, chosen.tile_k);
  out["stages"] = chosen.stages;
  out["order"] = py::dict(
      py::arg("band") = chosen.order.band, py::arg("grid") = chosen.order.grid,
      py::arg("promotion") = chosen.order.promotion, py::arg("prefetch") = chosen.order.prefetch,
      py::arg("bulk_sums") = chosen.order.bulk_sums,
      py::arg("style") = kGemmStyles[static_cast<int>(chosen.order.style)],
      py::arg("pair") = kGemmPairs[static_cast<int>(chosen.order.pair)],
      py::arg("gather") = chosen.order.gather, py::arg("join") = chosen.order.join);
  out["reason"] = chosen.reason;
  out["obstacle"] = chosen.obstacle != nullptr ? py::object(py::str(chosen.obstacle)) : py::none();
  return out;
}

// (group, begin, end), group -1 where there is no such tile.
py::tuple tile_of(const std::vector<int64_t>& offsets, int64_t rows, int64_t tile, int64_t index) {
  const RowTile found =
      row_tile(offsets.data(), static_cast<int64_t>(offsets.size()) - 1, rows, tile, index);
  return py::make_tuple(found.group, found.begin, found.end);
}

// For each column of a gated tile: (column of the weights, how many of the next `most` exist).
std::vector<std::pair<int64_t, int64_t>> gated_tile(int64_t tile, int64_t index, int64_t ffn,
                                                    bool interleaved, int64_t most) {
  const TileColumns columns = gated_columns(tile, index, ffn, interleaved);
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t j = 0; j < tile; ++j) out.emplace_back(columns.at(j), columns.valid(j, most));
  return out;
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.attr("launch_order") = py::dict(py::arg("chain") = kLaunchOrder.chain,
                                    py::arg("route_at_once") = kLaunchOrder.route_at_once);
  m.def("choose_gemm", &choice, py::arg("op"), py::arg("dtype"), py::kw_only(), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("experts"), py::arg("alignment") = 16,
        py::arg("capability"), py::arg("wgmma"), py::arg("tf32") = false,
        "Which CUDA kernel, tile and stages a grouped product takes, and why.");
  m.def("row_tiles_bound", &row_tiles_bound, py::arg("rows"), py::arg("experts"), py::arg("tile"));
  m.def("row_tile", &tile_of, py::arg("offsets"), py::arg("rows"), py::arg("tile"),
        py::arg("index"));
  m.def("gated_tile", &gated_tile, py::arg("tile"), py::arg("index"), py::arg("ffn"),
        py::arg("interleaved"), py::arg("most"));
}

}  // namespace moekernels::host
