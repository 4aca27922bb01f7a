#include "moekernels/experts.h"

#include <algorithm>
#include <cstring>

#include "gemm.h"

namespace moekernels::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

Activation activation_of(const std::string& name) {
  static constexpr const char* names[] = {"swiglu",         "geglu", "reglu", "swiglu_oai",
                                          "swiglu_clamped", "relu2", "silu",  "gelu"};
  std::string known;
  for (int i = 0; i < 8; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
    known += (i ? "|" : "") + std::string(names[i]);
  }
  check(false, "experts: activation must be ", known, ", got ", name);
  return {};
}

const void* pointer_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

struct Style {
  std::string activation;
  double alpha, limit;
  bool interleaved, transposed, tf32;
};

ExpertsArgs checked(const Tensor& x, const OptionalTensor& weights, const Tensor& w1,
                    const Tensor& w2, const Tensor& offsets, const OptionalTensor& token_of,
                    const OptionalTensor& b1, const OptionalTensor& b2, const Style& style) {
  const char* op = "experts";
  const Activation activation = activation_of(style.activation);
  const int64_t gates = is_gated(activation) ? 2 : 1;
  check_tensor(op, "x", x, kFloats, {{token_of ? "T" : "R"}, {"H"}});
  const ScalarType dtype = x.scalar_type();
  const int64_t hidden = x.size(1);
  if (token_of) check_tensor(op, "token_of", *token_of, kInt32, {{"R"}}, &x);
  const int64_t rows = token_of ? token_of->size(0) : x.size(0);
  const char* width = gates == 2 ? "2F" : "F";
  if (style.transposed) {
    check_tensor(op, "w2", w2, {dtype}, {{"E"}, {"F"}, {"H", hidden}}, &x);
  } else {
    check_tensor(op, "w2", w2, {dtype}, {{"E"}, {"H", hidden}, {"F"}}, &x);
  }
  const int64_t experts = w2.size(0), ffn = w2.size(style.transposed ? 1 : 2);
  if (style.transposed) {
    check_tensor(op, "w1", w1, {dtype}, {{"E", experts}, {"H", hidden}, {width, gates * ffn}}, &x);
  } else {
    check_tensor(op, "w1", w1, {dtype}, {{"E", experts}, {width, gates * ffn}, {"H", hidden}}, &x);
  }
  if (b1) check_tensor(op, "b1", *b1, {dtype}, {{"E", experts}, {width, gates * ffn}}, &x);
  if (b2) check_tensor(op, "b2", *b2, {dtype}, {{"E", experts}, {"H", hidden}}, &x);
  if (weights) check_tensor(op, "weights", *weights, {wide(dtype)}, {{"R", rows}}, &x);
  check_offsets(op, offsets, experts, rows, x);
  return {
      .dtype = dtype_of(x),
      .activation = activation,
      .alpha = style.alpha,
      .limit = style.limit,
      .interleaved = style.interleaved,
      .transposed = style.transposed,
      .x = x.const_data_ptr(),
      .token_of = static_cast<const int32_t*>(pointer_of(token_of)),
      .weights = pointer_of(weights),
      .w1 = w1.const_data_ptr(),
      .w2 = w2.const_data_ptr(),
      .b1 = pointer_of(b1),
      .b2 = pointer_of(b2),
      .offsets = offsets.const_data_ptr<int64_t>(),
      .num_rows = rows,
      .tokens = x.size(0),
      .hidden = hidden,
      .ffn = ffn,
      .experts = experts,
      .tf32 = style.tf32,
  };
}

int64_t h_width(const ExpertsArgs& args) { return (is_gated(args.activation) ? 2 : 1) * args.ffn; }

// On CUDA: f() while `of.x` has a row for each of token_of's.
template <class CudaStream, class F>
void with_rows(const Tensor& x, const OptionalTensor& token_of, ExpertsArgs& of, CudaStream stream,
               const F& f) {
  if (!token_of) return f();
  const Tensor rows = permuted(x, *token_of, stream);
  of.x = rows.const_data_ptr();
  f();
}

