// grouped_gemm's wgrad on sm_90a in ping-pong, added to fp32 by L2.
#include "sm90/run.cuh"
#include "sm90/styles.cuh"
#include "sm90/sums_in_turn.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T>
void add(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  using Epilogue = AddGradientInTurn<T>;
  const char* name = "grouped_wgrad_add_pingpong_sm90";
  const GemmOrder order = order_of(choice);
  const bool along_m = order.pair == GemmPair::m, along_n = order.pair == GemmPair::n;
  const int64_t blocks = along_m || along_n ? 2 : 1;
  ProductArgs product = RowSum(args).product;
  product.row_tiles = static_cast<int32_t>(tile_count(args.m, kTileRows * (along_m ? 2 : 1)));
  product.column_tiles = static_cast<int32_t>(tile_count(args.n, Epilogue::kColumns));
  const auto shared_bytes = [](int stages, int64_t experts) {
    return int64_t{pingpong_layout(stages, static_cast<int>(experts)).bytes};
  };
  set_stages(product, name, Epilogue::kColumns, stages_of(choice, GemmStyle::pingpong),
             shared_bytes);
  product.band = order.band;
  product.prefetch = order.prefetch;
  const int64_t tiles =
      args.experts * product.row_tiles * tile_count(product.column_tiles, along_n ? 2 : 1);
  const int64_t clusters = std::min(tiles, std::max<int64_t>(order.grid / blocks, 1));
  const int64_t bytes = shared_bytes(product.stages, args.experts);
  const auto kernel = pingpong_product_into_sums<Epilogue>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
  launch_clusters(name, kernel, clusters, static_cast<int>(blocks), kProductThreads, bytes, stream,
                  RowSum::a(args, order.promotion), RowSum::b(args, order.promotion),
                  RowSum::sums(args, Epilogue::kBoxRows), product, order.pair, args.dw, args.m,
                  args.n, note_launch(name));
}

}  // namespace

void grouped_wgrad_pingpong(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.dtype == DType::f16 ? add<__half>(args, choice, stream)
                           : add<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
