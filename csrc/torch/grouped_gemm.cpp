// Each expert's rows times its weights, and the gradient of the weights: checks, memory, launch.
#include "moekernels/grouped_gemm.h"

#include <algorithm>
#include <vector>

#include "cutlass.h"
#include "gemm.h"

namespace moekernels::binding {
namespace {

Tensor grouped_gemm(const Tensor& rows, const Tensor& w, const Tensor& offsets, bool transposed,
                    bool tf32) {
  const char* op = "grouped_gemm";
  check_tensor(op, "rows", rows, kFloats, {{"R"}, {"I"}});
  const int64_t in = rows.size(1);
  if (transposed) {
    check_tensor(op, "w", w, {rows.scalar_type()}, {{"E"}, {"I", in}, {"O"}}, &rows);
  } else {
    check_tensor(op, "w", w, {rows.scalar_type()}, {{"E"}, {"O"}, {"I", in}}, &rows);
  }
  check_offsets(op, offsets, w.size(0), rows.size(0), rows);
  const int64_t out_width = w.size(transposed ? 2 : 1);
  Tensor out = empty_large({rows.size(0), out_width}, rows.scalar_type(), rows);
  const GroupedGemmArgs args{
      .dtype = dtype_of(rows),
      .rows = rows.const_data_ptr(),
      .w = w.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int64_t>(),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.size(0),
      .in = in,
      .out_width = out_width,
      .experts = w.size(0),
      .transposed = transposed,
      .tf32 = tf32,
  };
  run(rows, [&](auto stream) {
    if (!by_cutlass(op, args, rows, stream)) cuda::grouped_gemm(args, stream);
  }, [&] {
    with_workers(rows.size(0) * in * out_width, [&](int64_t worker, int64_t workers) {
      cpu::grouped_gemm(args, worker, workers);
    });
  });
  return out;
}

// Of e4m3 rows [R, I] and w [E, O, I] with their scales: [R, O] of the dtype that is named, plus a
// bias [E, O] and times the rows' weights [R]; rows without a token are zero.
Tensor grouped_gemm_fp8(const Tensor& rows, const Tensor& row_scales, const Tensor& w,
                        const Tensor& w_scales, const Tensor& offsets, OptionalTensor bias,
                        OptionalTensor weights, OptionalTensor token_of, int64_t tokens,
                        std::string dtype) {
  const char* op = "grouped_gemm";
  constexpr auto kFp8 = ScalarType::Float8_e4m3fn;
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const auto out_dtype = named<DType>(op, "dtype", kNames, dtype);
  const ScalarType out_type = kTypes[static_cast<int>(out_dtype)];
  check_tensor(op, "rows", rows, {kFp8}, {{"R"}, {"I"}});
  const Axis num_rows{"R", rows.size(0)}, in{"I", rows.size(1)};
  check_tensor(op, "w", w, {kFp8}, {{"E"}, {"O"}, in}, &rows);
  const Axis experts{"E", w.size(0)}, out_width{"O", w.size(1)};
  const Axis blocks{"I/128", scale_blocks(in.length)};
  check_tensor(op, "row_scales", row_scales, {ScalarType::Float}, {num_rows, blocks}, &rows);
  check_tensor(op, "w_scales", w_scales, {ScalarType::Float},
               {experts, {"O/128", scale_blocks(out_width.length)}, blocks}, &rows);
  check_offsets(op, offsets, experts.length, num_rows.length, rows);
  check_optional(op, "bias", bias, {out_type}, {experts, out_width}, rows);
  check_optional(op, "weights", weights, {ScalarType::Float}, {num_rows}, rows);
  check_optional(op, "token_of", token_of, kInt32, {num_rows}, rows);
  Tensor out = empty_large({num_rows.length, out_width.length}, out_type, rows);
  const GroupedGemmFp8Args args{
      .dtype = out_dtype,
      .rows = static_cast<const uint8_t*>(rows.const_data_ptr()),
      .row_scales = row_scales.const_data_ptr<float>(),
      .w = static_cast<const uint8_t*>(w.const_data_ptr()),
      .w_scales = w_scales.const_data_ptr<float>(),
      .offsets = offsets.const_data_ptr<int64_t>(),
      .bias = pointer_of(bias),
      .weights = static_cast<const float*>(pointer_of(weights)),
      .token_of = static_cast<const int32_t*>(pointer_of(token_of)),
      .tokens = tokens,
      .out = out.mutable_data_ptr(),
      .num_rows = num_rows.length,
      .in = in.length,
      .out_width = out_width.length,
      .experts = experts.length,
  };
  run(rows, [&](auto stream) { cuda::grouped_gemm_fp8(args, stream); }, [&] {
    with_workers(args.num_rows * args.in * args.out_width, [&](int64_t worker, int64_t workers) {
      cpu::grouped_gemm_fp8(args, worker, workers);
    });
  });
  return out;
}

// rows [R, I] ([T, I] seen through token_of when `gather`), drows [R, O]; checks, then adds into or
// sets dw.
struct Wgrad {
  const char* op = "grouped_gemm_wgrad";
  const Tensor& rows;
  const Tensor& drows;
  const Tensor& offsets;
  bool transposed;
  const OptionalTensor& token_of;
  int64_t tokens;
  bool gather, tf32;

