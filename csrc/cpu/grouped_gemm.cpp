// Compiled once for each ISA level; the products themselves are gemm.cpp's.
#include "moekernels/grouped_gemm.h"

#include <algorithm>
#include <cstring>

#include "epilogue.h"
#include "gemm.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kColumnsPerBlock = 256;

inline const char* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}
inline char* at(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, int64_t worker, int64_t workers) {
  const Engine& engine = engine_for(args.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const bool direct = size_of(args.dtype) == engine.acc_bytes;  // C is the output itself
  const auto extent = [&](int64_t e) {
    return Extent{.m = args.offsets[e + 1] - args.offsets[e], .n = args.out_width, .k = args.in};
  };
  for_blocks(engine, args.experts, kColumnsPerBlock, args.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = args.offsets[e];
    const Operand a{
        .data = at(args.rows, first * args.in, args.dtype), .ld = args.in, .k_contiguous = true};
    const Operand b{.data = at(args.w, e * args.in * args.out_width, args.dtype),
                    .ld = args.transposed ? args.out_width : args.in,
                    .k_contiguous = !args.transposed};
    char* out = at(args.out, (first + block.m0) * args.out_width + block.n0, args.dtype);
    Product product{
        .a = a, .b = b, .block = block, .depth = args.in, .c = out, .ldc = args.out_width};
    if (!direct) {
      product.c = workspace.block(engine, block.rows() * block.columns());
      product.ldc = block.columns();
    }
    workspace.multiply(engine, product);
    if (!direct) {
      write_block(args.dtype, product.c, block.rows(), block.columns(), out, args.out_width, false);
    }
  });
  zero_tail(args.out, args.out_width * size_of(args.dtype), args.offsets[args.experts],
            args.num_rows, worker, workers);
}

namespace {

// The rows of a call, by microbatch: the first is the call's own.
WgradRows rows_of(const GroupedWgradArgs& args, int64_t i) {
  if (i > 0) return args.more[i - 1];
  return {.a = args.a,
          .b = args.b,
          .offsets = args.offsets,
          .token_of = args.token_of,
          .tokens = args.tokens,
          .num_rows = args.num_rows};
}

Term term_of(const GroupedWgradArgs& args, const WgradRows& rows, int64_t e) {
  const int64_t first = rows.offsets[e];
  const auto operand = [&](const void* data, int64_t width, bool gather) {
    return Operand{.data = at(data, gather ? 0 : first * width, args.dtype),
                   .ld = width,
                   .k_contiguous = false,
                   .token_of = rows.token_of ? rows.token_of + first : nullptr,
                   .tokens = rows.tokens,
                   .gather = gather};
  };
  return {.a = operand(rows.a, args.m, args.gather_a),
          .b = operand(rows.b, args.n, args.gather_b),
          .depth = rows.offsets[e + 1] - first};
}

}  // namespace

void grouped_wgrad(const GroupedWgradArgs& args, int64_t worker, int64_t workers) {
  const Engine& engine = engine_for(args.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const DType out_dtype = args.accumulate && args.dtype != DType::f64 ? DType::f32 : args.dtype;
  const bool direct = size_of(out_dtype) == engine.acc_bytes;
  const auto extent = [&](int64_t e) {
    int64_t k = 0;
    for (int64_t i = 0; i <= args.more_count; ++i) {
      const int64_t* offsets = rows_of(args, i).offsets;
      k += offsets[e + 1] - offsets[e];
    }
    // An expert without rows adds nothing; where nothing is accumulated its gradient is still to be
    // set to zero.
    return Extent{.m = args.accumulate && k == 0 ? 0 : args.m, .n = args.n, .k = k};
  };
  for_blocks(engine, args.experts, kColumnsPerBlock, false, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    char* dw = at(args.dw, (e * args.m + block.m0) * args.n + block.n0, out_dtype);
    if (args.more_count > 0) {
      constexpr int64_t kTerms = 32;
      Term terms[kTerms];
      for (int64_t first = 0; first <= args.more_count; first += kTerms) {
        const int64_t count = std::min(kTerms, args.more_count + 1 - first);
        for (int64_t i = 0; i < count; ++i) terms[i] = term_of(args, rows_of(args, first + i), e);
        workspace.accumulate(engine, block, terms, count, dw, args.n);
      }
      return;
    }
    const Term term = term_of(args, rows_of(args, 0), e);
    Product product{.a = term.a,
                    .b = term.b,
                    .block = block,
                    .depth = term.depth,
                    .c = dw,
                    .ldc = args.n,
                    .mode = args.accumulate ? Store::add : Store::stream};
    const bool narrow = !direct && Workspace::narrows(engine, term.depth, block.columns());
    if (narrow) {
      product.mode = Store::narrow;
    } else if (!direct) {
      product.c = workspace.block(engine, block.rows() * block.columns());
      product.ldc = block.columns();
      product.mode = Store::set;
    }
    workspace.multiply(engine, product);
    if (!direct && !narrow) {
      write_block(args.dtype, product.c, block.rows(), block.columns(), dw, args.n, true);
    }
  });
  drain();
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