void run_up(const ExpertsUpArgs& args) {
  with_workers(args.of.num_rows * args.of.hidden * h_width(args.of),
               [&](int64_t worker, int64_t workers) { cpu::experts_up(args, worker, workers); });
}

std::tuple<Tensor, Tensor> experts(const Tensor& x, OptionalTensor weights, const Tensor& w1,
                                   const Tensor& w2, const Tensor& offsets, OptionalTensor token_of,
                                   OptionalTensor b1, OptionalTensor b2, std::string activation,
                                   double alpha, double limit, bool interleaved, bool transposed,
                                   bool keep_h, bool tf32, OptionalTensor row_of) {
  const ExpertsArgs of = checked(x, weights, w1, w2, offsets, token_of, b1, b2,
                                 {activation, alpha, limit, interleaved, transposed, tf32});
  check_optional("experts", "row_of", row_of, kInt32, {{"T", x.size(0)}, {"K"}},
                 x);  // the backward's
  const ScalarType dtype = x.scalar_type();
  Tensor h = empty_large({keep_h ? of.num_rows : 0, h_width(of)}, dtype, x);
  Tensor a = empty_large({of.num_rows, of.ffn}, dtype, x);
  Tensor y = empty_large({of.num_rows, of.hidden}, dtype, x);
  ExpertsUpArgs up{
      .of = of, .h = keep_h ? h.mutable_data_ptr() : nullptr, .a = a.mutable_data_ptr()};
  const ExpertsDownArgs down{.of = of, .a = a.const_data_ptr(), .y = y.mutable_data_ptr()};
  run(x, [&](auto stream) {
    with_rows(x, token_of, up.of, stream, [&] { cuda::experts_up(up, stream); });
    cuda::experts_down(down, stream);
  }, [&] {
    run_up(up);
    with_workers(of.num_rows * of.hidden * of.ffn, [&](int64_t worker, int64_t workers) {
      cpu::experts_down(down, worker, workers);
    });
  });
  return {y, h};
}

void run_dact(const ExpertsDActArgs& args) {
  const ExpertsArgs& of = args.of;
  with_workers(of.num_rows * of.hidden * of.ffn,
               [&](int64_t worker, int64_t workers) { cpu::experts_dact(args, worker, workers); });
  if (args.weighted_a == nullptr) return;
  const int64_t used = of.offsets[of.experts], row_bytes = of.ffn * size_of(of.dtype);
  std::memset(static_cast<char*>(args.weighted_a) + used * row_bytes, 0,
              (of.num_rows - used) * row_bytes);
}

