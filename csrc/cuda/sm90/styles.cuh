// The styles of an epilogue that the table of tiles or the settings may name beside the direct one,
// and who launches them (csrc/cuda/*_styles_sm90.cu).
#pragma once

#include "moekernels/experts.h"
#include "run.cuh"

namespace moekernels::cuda::sm90 {

// Whether a launch goes in `style`, the one that its op has beside the direct one; fails where it
// is told of another.
inline bool takes(const char* name, const GemmChoice& choice, GemmStyle style) {
  const GemmOrder order = order_of(choice);
  const auto fail = [&](const std::string& text) {
    throw std::runtime_error(std::string(name) + ": " + text);
  };
  if (order.style == GemmStyle::direct && order.pair != GemmPair::none)
    fail("the direct style has no pairs of blocks");
  if (order.style != GemmStyle::direct && order.style != style) {
    fail(std::string("there is no style ") + kGemmStyles[static_cast<int>(order.style)] +
         (style == GemmStyle::direct
              ? ", only direct"
              : std::string(", only direct and ") + kGemmStyles[static_cast<int>(style)]));
  }
  return order.style == style;
}

// In a chain of launches, where the settings or the table say so: bf16, of the direct style.
inline bool in_chain(DType dtype) { return dtype == DType::bf16 && launches().chain; }
void experts_up_chained(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream);
void experts_dact_chained(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream);
void store_product_chained(const RowProduct& product, const GemmChoice& choice, void* out,
                           const void* bias, const RowUse& use, Stream stream);
void grouped_wgrad_chained(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream);
void experts_up_gathered_chained(const ExpertsUpArgs& args, const GemmChoice& choice,
                                 Stream stream);
void grouped_wgrad_gathered_chained(const GroupedWgradArgs& args, const GemmChoice& choice,
                                    Stream stream);

void experts_up_hidden(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream);
void experts_dact_pingpong(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream);
void store_product_hidden(const RowProduct& product, const GemmChoice& choice, void* out,
                          const void* bias, const RowUse& use, Stream stream);
// Added to sums alone.
void grouped_wgrad_pingpong(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream);

}  // namespace moekernels::cuda::sm90
