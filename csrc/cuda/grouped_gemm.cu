// Grouped products on any CUDA device: a block for each tile that the worst case of the offsets
// gives; blocks without a tile end at once. The wgmma kernels for sm_90a are in
// grouped_gemm_sm90.cu.
#include "moekernels/grouped_gemm.h"

#include "common/tiles.cuh"
#include "mma/gemm.cuh"
#include "mma/launch.cuh"

namespace moekernels::cuda {
namespace {

extern __shared__ __align__(128) char shared[];

template <class T, int tile, bool transposed>
__global__ void __launch_bounds__(GemmShape<T, tile>::kThreads)
    rows_times_weights(const MmaProduct args, bool vector_in, bool vector_out) {
  const int64_t tiles_n = tile_count(args.width, tile), index = blockIdx.x / tiles_n;
  const RowTile rows = find_row_tile(args.offsets, args.experts, args.num_rows, tile, index);
  if (rows.group < 0) return;
  const TileColumns columns = plain_columns(tile, blockIdx.x - index * tiles_n, args.width);
  const bool is_tail = rows.group == args.experts;
  const float* c = nullptr;
  if (!is_tail) {
    const OperandSource<T> a{static_cast<const T*>(args.rows) + rows.begin * args.depth, args.depth,
                             TileColumns{tile, 0, 0, rows.end - rows.begin}, args.depth, vector_in};
    const OperandSource<T> b{static_cast<const T*>(args.w) + rows.group * args.depth * args.width,
                             transposed ? args.width : args.depth, columns, args.depth, vector_in};
    c = multiply_tile<T, tile, true, !transposed>(shared, a, b, args.tf32);
  }
  for_chunks<T, tile, tile>([&](int r, int j) {
    const int64_t row = rows.begin + r, count = columns.valid(j, kChunk);
    if (row >= rows.end || count == 0) return;
    float v[kChunk] = {};
    if (!is_tail && (args.token_of == nullptr || inside(args.token_of[row], args.tokens))) {
      float bias[kChunk] = {};
      if (args.bias != nullptr) {
        load_chunk(bias, static_cast<const T*>(args.bias) + rows.group * args.width + columns.at(j),
                   count, false);
      }
      const float weight = args.weights != nullptr ? args.weights[row] : 1.0f;
#pragma unroll
      for (int n = 0; n < kChunk; ++n)
        v[n] = (c[r * GemmShape<T, tile>::kPitchC + j + n] + bias[n]) * weight;
    }
    store_chunk(static_cast<T*>(args.out) + row * args.width + columns.at(j), v, count, vector_out);
  });
}

template <class T, int tile>
__global__ void __launch_bounds__(GemmShape<T, tile>::kThreads)
    weights_gradient(const GroupedWgradArgs args, bool vector) {
  const int64_t tiles_m = tile_count(args.m, tile), tiles_n = tile_count(args.n, tile);
  const int64_t expert = blockIdx.x / (tiles_m * tiles_n),
                index = blockIdx.x - expert * tiles_m * tiles_n;
  const RowRange rows = rows_of_group(args.offsets, expert, args.experts, args.num_rows);
  const int64_t depth = rows.end - rows.begin;
  if (args.accumulate && depth == 0) return;
  const TileColumns ms = plain_columns(tile, index / tiles_n, args.m);
  const TileColumns ns = plain_columns(tile, index % tiles_n, args.n);
  const int32_t* token_of = args.token_of != nullptr ? args.token_of + rows.begin : nullptr;
  const OperandSource<T> a{static_cast<const T*>(args.a) + rows.begin * args.m,
                           args.m,
                           ms,
                           depth,
                           vector,
                           token_of,
                           args.tokens};
  const OperandSource<T> b{static_cast<const T*>(args.b) + rows.begin * args.n,
                           args.n,
                           ns,
                           depth,
                           vector,
                           token_of,
                           args.tokens};
  const float* c = multiply_tile<T, tile, false, false>(shared, a, b, args.tf32);
  for_chunks<T, tile, tile>([&](int i, int j) {
    const int64_t count = ns.valid(j, kChunk);
    if (ms.valid(i, 1) == 0 || count == 0) return;
    const int64_t at = (expert * args.m + ms.at(i)) * args.n + ns.at(j);
    float v[kChunk];
#pragma unroll
    for (int n = 0; n < kChunk; ++n) v[n] = c[i * GemmShape<T, tile>::kPitchC + j + n];
    if (args.accumulate) {
      float* dw = static_cast<float*>(args.dw) + at;
      float before[kChunk];
      load_chunk(before, dw, count, vector);
#pragma unroll
      for (int n = 0; n < kChunk; ++n) v[n] += before[n];
      store_chunk(dw, v, count, vector);
    } else {
      store_chunk(static_cast<T*>(args.dw) + at, v, count, vector);
    }
  });
}

}  // namespace

void row_product(const char* name, const MmaProduct& args, const GemmChoice& choice,
                 Stream stream) {
  with_tile(args.dtype, choice, [&](auto* type, auto constant) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int tile = decltype(constant)::value;
    const bool vector_in = aligned16(args.rows, args.w, args.depth * sizeof(T),
                                     (args.along_n ? args.width : 0) * sizeof(T));
    const bool vector_out = aligned16(args.out, args.width * sizeof(T));
    const int64_t blocks =
        row_tiles_bound(args.num_rows, args.experts, tile) * tile_count(args.width, tile);
    if (args.along_n) {
      launch_gemm(name, rows_times_weights<T, tile, true>, blocks, GemmShape<T, tile>::kThreads,
                  kGemmShared<T, tile, true, false>, stream, args, vector_in, vector_out);
    } else {
      launch_gemm(name, rows_times_weights<T, tile, false>, blocks, GemmShape<T, tile>::kThreads,
                  kGemmShared<T, tile, true, true>, stream, args, vector_in, vector_out);
    }
  });
}

