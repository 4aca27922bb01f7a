// The expert FFN on any CUDA device: what follows a product happens to its tile while that is in
// shared memory. The wgmma kernels for sm_90a are in experts_sm90.cu.
#include "moekernels/experts.h"

#include "common/activation.cuh"
#include "common/tiles.cuh"
#include "dweights.cuh"
#include "mma/gemm.cuh"
#include "mma/h_chunk.cuh"
#include "mma/launch.cuh"

namespace moekernels::cuda {
namespace {

extern __shared__ __align__(128) char shared[];

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <class T>
__device__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

template <class T, int tile, bool transposed>
__global__ void __launch_bounds__(GemmShape<T, tile>::kThreads)
    up_projection(const ExpertsUpArgs args, bool vector_in, bool vector_out) {
  constexpr int kPitch = GemmShape<T, tile>::kPitchC;
  const ExpertsArgs& of = args.of;
  const bool gated = is_gated(of.activation), interleaved = gated && of.interleaved;
  const int64_t width = (gated ? 2 : 1) * of.ffn, tile_f = gated ? tile / 2 : tile;
  const int64_t tiles_f = tile_count(of.ffn, tile_f), index = blockIdx.x / tiles_f,
                n = blockIdx.x - index * tiles_f;
  const RowTile rows = find_row_tile(of.offsets, of.experts, of.num_rows, tile, index);
  if (rows.group < 0) return;
  const TileColumns columns =
      gated ? gated_columns(tile, n, of.ffn, interleaved) : plain_columns(tile, n, of.ffn);
  const bool is_tail = rows.group == of.experts;
  const float* c = nullptr;
  if (!is_tail) {
    const OperandSource<T> a{static_cast<const T*>(of.x) + rows.begin * of.hidden, of.hidden,
                             TileColumns{tile, 0, 0, rows.end - rows.begin}, of.hidden, vector_in};
    const OperandSource<T> b{static_cast<const T*>(of.w1) + rows.group * width * of.hidden,
                             transposed ? width : of.hidden, columns, of.hidden, vector_in};
    c = multiply_tile<T, tile, true, !transposed>(shared, a, b, of.tf32);
  }
  const T* bias =
      of.b1 != nullptr && !is_tail ? static_cast<const T*>(of.b1) + rows.group * width : nullptr;
  const auto h_at = [&](int r, int j) {  // h in the tile's own columns, rounded as it is kept
    const float b =
        bias != nullptr && columns.valid(j, 1) > 0 ? to_float(bias[columns.at(j)]) : 0.0f;
    return rounded<T>(c[r * kPitch + j] + b);
  };
  const auto write = [&](int r, int j) {
    const int64_t row = rows.begin + r, column = n * tile_f + j;
    if (row >= rows.end || column >= of.ffn) return;
    const HChunk<T> h(of, args.h, row, column, vector_out);
    float gate[kChunk] = {}, up[kChunk] = {}, a[kChunk] = {};
    if (!is_tail) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        gate[i] = h_at(r, interleaved ? 2 * (j + i) : j + i);
        if (gated) up[i] = h_at(r, interleaved ? 2 * (j + i) + 1 : tile / 2 + j + i);
      }
    }
    if (args.h != nullptr) h.store(gate, up);
    if (args.a == nullptr) return;
    if (!is_tail) {
      with_activation(of.activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          a[i] = activate<decltype(kind)::value>(gate[i], up[i], static_cast<float>(of.alpha),
                                                 static_cast<float>(of.limit))
                     .a;
        }
      });
    }
    store_chunk(static_cast<T*>(args.a) + row * of.ffn + column, a, of.ffn - column, vector_out);
  };
  if (gated) {
    for_chunks<T, tile, tile / 2>(write);
  } else {
    for_chunks<T, tile, tile>(write);
  }
}

