// Launches the products of sm_90a.
#pragma once

#include <algorithm>

#include "kernel.cuh"
#include "moekernels/gemm_order.h"
#include "moekernels/grouped_gemm.h"
#include "rows.cuh"
#include "state.cuh"
#include "tensor_map.cuh"

namespace moekernels::cuda::sm90 {

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

// The ring gives up stages where many experts take their room, unless the settings ask for them.
// shared_bytes(stages, experts): what a block needs.
template <class Bytes>
void set_stages(ProductArgs& args, const char* name, int columns, int wanted,
                const Bytes& shared_bytes) {
  const auto bytes = [&] { return shared_bytes(args.stages, args.experts); };
  const int asked = settings().stages;
  args.stages = std::min(asked > 0 ? asked : wanted, kMostStages);
  while (args.stages > kLeastStages && bytes() > kMostShared) --args.stages;
  if (asked > args.stages) {
    throw std::runtime_error(
        std::string(name) + ": shared memory has room for " + std::to_string(args.stages) +
        " stages of a tile of " + std::to_string(columns) + " columns with " +
        std::to_string(args.experts) + " experts, the settings ask for " + std::to_string(asked));
  }
}

inline GemmOrder order_of(const GemmChoice& choice) {
  return order_of(choice, settings(), multiprocessors());
}

inline LaunchOrder launches() { return launch_order_of(settings()); }

// A row of the table that names another style says nothing of this one's stages: as many as there
// is room.
inline int stages_of(const GemmChoice& choice, GemmStyle style) {
  return choice.order.style == style ? choice.stages : kMostStages;
}

struct ProductLaunch {
  int64_t blocks, bytes;
};

// Completes `args` by the choice and lets the kernel have its shared memory, `more_bytes` behind
// the product's own. `tiles`: the most there can be.
template <class Kernel>
ProductLaunch prepare(const char* name, Kernel kernel, int columns, const GemmChoice& choice,
                      int64_t tiles, ProductArgs& args, int64_t more_bytes = 0) {
  const auto shared_bytes = [&](int stages, int64_t experts) {
    return product_shared_bytes(columns, stages, experts) + more_bytes;
  };
  set_stages(args, name, columns, stages_of(choice, GemmStyle::direct), shared_bytes);
  const GemmOrder order = order_of(choice);
  args.band = order.band;
  args.prefetch = order.prefetch;
  const int64_t bytes = shared_bytes(args.stages, args.experts);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
  return {std::min<int64_t>(tiles, order.grid), bytes};
}

// A launch begins when the one ahead of it has ended (chained.cuh has the other way).
struct InTurn {
  static constexpr bool kChained = false;
  template <class Epilogue, bool kOverRows, bool kAlongN>
  static constexpr auto loaded = product<Epilogue, kOverRows, kAlongN>;
};

template <class How, class... Args>
void launch_blocks(const char* name, void (*kernel)(Args...), const ProductLaunch& of,
                   Stream stream, const Args&... args) {
  if constexpr (How::kChained) {
    launch_as({.chained = true}, name, kernel, of.blocks, kProductThreads, of.bytes, stream,
              args...);
  } else {
    launch(name, kernel, of.blocks, kProductThreads, of.bytes, stream, args...);
  }
}

template <class Epilogue, bool kOverRows, bool kAlongN, class How = InTurn>
void launch_product(const char* name, const GemmChoice& choice, int64_t tiles, const CUtensorMap& a,
                    const CUtensorMap& b, ProductArgs args, const typename Epilogue::Args& to,
                    Stream stream) {
  const auto kernel = How::template loaded<Epilogue, kOverRows, kAlongN>;
  const ProductLaunch of = prepare(name, kernel, Epilogue::kColumns, choice, tiles, args);
  launch_blocks<How>(name, kernel, of, stream, a, b, args, to, note_launch(name));
}

// rows [R, depth] of each expert times its w: [E, width, depth], or [E, depth, width] when it lies
// along N.
struct RowProduct {
  const void* rows;
  const void* w;
  const int64_t* offsets;
  int64_t num_rows, depth, width, experts;
  bool along_n;
  DType dtype;

