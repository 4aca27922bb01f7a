// Products of e4m3 operands on sm_90a.
#include "moekernels/grouped_gemm.h"

#include "sm90/entry.cuh"
#include "sm90/fp8.cuh"
#include "sm90/run.cuh"
#include "sm90/styles.cuh"

namespace moekernels::cuda::sm90 {
namespace {

template <class T>
void store_as(const GroupedGemmFp8Args& args, Stream stream) {
  const char* name = "grouped_gemm_fp8_sm90";
  // No row of the table is for 8 bits: what the settings ask, else as many stages as there is room.
  const GemmChoice choice{GemmKernel::wgmma, kTileRows,       kFp8Columns, kLine,
                          kMostStages,       "the only tile", nullptr};
  takes(name, choice, GemmStyle::direct);
  const RowProduct product{.rows = args.rows,
                           .w = args.w,
                           .offsets = args.offsets,
                           .num_rows = args.num_rows,
                           .depth = args.in,
                           .width = args.out_width,
                           .experts = args.experts,
                           .along_n = false,
                           .dtype = args.dtype};
  const int64_t column_tiles = tile_count(args.out_width, kFp8Columns);
  ProductArgs of = product.args(column_tiles, kFp8Columns, 0);
  const int promotion = order_of(choice).promotion;
  const CUtensorMap a = byte_map(args.rows, {args.in, args.num_rows}, kTileRows, promotion);
  const CUtensorMap b =
      byte_map(args.w, {args.in, args.out_width, args.experts}, kFp8Columns, promotion);
  const auto kernel = fp8_product<T>;
  const int64_t tiles = row_tiles_bound(args.num_rows, args.experts, kTileRows) * column_tiles;
  const auto [blocks, bytes] = prepare(name, kernel, kFp8Columns, choice, tiles, of);
  const BlockScales scales{args.row_scales, args.w_scales,
                           static_cast<int32_t>(scale_blocks(args.in))};
  const typename StoreRows<T, kFp8Columns>::Args to{static_cast<T*>(args.out),
                                                    static_cast<const T*>(args.bias),
                                                    args.out_width,
                                                    {args.token_of, args.weights, args.tokens}};
  launch(name, kernel, blocks, kProductThreads, bytes, stream, a, b, of, scales, to,
         note_launch(name));
}

}  // namespace

void grouped_gemm_fp8(const GroupedGemmFp8Args& args, Stream stream) {
  args.dtype == DType::f16 ? store_as<__half>(args, stream) : store_as<__nv_bfloat16>(args, stream);
}

}  // namespace moekernels::cuda::sm90