static GemmChoice choice_of(const GroupedGemmArgs& args) {
  const int64_t bytes = size_of(args.dtype);
  return choose({.op = args.transposed ? GemmOp::dgrad : GemmOp::forward,
                 .dtype = args.dtype,
                 .m = args.num_rows,
                 .n = args.out_width,
                 .k = args.in,
                 .experts = args.experts,
                 .alignment = gemm_alignment(args.rows, args.w, args.out, args.in * bytes,
                                             args.out_width * bytes),
                 .tf32 = args.tf32});
}

bool grouped_gemm(const GroupedGemmArgs& args, const Going& home, Stream stream) {
  if constexpr (sm90::kBuilt) {
    const GemmChoice choice = choice_of(args);
    if (choice.kernel != GemmKernel::wgmma || args.dtype != DType::bf16) return false;
    sm90::grouped_gemm(args, home, choice, stream);
    return true;
  }
  return false;
}

void grouped_gemm(const GroupedGemmArgs& args, Stream stream) {
  const GemmChoice choice = choice_of(args);
  if constexpr (sm90::kBuilt) {
    if (choice.kernel == GemmKernel::wgmma) return sm90::grouped_gemm(args, choice, stream);
  }
  const MmaProduct product{.rows = args.rows,
                           .w = args.w,
                           .offsets = args.offsets,
                           .num_rows = args.num_rows,
                           .depth = args.in,
                           .width = args.out_width,
                           .experts = args.experts,
                           .along_n = args.transposed,
                           .dtype = args.dtype,
                           .tf32 = args.tf32,
                           .out = args.out};
  row_product("grouped_gemm", product, choice, stream);
}

namespace {

GemmChoice choice_of(const GroupedWgradArgs& args) {
  const int64_t bytes = size_of(args.dtype);
  return choose(
      {.op = GemmOp::wgrad,
       .dtype = args.dtype,
       .m = args.m,
       .n = args.n,
       .k = args.num_rows,
       .experts = args.experts,
       .alignment = gemm_alignment(args.a, args.b, args.dw, args.m * bytes, args.n * bytes),
       .tf32 = args.tf32});
}

}  // namespace

bool grouped_wgrad_gathers(const GroupedWgradArgs& args) {
  if constexpr (sm90::kBuilt) {
    const GemmChoice choice = choice_of(args);
    return choice.kernel == GemmKernel::wgmma && sm90::gathers(args, choice);
  }
  return false;
}

int64_t grouped_wgrad_joins(const GroupedWgradArgs& args) {
  int64_t count = 0;
  if constexpr (sm90::kBuilt) {
    const GemmChoice choice = choice_of(args);
    if (choice.kernel != GemmKernel::wgmma || !sm90::joins(args, choice)) return 0;
    const auto fits = [&](const WgradRows& rows) {
      return rows.num_rows == 0 || choice_of(args.with(rows)).kernel == GemmKernel::wgmma;
    };
    const int64_t most = std::min<int64_t>(args.more_count, sm90::kMostSegments - 1);
    while (count < most && fits(args.more[count])) ++count;
  }
  return count;
}

void grouped_wgrad(const GroupedWgradArgs& args, Stream stream) {
  const GemmChoice choice = choice_of(args);
  if constexpr (sm90::kBuilt) {
    if (args.more_count > 0) return sm90::grouped_wgrad_segments(args, choice, stream);
    if (args.gather_a || args.gather_b) return sm90::grouped_wgrad_gathered(args, choice, stream);
    if (choice.kernel == GemmKernel::wgmma) return sm90::grouped_wgrad(args, choice, stream);
  }
  with_tile(args.dtype, choice, [&](auto* type, auto constant) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int tile = decltype(constant)::value;
    const bool vector = aligned16(args.a, args.b, args.dw, args.m * sizeof(T), args.n * sizeof(T));
    launch_gemm("grouped_gemm_wgrad", weights_gradient<T, tile>,
                args.experts * tile_count(args.m, tile) * tile_count(args.n, tile),
                GemmShape<T, tile>::kThreads, kGemmShared<T, tile, false, false>, stream, args,
                vector);
  });
}

}  // namespace moekernels::cuda
