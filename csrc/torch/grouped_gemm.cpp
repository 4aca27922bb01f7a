// Each expert's rows times its weights, and the gradient of the weights: checks, memory, launch.
#include "moekernels/grouped_gemm.h"

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

  void operator()(const Tensor& dw, bool accumulate) const {
    GroupedWgradArgs args{
        .dtype = dtype_of(drows),
        .a = (transposed ? rows : drows).const_data_ptr(),
        .b = (transposed ? drows : rows).const_data_ptr(),
        .offsets = offsets.const_data_ptr<int64_t>(),
        .token_of = token_of ? token_of->const_data_ptr<int32_t>() : nullptr,
        .tokens = tokens,
        .gather_a = gather && transposed,
        .gather_b = gather && !transposed,
        .dw = dw.mutable_data_ptr(),
        .accumulate = accumulate,
        .m = m(),
        .n = n(),
        .experts = experts(),
        .num_rows = drows.size(0),
        .tf32 = tf32,
    };
    run(drows, [&](auto stream) {
      if (!token_of && by_cutlass(op, args, drows, stream)) return;
      if (!gather) return cuda::grouped_wgrad(args, stream);
      const Tensor permuted_rows = permuted(rows, *token_of, stream);
      (transposed ? args.a : args.b) = permuted_rows.const_data_ptr();
      args.gather_a = args.gather_b = false;
      cuda::grouped_wgrad(args, stream);
    }, [&] {
      with_workers((drows.size(0) + experts()) * m() * n(), [&](int64_t worker, int64_t workers) {
        cpu::grouped_wgrad(args, worker, workers);
      });
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
  check_tensor(wgrad.op, "out", main_grad, {wide(rows.scalar_type())},
               {{"E", wgrad.experts()},
                {transposed ? "I" : "O", wgrad.m()},
                {transposed ? "O" : "I", wgrad.n()}},
               &rows);
  wgrad(main_grad, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def(
      "_grouped_gemm(Tensor rows, Tensor w, Tensor offsets, bool transposed, bool tf32=False) "
      "-> Tensor");
  m.def(
      "_grouped_gemm_wgrad(Tensor rows, Tensor drows, Tensor offsets, bool transposed, "
      "Tensor? token_of, SymInt tokens, bool gather, bool tf32=False) -> Tensor");
  m.def(
      "_grouped_gemm_wgrad_(Tensor(a!) main_grad, Tensor rows, Tensor drows, Tensor offsets, "
      "bool transposed, Tensor? token_of, SymInt tokens, bool gather, bool tf32=False) -> ()");
}

MOEKERNELS_IMPL(m) {
  m.impl("_grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("_grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
  m.impl("_grouped_gemm_wgrad_", TORCH_BOX(&grouped_gemm_wgrad_));
}

}  // namespace moekernels::binding