template <class T, int tile, bool transposed>
__global__ void __launch_bounds__(GemmShape<T, tile>::kThreads)
    activation_gradient(const ExpertsDActArgs args, bool vector_in, bool vector_out) {
  constexpr int kPitch = GemmShape<T, tile>::kPitchC, kPartLanes = kDWeightsColumns / kChunk;
  const ExpertsArgs& of = args.of;
  const int64_t tiles_n = tile_count(of.ffn, tile), index = blockIdx.x / tiles_n,
                n = blockIdx.x - index * tiles_n;
  const RowTile rows = find_row_tile(of.offsets, of.experts, of.num_rows, tile, index);
  if (rows.group < 0) return;
  const TileColumns columns = plain_columns(tile, n, of.ffn);
  const bool is_tail = rows.group == of.experts;
  const float* c = nullptr;
  if (!is_tail) {
    const OperandSource<T> a{static_cast<const T*>(args.dy) + rows.begin * of.hidden, of.hidden,
                             TileColumns{tile, 0, 0, rows.end - rows.begin}, of.hidden, vector_in};
    const OperandSource<T> b{static_cast<const T*>(of.w2) + rows.group * of.ffn * of.hidden,
                             transposed ? of.hidden : of.ffn, columns, of.hidden, vector_in};
    c = multiply_tile<T, tile, true, transposed>(shared, a, b, of.tf32);
  }
  for_chunks<T, tile, tile>([&](int r, int j) {
    const int64_t row = rows.begin + r, column = columns.at(j);
    const bool exists = row < rows.end && column < of.ffn,
               used = exists && !is_tail && is_used(of, row);
    float dot = 0;
    if (exists) {
      float dgate[kChunk] = {}, dup[kChunk] = {}, weighted[kChunk] = {};
      if (used) {
        float gate[kChunk], up[kChunk] = {};
        HChunk<T>(of, args.h, row, column, vector_out).load(gate, up);
        const float weight = weight_of(of, row);
        with_activation(of.activation, [&](auto kind) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            const float da = column + i < of.ffn ? c[r * kPitch + j + i] : 0.0f;
            const auto act = activate<decltype(kind)::value>(
                gate[i], up[i], static_cast<float>(of.alpha), static_cast<float>(of.limit));
            dot = fmaf(da, column + i < of.ffn ? act.a : 0.0f, dot);
            dgate[i] = da * weight * act.by_gate;
            dup[i] = da * weight * act.by_up;
            weighted[i] = weight * act.a;
          }
        });
      }
      HChunk<T>(of, args.dh, row, column, vector_out).store(dgate, dup);
      if (args.weighted_a != nullptr) {
        store_chunk(static_cast<T*>(args.weighted_a) + row * of.ffn + column, weighted,
                    of.ffn - column, vector_out);
      }
    }
    if (args.dweights_parts != nullptr) {
#pragma unroll
      for (int step = kPartLanes / 2; step > 0; step /= 2)
        dot += __shfl_xor_sync(kAllLanes, dot, step);
      if (exists && j % kDWeightsColumns == 0) {
        static_cast<float*>(
            args.dweights_parts)[row * experts_dweights_parts(of.ffn) + column / kDWeightsColumns] =
            dot;
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_dweights(const ExpertsDWeightsArgs args) {
  sum_dweight<T>(args);
}

// A block for 32 columns of an expert: a lane a column, the warps take turns at the rows.
template <class T>
__global__ void __launch_bounds__(kThreads) bias_gradient(const ExpertsDBiasArgs args) {
  __shared__ float sums[kWarps][kWarp];
  const int64_t column_blocks = tile_count(args.width, kWarp), expert = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x - expert * column_blocks) * kWarp + lane_id();
  const int warp = threadIdx.x / kWarp;
  const RowRange rows = rows_of_group(args.offsets, expert, args.experts, args.num_rows);
  if (args.accumulate && rows.begin == rows.end) return;
  float sum = 0;
  if (column < args.width) {
    for (int64_t row = rows.begin + warp; row < rows.end; row += kWarps) {
      if (is_used(args, row)) {
        sum = fmaf(weight_of(args, row),
                   to_float(static_cast<const T*>(args.rows)[row * args.width + column]), sum);
      }
    }
  }
  sums[warp][lane_id()] = sum;
  __syncthreads();
  if (warp > 0 || column >= args.width) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i][lane_id()];
  const int64_t at = expert * args.width + column;
  if (args.accumulate) {
    static_cast<float*>(args.out)[at] += sum;
  } else {
    static_cast<T*>(args.out)[at] = from_float<T>(sum);
  }
}

int64_t width_of(const ExpertsArgs& of) { return (is_gated(of.activation) ? 2 : 1) * of.ffn; }

GemmChoice choice_for(GemmOp op, const ExpertsArgs& of, int64_t n, int64_t k, int64_t alignment) {
  return choose({.op = op,
                 .dtype = of.dtype,
                 .m = of.num_rows,
                 .n = n,
                 .k = k,
                 .experts = of.experts,
                 .alignment = alignment,
                 .tf32 = of.tf32});
}
int64_t alignment_of_rows(const ExpertsArgs& of) {
  return gemm_alignment(of.hidden * size_of(of.dtype), of.ffn * size_of(of.dtype));
}
GemmChoice choice_of(const ExpertsUpArgs& args) {
  const ExpertsArgs& of = args.of;
  return choice_for(GemmOp::up, of, width_of(of), of.hidden,
                    gemm_alignment(of.x, of.w1, of.b1, args.h, args.a, alignment_of_rows(of)));
}
GemmChoice choice_of(const ExpertsDownArgs& args) {
  const ExpertsArgs& of = args.of;
  return choice_for(GemmOp::down, of, of.hidden, of.ffn,
                    gemm_alignment(args.a, of.w2, of.b2, args.y, alignment_of_rows(of)));
}
GemmChoice choice_of(const ExpertsDActArgs& args) {
  const ExpertsArgs& of = args.of;
  return choice_for(
      GemmOp::dact, of, of.ffn, of.hidden,
      gemm_alignment(args.dy, of.w2, args.h, args.dh, args.weighted_a, alignment_of_rows(of)));
}

// Runs a product over rows of an exchange where there is one.
template <class Args, class Launch>
bool over_peers(const Args& args, const Launch& launch) {
  if constexpr (sm90::kBuilt) {
    const GemmChoice choice = choice_of(args);
    if (choice.kernel != GemmKernel::wgmma || args.of.dtype != DType::bf16) return false;
    launch(choice);
    return true;
  }
  return false;
}

}  // namespace