  // A tile has columns [i column_step, +128) of w, and 128 more from `second_half` on.
  ProductArgs args(int64_t column_tiles, int64_t column_step, int64_t second_half) const {
    return {
        .offsets = offsets,
        .token_of = nullptr,
        .rows = num_rows,
        .tokens = 0,
        .experts = static_cast<int32_t>(experts),
        .depth = static_cast<int32_t>(depth),
        .row_tiles = 0,
        .column_tiles = static_cast<int32_t>(column_tiles),
        .column_step = static_cast<int32_t>(column_step),
        .second_half = static_cast<int32_t>(second_half),
        .stages = 0,
        .band = 0,
        .skip_empty = true,
        .prefetch = false,
    };
  }

  template <class Epilogue, class How = InTurn>
  void run(const char* name, const GemmChoice& choice, int64_t column_tiles, int64_t column_step,
           int64_t second_half, const typename Epilogue::Args& to, Stream stream) const {
    if (num_rows == 0 || width == 0) return;
    const ProductArgs args = this->args(column_tiles, column_step, second_half);
    const int64_t tiles = row_tiles_bound(num_rows, experts, kTileRows) * column_tiles;
    const int promotion = order_of(choice).promotion;
    const CUtensorMap a = tensor_map(dtype, rows, {depth, num_rows}, kTileRows, promotion);
    if (along_n) {
      const CUtensorMap b = tensor_map(dtype, w, {width, depth, experts}, 64, promotion);
      launch_product<Epilogue, false, true, How>(name, choice, tiles, a, b, args, to, stream);
    } else {
      const CUtensorMap b = tensor_map(dtype, w, {depth, width, experts}, 128, promotion);
      launch_product<Epilogue, false, false, How>(name, choice, tiles, a, b, args, to, stream);
    }
  }
};

// A sum over rows, of 128 x 256 tiles: what every kernel of the weights' gradient takes.
struct RowSum {
  static constexpr int kColumns = 256;
  ProductArgs product;
  int64_t tiles;

  explicit RowSum(const GroupedWgradArgs& args)
      : product{.offsets = args.offsets,
                .token_of = args.token_of,
                .rows = args.num_rows,
                .tokens = args.tokens,
                .experts = static_cast<int32_t>(args.experts),
                .depth = 0,
                .row_tiles = static_cast<int32_t>(tile_count(args.m, kTileRows)),
                .column_tiles = static_cast<int32_t>(tile_count(args.n, kColumns)),
                .column_step = kColumns,
                .second_half = 128,
                .stages = 0,
                .band = 0,
                .skip_empty = args.accumulate,
                .prefetch = false},
        tiles(args.experts * product.row_tiles * product.column_tiles) {}

  static CUtensorMap a(const GroupedWgradArgs& args, int promotion) {
    return tensor_map(args.dtype, args.a, {args.m, args.num_rows}, 64, promotion);
  }
  static CUtensorMap b(const GroupedWgradArgs& args, int promotion) {
    return tensor_map(args.dtype, args.b, {args.n, args.num_rows}, 64, promotion);
  }
  // Of the fp32 gradient, by boxes.
  static CUtensorMap sums(const GroupedWgradArgs& args, int box_rows) {
    return tensor_map(DType::f32, args.dw, {args.n, args.m, args.experts}, box_rows, kNoPromotion);
  }
};

// out [R, width] = weight (rows w + bias), where `use` names the weights; grouped_gemm_sm90.cu
// holds the kernels.
void store_product(const char* name, const RowProduct& product, const GemmChoice& choice, void* out,
                   const void* bias, const RowUse& use, Stream stream);

}  // namespace moekernels::cuda::sm90
