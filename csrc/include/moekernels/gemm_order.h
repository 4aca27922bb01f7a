// How a launch of a wgmma product walks its tiles and loads them, in numbers: what the settings of
// this process ask, else what its row of the table of tiles says, else what holds for every shape.
#pragma once

#include "moekernels/gemm_choice.h"
#include "moekernels/sm90.h"

namespace moekernels::cuda::sm90 {

inline GemmOrder order_of(const GemmChoice& choice, const Settings& asked, int multiprocessors) {
  const auto either = [](int setting, int entry, int none) {
    return setting != 0 ? setting : entry != 0 ? entry : none;
  };
  return {either(asked.band, choice.order.band, kTileBand),
          either(asked.grid, choice.order.grid, multiprocessors),
          either(asked.promotion, choice.order.promotion, 256),
          asked.prefetch >= 0 ? asked.prefetch != 0 : choice.order.prefetch,
          asked.bulk_sums >= 0 ? asked.bulk_sums != 0 : choice.order.bulk_sums,
          asked.style >= 0 ? static_cast<GemmStyle>(asked.style) : choice.order.style,
          asked.pair >= 0 ? static_cast<GemmPair>(asked.pair) : choice.order.pair,
          asked.gather >= 0 ? asked.gather : choice.order.gather,
          asked.join >= 0 ? asked.join : choice.order.join};
}

inline LaunchOrder launch_order_of(const Settings& asked) {
  return {asked.chain >= 0 ? asked.chain != 0 : kLaunchOrder.chain,
          asked.route_at_once >= 0 ? asked.route_at_once != 0 : kLaunchOrder.route_at_once};
}

}  // namespace moekernels::cuda::sm90