  int64_t experts() const { return offsets.size(0) - 1; }
  int64_t m() const { return (transposed ? rows : drows).size(1); }
  int64_t n() const { return (transposed ? drows : rows).size(1); }

  void check_arguments() const {
    check_tensor(op, "drows", drows, kFloats, {{"R"}, {"O"}});
    const int64_t num_rows = drows.size(0);
    if (gather) {
      check_tensor(op, "rows", rows, {drows.scalar_type()}, {{"T", tokens}, {"I"}}, &drows);
    } else {
      check_tensor(op, "rows", rows, {drows.scalar_type()}, {{"R", num_rows}, {"I"}}, &drows);
    }
    if (token_of) check_tensor(op, "token_of", *token_of, kInt32, {{"R", num_rows}}, &drows);
    check(token_of || !gather, op, ": rows seen through token_of need token_of");
    check_offsets(op, offsets, experts_of(op, offsets), num_rows, drows);
  }

  void check_main_grad(const Tensor& main_grad) const {
    check_tensor(op, "out", main_grad, {wide(rows.scalar_type())},
                 {{"E", experts()}, {transposed ? "I" : "O", m()}, {transposed ? "O" : "I", n()}},
                 &rows);
  }

  WgradRows sides() const {
    return {
        .a = (transposed ? rows : drows).const_data_ptr(),
        .b = (transposed ? drows : rows).const_data_ptr(),
        .offsets = offsets.const_data_ptr<int64_t>(),
        .token_of = token_of ? token_of->const_data_ptr<int32_t>() : nullptr,
        .tokens = tokens,
        .num_rows = drows.size(0),
    };
  }

  GroupedWgradArgs args_for(const Tensor& dw, bool accumulate) const {
    const WgradRows own = sides();
    return {
        .dtype = dtype_of(drows),
        .a = own.a,
        .b = own.b,
        .offsets = own.offsets,
        .token_of = own.token_of,
        .tokens = own.tokens,
        .gather_a = gather && transposed,
        .gather_b = gather && !transposed,
        .dw = dw.mutable_data_ptr(),
        .accumulate = accumulate,
        .m = m(),
        .n = n(),
        .experts = experts(),
        .num_rows = own.num_rows,
        .tf32 = tf32,
    };
  }

  template <class CudaStream>
  void on_cuda(GroupedWgradArgs args, CudaStream stream) const {
    if (!token_of && by_cutlass(op, args, drows, stream)) return;
    if (!gather || cuda::grouped_wgrad_gathers(args)) return cuda::grouped_wgrad(args, stream);
    const Tensor permuted_rows = permuted(rows, *token_of, stream);
    (transposed ? args.a : args.b) = permuted_rows.const_data_ptr();
    args.gather_a = args.gather_b = false;
    cuda::grouped_wgrad(args, stream);
  }

  void operator()(const Tensor& dw, bool accumulate) const {
    const GroupedWgradArgs args = args_for(dw, accumulate);
    run(drows, [&](auto stream) { on_cuda(args, stream); }, [&] { on_cpu(args); });
  }

