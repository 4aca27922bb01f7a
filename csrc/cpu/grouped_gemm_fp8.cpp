// Compiled once for each ISA level; the products themselves are gemm_fp8.h's.
#include <memory>

#include "epilogue.h"
#include "gemm.h"
#include "gemm_fp8.h"
#include "moekernels/grouped_gemm.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kColumnsOfBlock = 256;

// C, plus a bias, times the row's weight, rounded; unused rows are zero.
template <class T>
void write(const GroupedGemmFp8Args& args, int64_t expert, int64_t first, const Block& block,
           const float* c) {
  const int64_t columns = block.columns();
  const T* bias =
      args.bias ? static_cast<const T*>(args.bias) + expert * args.out_width + block.n0 : nullptr;
  for (int64_t r = 0; r < block.rows(); ++r) {
    const int64_t row = first + block.m0 + r;
    T* out = static_cast<T*>(args.out) + row * args.out_width + block.n0;
    const int32_t token = args.token_of ? args.token_of[row] : 0;
    const bool used = args.token_of == nullptr || (token >= 0 && token < args.tokens);
    const float weight = args.weights ? args.weights[row] : 1.0f;
    for_vectors<float>(columns, [&](int64_t j, auto n) {
      Float x = load(c + r * columns + j, n);
      if (bias != nullptr) x = x + load(bias + j, n);
      store(out + j, used ? x * weight : Float{}, n);
    });
  }
}

}  // namespace

void grouped_gemm_fp8(const GroupedGemmFp8Args& args, int64_t worker, int64_t workers) {
  const Engine& engine = engine_for(DType::f64);  // whose cost the cut follows
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  thread_local std::unique_ptr<ScaledBlocks> blocks;  // half a megabyte
  if (!blocks) blocks = std::make_unique<ScaledBlocks>();
  const auto extent = [&](int64_t e) {
    return Extent{.m = args.offsets[e + 1] - args.offsets[e], .n = args.out_width, .k = args.in};
  };
  const int64_t row_blocks = scale_blocks(args.in);
  for_blocks(engine, args.experts, kColumnsOfBlock, false, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = args.offsets[e];
    const ScaledOperand a{args.rows + first * args.in, args.row_scales + first * row_blocks, 1};
    const ScaledOperand b{args.w + e * args.out_width * args.in,
                          args.w_scales + e * scale_blocks(args.out_width) * row_blocks,
                          kScaleBlock};
    float* c = static_cast<float*>(workspace.block(engine, block.rows() * block.columns()));
    blocks->multiply(a, b, args.in, block.m0, block.rows(), block.n0, block.columns(), c,
                     block.columns());
    with_storage(args.dtype, [&]<class T>(T) {
      if constexpr (std::is_same_v<Wide<T>, float>) write<T>(args, e, first, block, c);
    });
  });
  zero_tail(args.out, args.out_width * size_of(args.dtype), args.offsets[args.experts],
            args.num_rows, worker, workers);
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
