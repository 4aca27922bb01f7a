// The FFN's arguments, checked, and its backward: what the bindings of `experts` and of experts
// over an exchange share.
#pragma once

#include <utility>

#include "bundle.h"
#include "gemm.h"
#include "moekernels/experts.h"

namespace moekernels::binding {

// What every kernel of the FFN takes, in the order of ops/experts.py's Ffn.
#define MOEKERNELS_FFN(F)     \
  F(Tensor, x)                \
  F(OptionalTensor, weights)  \
  F(Tensor, w1)               \
  F(Tensor, w2)               \
  F(Tensor, offsets)          \
  F(OptionalTensor, token_of) \
  F(OptionalTensor, b1)       \
  F(OptionalTensor, b2)       \
  F(std::string, activation)  \
  F(double, alpha)            \
  F(double, limit)            \
  F(bool, interleaved)        \
  F(bool, transposed)         \
  F(bool, tf32)
MOEKERNELS_BUNDLE(Ffn, MOEKERNELS_FFN);

// [E, out, in], or transposed [E, in, out].
inline void check_weights(const char* name, const Tensor& w, const Ffn& ffn, Axis experts, Axis out,
                          Axis in) {
  if (ffn.transposed) std::swap(out, in);
  check_tensor("experts", name, w, {ffn.x.scalar_type()}, {experts, out, in}, &ffn.x);
}

inline ExpertsArgs checked(const Ffn& ffn) {
  const char* op = "experts";
  const auto activation = named<Activation>(op, "activation", kActivations, ffn.activation);
  const Tensor& x = ffn.x;
  check_tensor(op, "x", x, kFloats, {{ffn.token_of ? "T" : "R"}, {"H"}});
  check_optional(op, "token_of", ffn.token_of, kInt32, {{"R"}}, x);
  const ScalarType dtype = x.scalar_type();
  const int64_t num_rows = (ffn.token_of ? *ffn.token_of : x).size(0);
  const Axis rows{"R", num_rows}, hidden{"H", x.size(1)};
  check_weights("w2", ffn.w2, ffn, {"E"}, hidden, {"F"});
  const Axis experts{"E", ffn.w2.size(0)};
  const int64_t width = ffn.w2.size(ffn.transposed ? 1 : 2);
  const Axis h_width = is_gated(activation) ? Axis{"2F", 2 * width} : Axis{"F", width};
  check_weights("w1", ffn.w1, ffn, experts, h_width, hidden);
  check_optional(op, "b1", ffn.b1, {dtype}, {experts, h_width}, x);
  check_optional(op, "b2", ffn.b2, {dtype}, {experts, hidden}, x);
  check_optional(op, "weights", ffn.weights, {wide(dtype)}, {rows}, x);
  check_offsets(op, ffn.offsets, experts.length, num_rows, x);
  return {
      .dtype = dtype_of(x),
      .activation = activation,
      .alpha = ffn.alpha,
      .limit = ffn.limit,
      .interleaved = ffn.interleaved,
      .transposed = ffn.transposed,
      .x = x.const_data_ptr(),
      .token_of = static_cast<const int32_t*>(pointer_of(ffn.token_of)),
      .weights = pointer_of(ffn.weights),
      .w1 = ffn.w1.const_data_ptr(),
      .w2 = ffn.w2.const_data_ptr(),
      .b1 = pointer_of(ffn.b1),
      .b2 = pointer_of(ffn.b2),
      .offsets = ffn.offsets.const_data_ptr<int64_t>(),
      .num_rows = num_rows,
      .tokens = x.size(0),
      .hidden = hidden.length,
      .ffn = width,
      .experts = experts.length,
      .tf32 = ffn.tf32,
  };
}

inline int64_t h_width(const ExpertsArgs& args) {
  return (is_gated(args.activation) ? 2 : 1) * args.ffn;
}

// On CUDA: the rows of tokens are gathered by the product, or permuted before it.
template <class CudaStream>
void up_on_cuda(const Ffn& ffn, ExpertsUpArgs up, CudaStream stream) {
  up.of.gather = ffn.token_of && cuda::experts_up_gathers(up);
  if (!ffn.token_of || up.of.gather) return cuda::experts_up(up, stream);
  const Tensor rows = permuted(ffn.x, *ffn.token_of, stream);
  up.of.x = rows.const_data_ptr();
  cuda::experts_up(up, stream);
}

inline void run_up(const ExpertsUpArgs& args) {
  with_workers(args.of.num_rows * args.of.hidden * h_width(args.of),
               [&](int64_t worker, int64_t workers) { cpu::experts_up(args, worker, workers); });
}

// h from the forward, or an empty one: then it is computed again. Returns dh [R, G], the weighted
// activation [R, F] (empty unless `want_weighted_a`) and dweights [R] (empty unless
// `want_dweights`). On CUDA launch(arguments, stream) computes dh and the parts.
template <class Launch>
std::tuple<Tensor, Tensor, Tensor> dact_of(const Ffn& ffn, const Tensor& dy, const Tensor& h,
                                           bool want_weighted_a, bool want_dweights,
                                           const Launch& launch, const OptionalTensor& da = {}) {
  const ExpertsArgs of = checked(ffn);
  const Tensor& x = ffn.x;
  const ScalarType dtype = x.scalar_type();
  const int64_t width = h_width(of);
  check_tensor("experts", "dy", dy, {dtype}, {{"R", of.num_rows}, {"H", of.hidden}}, &x);
  check_tensor("experts", "h", h, {dtype}, {{"R"}, {"G", width}}, &x);
  check_optional("experts", "da", da, {dtype}, {{"R", of.num_rows}, {"F", of.ffn}}, x);
  const bool kept = h.size(0) > 0;
  if (kept) check_tensor("experts", "h", h, {dtype}, {{"R", of.num_rows}, {"G", width}}, &x);
  Tensor used_h = kept ? h : empty_large({of.num_rows, width}, dtype, x);
  const int64_t parts_of_row =
      on_cuda(x) ? cuda::experts_dweights_parts(of.ffn) : cpu::experts_dweights_parts(of.ffn);
  Tensor parts = empty({of.num_rows, want_dweights ? parts_of_row : 0}, wide(dtype), x);
  // h that was computed here is read and overwritten block by block: dh takes its place.
  Tensor dh = kept ? empty_large({of.num_rows, width}, dtype, x) : used_h;
  Tensor weighted_a = empty_large({want_weighted_a ? of.num_rows : 0, of.ffn}, dtype, x);
  Tensor dweights = empty({want_dweights ? of.num_rows : 0}, wide(dtype), x);
  const ExpertsUpArgs up{.of = of, .h = dh.mutable_data_ptr(), .a = nullptr};
  const ExpertsDActArgs dact{
      .of = of,
      .dy = dy.const_data_ptr(),
      .h = used_h.const_data_ptr(),
      .dh = dh.mutable_data_ptr(),
      .weighted_a = want_weighted_a ? weighted_a.mutable_data_ptr() : nullptr,
      .dweights_parts = want_dweights ? parts.mutable_data_ptr() : nullptr,
      .da = pointer_of(da),
  };
  const ExpertsDWeightsArgs sums{.of = of,
                                 .dy = dy.const_data_ptr(),
                                 .dweights_parts = parts.const_data_ptr(),
                                 .dweights = dweights.mutable_data_ptr()};
  run(x, [&](auto stream) {
    if (!kept) up_on_cuda(ffn, up, stream);
    launch(dact, stream);
    if (want_dweights) cuda::experts_dweights(sums, stream);
  }, [&] {
    if (!kept) run_up(up);
    with_workers(of.num_rows * of.hidden * of.ffn, [&](int64_t worker, int64_t workers) {
      cpu::experts_dact(dact, worker, workers);
    });
    if (want_dweights) {
      with_workers(of.num_rows * (of.b2 ? of.hidden : 1), [&](int64_t worker, int64_t workers) {
        cpu::experts_dweights(sums, worker, workers);
      });
    }
  });
  return {dh, weighted_a, dweights};
}

}  // namespace moekernels::binding
