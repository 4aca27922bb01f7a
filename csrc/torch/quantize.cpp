// Numbers as e4m3 with a scale for each block: checks, memory, launch.
#include "moekernels/quantize.h"

#include "device.h"

namespace moekernels::binding {
namespace {

// x [R, I], or with `tiles` [E, O, I]. Returns values and scales, `transposed` of x's last two axes
// turned.
std::tuple<Tensor, Tensor> quantize(const Tensor& x, bool tiles, bool transposed) {
  const char* op = "quantize";
  static constexpr std::initializer_list<ScalarType> kTaken = {
      ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  if (tiles) {
    check_tensor(op, "x", x, kTaken, {{"E"}, {"O"}, {"I"}});
  } else {
    check_tensor(op, "x", x, kTaken, {{"R"}, {"I"}});
    check(!transposed, op, ": transposed needs tiles, whose scales are of both axes");
  }
  const int64_t axis = tiles ? 1 : 0, matrices = tiles ? x.size(0) : 1;
  QuantizeArgs args{.dtype = dtype_of(x),
                    .x = x.const_data_ptr(),
                    .values = nullptr,
                    .scales = nullptr,
                    .matrices = matrices,
                    .rows = x.size(axis),
                    .columns = x.size(axis + 1),
                    .tiles = tiles,
                    .transposed = transposed};
  int64_t m = args.rows, n = args.columns, down = args.runs_of_matrix(), across = scale_blocks(n);
  if (transposed) std::swap(m, n), std::swap(down, across);
  const auto kind = ScalarType::Float8_e4m3fn;
  Tensor values = tiles ? empty_large({matrices, m, n}, kind, x) : empty_large({m, n}, kind, x);
  Tensor scales = tiles ? empty({matrices, down, across}, ScalarType::Float, x)
                        : empty({down, across}, ScalarType::Float, x);
  args.values = static_cast<uint8_t*>(values.mutable_data_ptr());
  args.scales = static_cast<float*>(scales.mutable_data_ptr());
  run(x, [&](auto stream) { cuda::quantize(args, stream); }, [&] {
    parallel(args.runs(), grain_of(args.run() * args.columns * (size_of(args.dtype) + 1)),
             [&](int64_t begin, int64_t end) { cpu::quantize(args, begin, end); });
  });
  return {values, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_quantize(Tensor x, bool tiles, bool transposed) -> (Tensor, Tensor)");
}

MOEKERNELS_IMPL(m) { m.impl("_quantize", TORCH_BOX(&quantize)); }

}  // namespace moekernels::binding
