// The products of sm_90a that gather the rows of x as they load them: the experts' first, and the
// gradient of its weights.
#include "sm90/entry.cuh"
#include "sm90/gathered.cuh"
#include "sm90/styles.cuh"

namespace moekernels::cuda::sm90 {
namespace {

// Copies of 16 bytes cost a product about 6 % of its time, permuting the rows before it the time of
// moving them twice: what is more depends on the columns that each row meets.
constexpr int64_t kGatherBelow = 4096;

bool gathers(const GemmChoice& choice, int64_t columns) {
  const GemmOrder order = order_of(choice);
  const Settings& asked = settings();
  const bool style_asked = asked.style > 0 || asked.pair > 0;
  if (asked.gather >= 0 && !style_asked) return asked.gather != 0;  // before a style of the table
  if (order.style != GemmStyle::direct || order.pair != GemmPair::none) return false;
  return order.gather >= 0 ? order.gather != 0 : columns < kGatherBelow;
}

}  // namespace

bool gathers(const ExpertsUpArgs& args, const GemmChoice& choice) {
  return gathers(choice, (args.of.activation <= Activation::swiglu_clamped ? 2 : 1) * args.of.ffn);
}

bool gathers(const GroupedWgradArgs& args, const GemmChoice& choice) {
  if (args.accumulate && !order_of(choice).bulk_sums) return false;  // threads add permuted rows
  return gathers(choice, args.gather_b ? args.m : args.n);
}

void experts_up_gathered(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream) {
  if (in_chain(args.of.dtype)) return experts_up_gathered_chained(args, choice, stream);
  args.of.dtype == DType::f16 ? up_gathered<__half, GatherInTurn>(args, choice, stream)
                              : up_gathered<__nv_bfloat16, GatherInTurn>(args, choice, stream);
}

void grouped_wgrad_gathered(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream) {
  if (in_chain(args.dtype)) return grouped_wgrad_gathered_chained(args, choice, stream);
  args.dtype == DType::f16 ? wgrad_gathered<__half, GatherInTurn>(args, choice, stream)
                           : wgrad_gathered<__nv_bfloat16, GatherInTurn>(args, choice, stream);
}

}  // namespace moekernels::cuda::sm90
