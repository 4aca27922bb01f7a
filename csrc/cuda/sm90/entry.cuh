// The launchers of the wgmma kernels (csrc/cuda/*_sm90.cu, built for sm_90a alone), called where
// choose_gemm gives GemmKernel::wgmma, with the tile and stages that it gives.
#pragma once

#include "moekernels/combine.h"
#include "moekernels/exchange.h"
#include "moekernels/experts.h"
#include "moekernels/gemm_choice.h"
#include "moekernels/grouped_gemm.h"
#include "moekernels/permute.h"
#include "moekernels/route.h"

namespace moekernels::cuda::sm90 {

#ifdef MOEKERNELS_SM90
inline constexpr bool kBuilt = true;
#else
inline constexpr bool kBuilt = false;
#endif

void grouped_gemm(const GroupedGemmArgs& args, const GemmChoice& choice, Stream stream);
void grouped_gemm_fp8(const GroupedGemmFp8Args& args, Stream stream);
void grouped_wgrad(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream);
void experts_up(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream);
void experts_down(const ExpertsDownArgs& args, const GemmChoice& choice, Stream stream);
void experts_dact(const ExpertsDActArgs& args, const GemmChoice& choice, Stream stream);

// The same over rows of an exchange, in bf16; csrc/cuda/exchange_sm90.cu.
void experts_up(const ExpertsUpArgs& args, const Arriving& from, const GemmChoice& choice,
                Stream stream);
void experts_dact(const ExpertsDActArgs& args, const Arriving& from, const GemmChoice& choice,
                  Stream stream);
void experts_down(const ExpertsDownArgs& args, const Going& home, const GemmChoice& choice,
                  Stream stream);
void grouped_gemm(const GroupedGemmArgs& args, const Going& home, const GemmChoice& choice,
                  Stream stream);

// x [tokens, H], seen through token_of by the kernels themselves where `gathers` says so.
bool gathers(const ExpertsUpArgs& args, const GemmChoice& choice);
bool gathers(const GroupedWgradArgs& args, const GemmChoice& choice);
void experts_up_gathered(const ExpertsUpArgs& args, const GemmChoice& choice, Stream stream);
void grouped_wgrad_gathered(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream);

// Rows of several microbatches, at most kMostSegments; csrc/cuda/segments_sm90.cu.
constexpr int kMostSegments = 4;
bool joins(const GroupedWgradArgs& args, const GemmChoice& choice);
void grouped_wgrad_segments(const GroupedWgradArgs& args, const GemmChoice& choice, Stream stream);

// In a chain of launches (chained.cuh); false: not done, as neither settings nor device ask for it.
bool permute(const PermuteArgs& args, Stream stream);
bool combine(const CombineArgs& args, Stream stream);
bool experts_dweights(const ExpertsDWeightsArgs& args, Stream stream);
// All choices by one launch of one cluster; false: they are too many, or as above.
bool route(const RouteArgs& args, Stream stream);

}  // namespace moekernels::cuda::sm90
