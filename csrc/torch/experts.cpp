// The FFN of all experts, forward and backward: checks, memory, and which kernels run.
#include "moekernels/experts.h"

#include "ffn.h"

namespace moekernels::binding {
namespace {

// Returns y [R, H] and h [R, G], which is empty unless `keep_h`. row_of is the backward's, and only
// checked here.
std::tuple<Tensor, Tensor> experts(const Ffn& ffn, bool keep_h, OptionalTensor row_of) {
  const ExpertsArgs of = checked(ffn);
  const Tensor& x = ffn.x;
  check_optional("experts", "row_of", row_of, kInt32, {{"T", x.size(0)}, {"K"}}, x);
  const ScalarType dtype = x.scalar_type();
  Tensor h = empty_large({keep_h ? of.num_rows : 0, h_width(of)}, dtype, x);
  Tensor a = empty_large({of.num_rows, of.ffn}, dtype, x);
  Tensor y = empty_large({of.num_rows, of.hidden}, dtype, x);
  const ExpertsUpArgs up{
      .of = of, .h = keep_h ? h.mutable_data_ptr() : nullptr, .a = a.mutable_data_ptr()};
  const ExpertsDownArgs down{.of = of, .a = a.const_data_ptr(), .y = y.mutable_data_ptr()};
  run(x, [&](auto stream) {
    up_on_cuda(ffn, up, stream);
    cuda::experts_down(down, stream);
  }, [&] {
    run_up(up);
    with_workers(of.num_rows * of.hidden * of.ffn, [&](int64_t worker, int64_t workers) {
      cpu::experts_down(down, worker, workers);
    });
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> experts_dact(const Ffn& ffn, const Tensor& dy, const Tensor& h,
                                                bool want_weighted_a, bool want_dweights,
                                                OptionalTensor da) {
  return dact_of(ffn, dy, h, want_weighted_a, want_dweights,
                 [](auto& args, auto stream) { cuda::experts_dact(args, stream); }, da);
}

// a [R, F] = act(h [R, G]); of the FFN's numbers those of the activation.
Tensor experts_act(const Tensor& h, const std::string& activation, double alpha, double limit,
                   bool interleaved) {
  const char* op = "experts";
  const auto kind = named<Activation>(op, "activation", kActivations, activation);
  check_tensor(op, "h", h, kFloats, {{"R"}, {is_gated(kind) ? "2F" : "F"}});
  const int64_t gates = is_gated(kind) ? 2 : 1, width = h.size(1) / gates;
  ExpertsArgs of{};
  of.dtype = dtype_of(h);
  of.activation = kind;
  of.alpha = alpha;
  of.limit = limit;
  of.interleaved = interleaved;
  of.num_rows = h.size(0);
  of.ffn = width;
  Tensor a = empty_large({of.num_rows, width}, h.scalar_type(), h);
  const ExpertsActArgs args{.of = of, .h = h.const_data_ptr(), .a = a.mutable_data_ptr()};
  run(h, [&](auto stream) { cuda::experts_act(args, stream); }, [&] {
    parallel(of.num_rows, grain_of((gates + 1) * width * size_of(of.dtype)),
             [&](int64_t begin, int64_t end) { cpu::experts_act(args, begin, end); });
  });
  return a;
}

void run_dbias(const Tensor& rows, const OptionalTensor& weights, const Tensor& offsets,
               const OptionalTensor& token_of, int64_t tokens, const Tensor& out, bool accumulate) {
  const ExpertsDBiasArgs args{.dtype = dtype_of(rows),
                              .token_of = static_cast<const int32_t*>(pointer_of(token_of)),
                              .weights = pointer_of(weights),
                              .offsets = offsets.const_data_ptr<int64_t>(),
                              .num_rows = rows.size(0),
                              .tokens = tokens,
                              .experts = offsets.size(0) - 1,
                              .rows = rows.const_data_ptr(),
                              .width = rows.size(1),
                              .out = out.mutable_data_ptr(),
                              .accumulate = accumulate};
  run(rows, [&](auto stream) { cuda::experts_dbias(args, stream); }, [&] {
    with_workers(rows.numel(), [&](int64_t worker, int64_t workers) {
      cpu::experts_dbias(args, worker, workers);
    });
  });
}

void check_dbias(const Tensor& rows, const OptionalTensor& weights, const Tensor& offsets,
                 const OptionalTensor& token_of) {
  const char* op = "experts_dbias";
  check_tensor(op, "rows", rows, kFloats, {{"R"}, {"N"}});
  check_offsets(op, offsets, experts_of(op, offsets), rows.size(0), rows);
  const Axis num_rows{"R", rows.size(0)};
  check_optional(op, "weights", weights, {wide(rows.scalar_type())}, {num_rows}, rows);
  check_optional(op, "token_of", token_of, kInt32, {num_rows}, rows);
}

Tensor experts_dbias(const Tensor& rows, OptionalTensor weights, const Tensor& offsets,
                     OptionalTensor token_of, int64_t tokens) {
  check_dbias(rows, weights, offsets, token_of);
  Tensor out = empty({offsets.size(0) - 1, rows.size(1)}, rows.scalar_type(), rows);
  run_dbias(rows, weights, offsets, token_of, tokens, out, false);
  return out;
}

void experts_dbias_(Tensor main_grad, const Tensor& rows, OptionalTensor weights,
                    const Tensor& offsets, OptionalTensor token_of, int64_t tokens) {
  check_dbias(rows, weights, offsets, token_of);
  check_tensor("experts_dbias", "main_grad", main_grad, {wide(rows.scalar_type())},
               {{"E", offsets.size(0) - 1}, {"N", rows.size(1)}}, &rows);
  run_dbias(rows, weights, offsets, token_of, tokens, main_grad, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  const std::string ffn = Ffn::schema();
  m.def(("_experts(" + ffn + "bool keep_h, Tensor? row_of=None) -> (Tensor, Tensor)").c_str());
  m.def(("_experts_dact(" + ffn +
         "Tensor dy, Tensor h, bool want_weighted_a, bool want_dweights, Tensor? da=None) "
         "-> (Tensor, Tensor, Tensor)")
            .c_str());
  m.def(
      "_experts_act(Tensor h, str activation, float alpha, float limit, bool interleaved) "
      "-> Tensor");
  m.def(
      "_experts_dbias(Tensor rows, Tensor? weights, Tensor offsets, Tensor? token_of, "
      "SymInt tokens) -> Tensor");
  m.def(
      "_experts_dbias_(Tensor(a!) main_grad, Tensor rows, Tensor? weights, Tensor offsets, "
      "Tensor? token_of, SymInt tokens) -> ()");
}

MOEKERNELS_IMPL(m) {
  m.impl("_experts", TORCH_BOX(Flat<&experts>::call));
  m.impl("_experts_dact", TORCH_BOX(Flat<&experts_dact>::call));
  m.impl("_experts_act", TORCH_BOX(&experts_act));
  m.impl("_experts_dbias", TORCH_BOX(&experts_dbias));
  m.impl("_experts_dbias_", TORCH_BOX(&experts_dbias_));
}

}  // namespace moekernels::binding