bool experts_up(const ExpertsUpArgs& args, const Arriving& from, Stream stream) {
  return over_peers(args, [&](auto& choice) { sm90::experts_up(args, from, choice, stream); });
}
bool experts_dact(const ExpertsDActArgs& args, const Arriving& from, Stream stream) {
  return over_peers(args, [&](auto& choice) { sm90::experts_dact(args, from, choice, stream); });
}
bool experts_down(const ExpertsDownArgs& args, const Going& home, Stream stream) {
  return over_peers(args, [&](auto& choice) { sm90::experts_down(args, home, choice, stream); });
}

bool experts_up_gathers(const ExpertsUpArgs& args) {
  if constexpr (sm90::kBuilt) {
    if (choice_of(args).kernel == GemmKernel::wgmma) return sm90::gathers(args, choice_of(args));
  }
  return false;
}

void experts_up(const ExpertsUpArgs& args, Stream stream) {
  const ExpertsArgs& of = args.of;
  const GemmChoice choice = choice_of(args);
  if constexpr (sm90::kBuilt) {
    if (of.gather) return sm90::experts_up_gathered(args, choice, stream);
    if (choice.kernel == GemmKernel::wgmma) return sm90::experts_up(args, choice, stream);
  }
  with_tile(of.dtype, choice, [&](auto* type, auto constant) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int tile = decltype(constant)::value;
    const bool vector_in =
        aligned16(of.x, of.w1, of.hidden * sizeof(T), (of.transposed ? of.ffn : 0) * sizeof(T));
    const bool vector_out = aligned16(args.h, args.a, of.ffn * sizeof(T));
    const int64_t tile_f = is_gated(of.activation) ? tile / 2 : tile;
    const int64_t blocks =
        row_tiles_bound(of.num_rows, of.experts, tile) * tile_count(of.ffn, tile_f);
    if (of.transposed) {
      launch_gemm("experts_up", up_projection<T, tile, true>, blocks, GemmShape<T, tile>::kThreads,
                  kGemmShared<T, tile, true, false>, stream, args, vector_in, vector_out);
    } else {
      launch_gemm("experts_up", up_projection<T, tile, false>, blocks, GemmShape<T, tile>::kThreads,
                  kGemmShared<T, tile, true, true>, stream, args, vector_in, vector_out);
    }
  });
}