  static void on_cpu(const GroupedWgradArgs& args) {
    int64_t rows = args.num_rows;
    for (int64_t i = 0; i < args.more_count; ++i) rows += args.more[i].num_rows;
    with_workers((rows + args.experts) * args.m * args.n, [&](int64_t worker, int64_t workers) {
      cpu::grouped_wgrad(args, worker, workers);
    });
  }
};

Tensor grouped_gemm_wgrad(const Tensor& rows, const Tensor& drows, const Tensor& offsets,
                          bool transposed, OptionalTensor token_of, int64_t tokens, bool gather,
                          bool tf32) {
  const Wgrad wgrad{.rows = rows,
                    .drows = drows,
                    .offsets = offsets,
                    .transposed = transposed,
                    .token_of = token_of,
                    .tokens = tokens,
                    .gather = gather,
                    .tf32 = tf32};
  wgrad.check_arguments();
  Tensor dw = empty_large({wgrad.experts(), wgrad.m(), wgrad.n()}, rows.scalar_type(), rows);
  wgrad(dw, false);
  return dw;
}

void grouped_gemm_wgrad_(Tensor main_grad, const Tensor& rows, const Tensor& drows,
                         const Tensor& offsets, bool transposed, OptionalTensor token_of,
                         int64_t tokens, bool gather, bool tf32) {
  const Wgrad wgrad{.rows = rows,
                    .drows = drows,
                    .offsets = offsets,
                    .transposed = transposed,
                    .token_of = token_of,
                    .tokens = tokens,
                    .gather = gather,
                    .tf32 = tf32};
  wgrad.check_arguments();
  wgrad.check_main_grad(main_grad);
  wgrad(main_grad, true);
}

// The same of several microbatches: the bits of as many calls, in order.
void grouped_gemm_wgrads_(Tensor main_grad, std::vector<Tensor> rows, std::vector<Tensor> drows,
                          std::vector<Tensor> offsets, bool transposed,
                          std::vector<Tensor> token_of, std::vector<int64_t> tokens, bool gather,
                          bool tf32) {
  const size_t count = rows.size();
  const bool seen = !token_of.empty();
  check(count > 0 && drows.size() == count && offsets.size() == count && tokens.size() == count &&
            (!seen || token_of.size() == count),
        "grouped_gemm_wgrad: rows, drows, offsets, tokens and token_of, if any, must be of as many "
        "microbatches, got ",
        count, ", ", drows.size(), ", ", offsets.size(), ", ", tokens.size(), " and ",
        token_of.size());
  std::vector<OptionalTensor> tokens_of(count);
  if (seen) std::copy(token_of.begin(), token_of.end(), tokens_of.begin());
  std::vector<Wgrad> all;
  for (size_t i = 0; i < count; ++i) {
    all.push_back({.rows = rows[i],
                   .drows = drows[i],
                   .offsets = offsets[i],
                   .transposed = transposed,
                   .token_of = tokens_of[i],
                   .tokens = tokens[i],
                   .gather = gather,
                   .tf32 = tf32});
    all.back().check_arguments();
    all.back().check_main_grad(main_grad);
  }
  std::vector<WgradRows> each;
  for (const Wgrad& one : all) each.push_back(one.sides());
  const auto args_from = [&](size_t first) {
    GroupedWgradArgs args = all[first].args_for(main_grad, true);
    args.more = each.data() + first + 1;
    args.more_count = static_cast<int64_t>(count - first - 1);
    return args;
  };
  run(main_grad, [&](auto stream) {
    for (size_t i = 0; i < count;) {
      GroupedWgradArgs args = args_from(i);
      args.more_count = !seen && cutlass_wanted() ? 0 : cuda::grouped_wgrad_joins(args);
      if (args.more_count == 0) {
        all[i++].on_cuda(args, stream);
        continue;
      }
      std::vector<Tensor> kept;  // rows of tokens, until they are launched
      const size_t first = i;
      for (const size_t end = i + 1 + static_cast<size_t>(args.more_count); i < end; ++i) {
        if (!gather) continue;
        kept.push_back(permuted(rows[i], *tokens_of[i], stream));
        (transposed ? each[i].a : each[i].b) = kept.back().const_data_ptr();
      }
      const auto more_count = args.more_count;
      args = args_from(first).with(each[first]);
      args.more = each.data() + first + 1;
      args.more_count = more_count;
      cuda::grouped_wgrad(args, stream);
    }
  }, [&] { Wgrad::on_cpu(args_from(0)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def(
      "_grouped_gemm(Tensor rows, Tensor w, Tensor offsets, bool transposed, bool tf32=False) "
      "-> Tensor");
  m.def(
      "_grouped_gemm_fp8(Tensor rows, Tensor row_scales, Tensor w, Tensor w_scales, Tensor offsets, "
      "Tensor? bias, Tensor? weights, Tensor? token_of, SymInt tokens, str dtype) -> Tensor");
  m.def(
      "_grouped_gemm_wgrad(Tensor rows, Tensor drows, Tensor offsets, bool transposed, "
      "Tensor? token_of, SymInt tokens, bool gather, bool tf32=False) -> Tensor");
  m.def(
      "_grouped_gemm_wgrad_(Tensor(a!) main_grad, Tensor rows, Tensor drows, Tensor offsets, "
      "bool transposed, Tensor? token_of, SymInt tokens, bool gather, bool tf32=False) -> ()");
  m.def(
      "_grouped_gemm_wgrads_(Tensor(a!) main_grad, Tensor[] rows, Tensor[] drows, "
      "Tensor[] offsets, bool transposed, Tensor[] token_of, int[] tokens, bool gather, "
      "bool tf32=False) -> ()");
}

MOEKERNELS_IMPL(m) {
  m.impl("_grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("_grouped_gemm_fp8", TORCH_BOX(&grouped_gemm_fp8));
  m.impl("_grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
  m.impl("_grouped_gemm_wgrad_", TORCH_BOX(&grouped_gemm_wgrad_));
  m.impl("_grouped_gemm_wgrads_", TORCH_BOX(&grouped_gemm_wgrads_));
}

}  // namespace moekernels::binding