// h from the forward, or an empty one: then it is computed again. Returns dh [R, G], the weighted
// activation [R, F] (empty unless `want_a`) and dweights [R] (empty unless there are weights and
// `want_dweights`).
std::tuple<Tensor, Tensor, Tensor> experts_dact(
    const Tensor& dy, const Tensor& h, const Tensor& x, OptionalTensor weights, const Tensor& w1,
    const Tensor& w2, const Tensor& offsets, OptionalTensor token_of, OptionalTensor b1,
    OptionalTensor b2, std::string activation, double alpha, double limit, bool interleaved,
    bool transposed, bool want_a, bool want_dweights, bool tf32) {
  const ExpertsArgs of = checked(x, weights, w1, w2, offsets, token_of, b1, b2,
                                 {activation, alpha, limit, interleaved, transposed, tf32});
  const ScalarType dtype = x.scalar_type();
  const int64_t width = h_width(of);
  check_tensor("experts", "dy", dy, {dtype}, {{"R", of.num_rows}, {"H", of.hidden}}, &x);
  check_tensor("experts", "h", h, {dtype}, {{"R"}, {"G", width}}, &x);
  const bool kept = h.size(0) > 0;
  if (kept) check_tensor("experts", "h", h, {dtype}, {{"R", of.num_rows}, {"G", width}}, &x);
  Tensor used_h = kept ? h : empty_large({of.num_rows, width}, dtype, x);
  const int64_t parts_of_row =
      on_cuda(x) ? cuda::experts_dweights_parts(of.ffn) : experts_dweights_parts(of.ffn);
  Tensor parts = empty({of.num_rows, want_dweights ? parts_of_row : 0}, wide(dtype), x);
  // h that was computed here is read and overwritten block by block: dh takes its place.
  Tensor dh = kept ? empty_large({of.num_rows, width}, dtype, x) : used_h;
  Tensor weighted_a = empty_large({want_a ? of.num_rows : 0, of.ffn}, dtype, x);
  Tensor dweights = empty({want_dweights ? of.num_rows : 0}, wide(dtype), x);
  ExpertsUpArgs up{.of = of, .h = dh.mutable_data_ptr(), .a = nullptr};
  const ExpertsDActArgs dact{.of = of,
                             .dy = dy.const_data_ptr(),
                             .h = used_h.const_data_ptr(),
                             .dh = dh.mutable_data_ptr(),
                             .weighted_a = want_a ? weighted_a.mutable_data_ptr() : nullptr,
                             .dweights_parts = want_dweights ? parts.mutable_data_ptr() : nullptr};
  const ExpertsDWeightsArgs sums{.of = of,
                                 .dy = dy.const_data_ptr(),
                                 .dweights_parts = parts.const_data_ptr(),
                                 .dweights = dweights.mutable_data_ptr()};
  run(x, [&](auto stream) {
    if (!kept) with_rows(x, token_of, up.of, stream, [&] { cuda::experts_up(up, stream); });
    cuda::experts_dact(dact, stream);
    if (want_dweights) cuda::experts_dweights(sums, stream);
  }, [&] {
    if (!kept) run_up(up);
    run_dact(dact);
    if (want_dweights) {
      with_workers(of.num_rows * (of.b2 ? of.hidden : 1), [&](int64_t worker, int64_t workers) {
        cpu::experts_dweights(sums, worker, workers);
      });
    }
  });
  return {dh, weighted_a, dweights};
}

void run_dbias(const Tensor& rows, const OptionalTensor& weights, const Tensor& offsets,
               const OptionalTensor& token_of, int64_t tokens, const Tensor& out, bool accumulate) {
  ExpertsArgs of{};
  of.dtype = dtype_of(rows);
  of.token_of = static_cast<const int32_t*>(pointer_of(token_of));
  of.tokens = tokens;
  of.weights = pointer_of(weights);
  of.offsets = offsets.const_data_ptr<int64_t>();
  of.num_rows = rows.size(0);
  of.experts = offsets.size(0) - 1;
  const ExpertsDBiasArgs args{.of = of,
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
  if (weights)
    check_tensor(op, "weights", *weights, {wide(rows.scalar_type())}, {{"R", rows.size(0)}}, &rows);
  if (token_of) check_tensor(op, "token_of", *token_of, kInt32, {{"R", rows.size(0)}}, &rows);
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
  m.def(
      "_experts(Tensor x, Tensor? weights, Tensor w1, Tensor w2, Tensor offsets, "
      "Tensor? token_of, Tensor? b1, Tensor? b2, str activation, float alpha, float limit, "
      "bool interleaved, bool transposed, bool keep_h, bool tf32=False, Tensor? row_of=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "_experts_dact(Tensor dy, Tensor h, Tensor x, Tensor? weights, Tensor w1, Tensor w2, "
      "Tensor offsets, Tensor? token_of, Tensor? b1, Tensor? b2, str activation, float alpha, "
      "float limit, bool interleaved, bool transposed, bool want_a, bool want_dweights, "
      "bool tf32=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_experts_dbias(Tensor rows, Tensor? weights, Tensor offsets, Tensor? token_of, "
      "SymInt tokens) -> Tensor");
  m.def(
      "_experts_dbias_(Tensor(a!) main_grad, Tensor rows, Tensor? weights, Tensor offsets, "
      "Tensor? token_of, SymInt tokens) -> ()");
}

MOEKERNELS_IMPL(m) {
  m.impl("_experts", TORCH_BOX(&experts));
  m.impl("_experts_dact", TORCH_BOX(&experts_dact));
  m.impl("_experts_dbias", TORCH_BOX(&experts_dbias));
  m.impl("_experts_dbias_", TORCH_BOX(&experts_dbias_));
}

}  // namespace moekernels::binding
