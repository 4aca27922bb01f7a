// The weights' gradients of several microbatches on sm_90a, by one launch.
#include "sm90/run.cuh"
#include "sm90/segments.cuh"

namespace moekernels::cuda::sm90 {
namespace {

// A gradient of fewer rows an expert waits for DRAM, which brings and takes its sums; of more, one
// launch for four gains 2 % at most (docs/howto/predict.md).
constexpr int64_t kJoinBelow = 2048;

template <class T>
void wgrads(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  using Epilogue = AddGradient<T>;
  const char* name = "grouped_wgrad_segments_sm90";
  RowSum sum(args);
  const int promotion = order_of(choice).promotion;
  Segments segments{};
  const auto take = [&](const GroupedWgradArgs& of) {
    if (of.num_rows == 0) return;  // TMA knows no array without rows
    const int32_t i = segments.count++;
    segments.a[i] = RowSum::a(of, promotion);
    segments.b[i] = RowSum::b(of, promotion);
    segments.of[i] = {of.offsets, of.token_of, of.num_rows, of.tokens};
  };
  take(args);
  for (int64_t i = 0; i < args.more_count; ++i) take(args.with(args.more[i]));
  const auto kernel = product_of_segments<Epilogue>;
  const auto [blocks, bytes] =
      prepare(name, kernel, RowSum::kColumns, choice, sum.tiles, sum.product,
              segments_shared_bytes(segments.count, args.experts));
  launch(name, kernel, blocks, kProductThreads, bytes, stream, segments,
         sum.sums(args, Epilogue::kBoxRows), sum.product, args.dw, args.m, args.n,
         note_launch(name));
}

}  // namespace

bool joins(const GroupedWgradArgs& args, const GemmChoice& choice) {
  const GemmOrder order = order_of(choice);
  if (!order.bulk_sums || order.style != GemmStyle::direct || order.pair != GemmPair::none)
    return false;
  if (order.join >= 0) return order.join != 0;
  // Where rows are gathered, permuting them first would cost most of what one launch saves.
  if ((args.gather_a || args.gather_b) && gathers(args, choice)) return false;
  return args.num_rows < kJoinBelow * args.experts;
}

void grouped_wgrad_segments(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  args.dtype == DType::f16 ? wgrads<__half>(args, choice, stream)
                           : wgrads<__nv_bfloat16>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
