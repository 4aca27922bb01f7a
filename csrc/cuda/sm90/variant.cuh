// Launches the variants of the row products that the table of tiles or the settings may name:
// hidden epilogues, ping-pong, and pairs of blocks.
#pragma once

#include "hidden.cuh"
#include "pingpong.cuh"
#include "run.cuh"
#include "styles.cuh"

namespace moekernels::cuda::sm90 {

// What a style's kernels need.
template <class Store>
struct HiddenStyle {
  using Epilogue = Hidden<Store>;
  static constexpr GemmStyle kStyle = GemmStyle::hidden;
  static int64_t shared_bytes(int stages, int64_t experts) {
    return hidden_layout(stages, static_cast<int>(experts)).bytes;
  }
  template <bool kAlongN>
  static constexpr auto kernel = hidden_product<Epilogue, kAlongN>;
};
template <class Store>
struct PingpongStyle {
  using Epilogue = Store;
  static constexpr GemmStyle kStyle = GemmStyle::pingpong;
  static int64_t shared_bytes(int stages, int64_t experts) {
    return pingpong_layout(stages, static_cast<int>(experts)).bytes;
  }
  template <bool kAlongN>
  static constexpr auto kernel = pingpong_product<Epilogue, kAlongN>;
};

template <class Style, bool kAlongN>
void launch_variant(const char* name, const RowProduct& of, ProductArgs args,
                    const GemmOrder& order, const typename Style::Epilogue::Args& to,
                    Stream stream) {
  constexpr int kColumns = Style::Epilogue::kColumns;
  const bool along_n = order.pair == GemmPair::n, along_m = order.pair == GemmPair::m;
  const int64_t blocks = along_n || along_m ? 2 : 1;
  const CUtensorMap a = tensor_map(of.dtype, of.rows, {of.depth, of.num_rows},
                                   lines_of_a(order.pair), order.promotion);
  const int lines = lines_of_b(kColumns, kAlongN);
  const CUtensorMap b =
      kAlongN
          ? tensor_map(of.dtype, of.w, {of.width, of.depth, of.experts}, lines, order.promotion)
          : tensor_map(of.dtype, of.w, {of.depth, of.width, of.experts}, lines, order.promotion);
  const int64_t tiles = row_tiles_bound(of.num_rows, of.experts, kTileRows * (along_m ? 2 : 1)) *
                        tile_count(args.column_tiles, along_n ? 2 : 1);
  const int64_t clusters = std::min(tiles, std::max<int64_t>(order.grid / blocks, 1));
  const int64_t bytes = Style::shared_bytes(args.stages, args.experts);
  const auto kernel = Style::template kernel<kAlongN>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
  launch_clusters(name, kernel, clusters, static_cast<int>(blocks), kProductThreads, bytes, stream,
                  a, b, args, order.pair, to, note_launch(name));
}

// As RowProduct::run, in a style of its own.
template <class Style>
void run_variant(const char* name, const RowProduct& of, const GemmChoice& choice,
                 int64_t column_tiles, int64_t column_step, int64_t second_half,
                 const typename Style::Epilogue::Args& to, Stream stream) {
  if (of.num_rows == 0 || of.width == 0) return;
  const GemmOrder order = order_of(choice);
  ProductArgs args = of.args(column_tiles, column_step, second_half);
  set_stages(args, name, Style::Epilogue::kColumns, stages_of(choice, Style::kStyle),
             [](int stages, int64_t experts) { return Style::shared_bytes(stages, experts); });
  args.band = order.band;
  args.prefetch = order.prefetch;
  of.along_n ? launch_variant<Style, true>(name, of, args, order, to, stream)
             : launch_variant<Style, false>(name, of, args, order, to, stream);
}

}  // namespace moekernels::cuda::sm90