void experts_down(const ExpertsDownArgs& args, Stream stream) {
  const ExpertsArgs& of = args.of;
  const GemmChoice choice = choice_of(args);
  if constexpr (sm90::kBuilt) {
    if (choice.kernel == GemmKernel::wgmma) return sm90::experts_down(args, choice, stream);
  }
  const MmaProduct product{.rows = args.a,
                           .w = of.w2,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.ffn,
                           .width = of.hidden,
                           .experts = of.experts,
                           .along_n = of.transposed,
                           .dtype = of.dtype,
                           .tf32 = of.tf32,
                           .out = args.y,
                           .bias = of.b2,
                           .weights = static_cast<const float*>(of.weights),
                           .token_of = of.token_of,
                           .tokens = of.tokens};
  row_product("experts_down", product, choice, stream);
}

void experts_dact(const ExpertsDActArgs& args, Stream stream) {
  if (args.da != nullptr) return experts_dact_of_product(args, stream);
  const ExpertsArgs& of = args.of;
  const GemmChoice choice = choice_of(args);
  if constexpr (sm90::kBuilt) {
    if (choice.kernel == GemmKernel::wgmma) return sm90::experts_dact(args, choice, stream);
  }
  with_tile(of.dtype, choice, [&](auto* type, auto constant) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int tile = decltype(constant)::value;
    const bool vector_in =
        aligned16(args.dy, of.w2, of.hidden * sizeof(T), (of.transposed ? 0 : of.ffn) * sizeof(T));
    const bool vector_out = aligned16(args.h, args.dh, args.weighted_a, of.ffn * sizeof(T));
    const int64_t blocks =
        row_tiles_bound(of.num_rows, of.experts, tile) * tile_count(of.ffn, tile);
    if (of.transposed) {
      launch_gemm("experts_dact", activation_gradient<T, tile, true>, blocks,
                  GemmShape<T, tile>::kThreads, kGemmShared<T, tile, true, true>, stream, args,
                  vector_in, vector_out);
    } else {
      launch_gemm("experts_dact", activation_gradient<T, tile, false>, blocks,
                  GemmShape<T, tile>::kThreads, kGemmShared<T, tile, true, false>, stream, args,
                  vector_in, vector_out);
    }
  });
}

void experts_dweights(const ExpertsDWeightsArgs& args, Stream stream) {
  if constexpr (sm90::kBuilt) {
    if (sm90::experts_dweights(args, stream)) return;
  }
  with_type(args.of.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("experts_dweights", sum_dweights<T>, ceil_div(args.of.num_rows, kWarps), kThreads, 0,
           stream, args);
  });
}

void experts_dbias(const ExpertsDBiasArgs& args, Stream stream) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("experts_dbias", bias_gradient<T>, args.experts * ceil_div(args.width, kWarp), kThreads,
           0, stream, args);
  });
}

}  // namespace moekernels::cuda
