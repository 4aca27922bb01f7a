// Rotary positions and causal attention over packed segments on the CPU: checks, memory, launch.
// On CUDA torch.nn.attention.varlen is what this is here.
#include "moekernels/attention.h"

#include <algorithm>

#include "gemm.h"

namespace moekernels::binding {
namespace {

AttentionArgs checked(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& bounds,
                      const OptionalTensor& q_weight, const OptionalTensor& k_weight, int64_t heads,
                      int64_t kv_heads, double scale, double eps) {
  const char* op = "attention";
  check(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0, op,
        ": kv_heads must divide heads, got ", kv_heads, " and ", heads);
  check(scale > 0, op, ": scale must be above 0, got ", scale);
  check_tensor(op, "qkv", qkv, kFloats, {{"T"}, {"hq + 2 hk", heads + 2 * kv_heads}, {"hd"}});
  const int64_t tokens = qkv.size(0), width = qkv.size(2);
  const ScalarType angles = wide(qkv.scalar_type());
  check_tensor(op, "cos", cos, {angles}, {{"T", tokens}, {"rd/2"}}, &qkv);
  check(2 * cos.size(1) <= width, op, ": cos must be of at most half of hd=", width, ", got ",
        shape_of(cos));
  check_tensor(op, "sin", sin, {angles}, {{"T", tokens}, {"rd/2", cos.size(1)}}, &qkv);
  check(q_weight.has_value() == k_weight.has_value(), op,
        ": q_weight and k_weight must be given together");
  check_optional(op, "q_weight", q_weight, {qkv.scalar_type()}, {{"hd", width}}, qkv);
  check_optional(op, "k_weight", k_weight, {qkv.scalar_type()}, {{"hd", width}}, qkv);
  const int64_t segments = experts_of(op, bounds);
  check_offsets(op, bounds, segments, tokens, qkv);
  const int64_t* at = bounds.const_data_ptr<int64_t>();
  check(at[segments] == tokens, op, ": bounds must end at T=", tokens, ", got ", at[segments]);
  return {
      .qkv = qkv.const_data_ptr(),
      .cos = cos.const_data_ptr(),
      .sin = sin.const_data_ptr(),
      .q_weight = pointer_of(q_weight),
      .k_weight = pointer_of(k_weight),
      .bounds = at,
      .out = nullptr,
      .lse = nullptr,
      .tokens = tokens,
      .segments = segments,
      .heads = heads,
      .kv_heads = kv_heads,
      .width = width,
      .half = cos.size(1),
      .scale = scale,
      .eps = eps,
      .dtype = dtype_of(qkv),
  };
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                     const Tensor& bounds, OptionalTensor q_weight,
                                     OptionalTensor k_weight, int64_t heads, int64_t kv_heads,
                                     double scale, double eps) {
  AttentionArgs args =
      checked(qkv, cos, sin, bounds, q_weight, k_weight, heads, kv_heads, scale, eps);
  Tensor out = empty_large({args.tokens, heads, args.width}, qkv.scalar_type(), qkv);
  Tensor lse = empty({heads, args.tokens}, wide(qkv.scalar_type()), qkv);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  parallel(args.segments * kv_heads, 1,
           [&](int64_t begin, int64_t end) { cpu::attention(args, begin, end); });
  return {out, lse};
}

// The sum over items, in order: [2, hd] as the weights are, or nothing.
template <class W>
void add_items(const Tensor& parts, Tensor& total) {
  const int64_t items = parts.size(0), count = total.numel();
  const W* from = static_cast<const W*>(parts.const_data_ptr());
  W* to = static_cast<W*>(total.mutable_data_ptr());
  std::fill(to, to + count, W(0));
  for (int64_t i = 0; i < items; ++i) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[i * count + j];
  }
}

// Returns dqkv and the gradients of both weights [2, hd] in fp32 (fp64), empty without weights.
std::tuple<Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& qkv,
                                              const Tensor& cos, const Tensor& sin,
                                              const Tensor& bounds, const Tensor& out,
                                              const Tensor& lse, OptionalTensor q_weight,
                                              OptionalTensor k_weight, int64_t heads,
                                              int64_t kv_heads, double scale, double eps) {
  AttentionBackwardArgs args{
      .of = checked(qkv, cos, sin, bounds, q_weight, k_weight, heads, kv_heads, scale, eps),
      .dout = nullptr,
      .dqkv = nullptr,
      .dweights = nullptr};
  const char* op = "attention_backward";
  const ScalarType sums = wide(qkv.scalar_type());
  const Axis tokens{"T", args.of.tokens}, each{"hq", heads}, width{"hd", args.of.width};
  check_tensor(op, "dout", dout, {qkv.scalar_type()}, {tokens, each, width}, &qkv);
  check_tensor(op, "out", out, {qkv.scalar_type()}, {tokens, each, width}, &qkv);
  check_tensor(op, "lse", lse, {sums}, {each, tokens}, &qkv);
  const int64_t items = args.of.segments * kv_heads;
  Tensor dqkv =
      empty_large({args.of.tokens, heads + 2 * kv_heads, args.of.width}, qkv.scalar_type(), qkv);
  Tensor parts = empty({q_weight ? items : 0, 2, args.of.width}, sums, qkv);
  Tensor dweights = empty({q_weight ? 2 : 0, args.of.width}, sums, qkv);
  args.of.out = const_cast<void*>(out.const_data_ptr());
  args.of.lse = const_cast<void*>(lse.const_data_ptr());
  args.dout = dout.const_data_ptr();
  args.dqkv = dqkv.mutable_data_ptr();
  if (q_weight) args.dweights = parts.mutable_data_ptr();
  parallel(items, 1,
           [&](int64_t begin, int64_t end) { cpu::attention_backward(args, begin, end); });
  if (q_weight) {
    sums == ScalarType::Double ? add_items<double>(parts, dweights)
                               : add_items<float>(parts, dweights);
  }
  return {dqkv, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def(
      "_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor bounds, Tensor? q_weight, "
      "Tensor? k_weight, int heads, int kv_heads, float scale, float eps) -> (Tensor, Tensor)");
  m.def(
      "_attention_backward(Tensor dout, Tensor qkv, Tensor cos, Tensor sin, Tensor bounds, "
      "Tensor out, Tensor lse, Tensor? q_weight, Tensor? k_weight, int heads, int kv_heads, "
      "float scale, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CPU, m) {
  m.impl("_attention", TORCH_BOX(&attention));
  m.impl("_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace moekernels::binding
