// The tuned tiles, first fit wins. Predicted from the H200's arithmetic (132 SMs, 227 KiB of shared
// memory, 64-row groups of 4 warps for wgmma), not measured: no GPU has run them yet. What
// bench/tune.py measures goes above them.
#pragma once

#include <cstdint>

namespace moekernels {

// forward: grouped_gemm; up, down: the halves of the FFN; dgrad: grouped_gemm with the orientation
// turned; dact: down's dgrad with the activation's derivative; wgrad: the weights' gradient.
enum class GemmOp : int { forward, up, down, dgrad, dact, wgrad };

// mma: mma.sync of 16-bit inputs (sm_80 and later); fma: fp32 inputs by fma or tf32 mma; wgmma:
// sm_90a with TMA.
enum class GemmKernel : int { mma, fma, wgmma };

constexpr unsigned gemm_op_bit(GemmOp op) { return 1u << static_cast<int>(op); }
constexpr unsigned kEveryGemm = 63;

// How the epilogue of a wgmma product goes: direct by the consumers, before their next tile; hidden
// by warps of their own beside it (row products but dact); pingpong by each of two consumers
// while the other multiplies (dact, and wgrad that L2 adds to sums, in tiles of 128 x 128).
enum class GemmStyle : int { direct, hidden, pingpong };
inline constexpr const char* kGemmStyles[] = {"direct", "hidden", "pingpong"};

// Two blocks of a cluster share what their tiles both read: neighbours along N the rows, along M
// the weights. Not in the direct style.
enum class GemmPair : int { none, n, m };
inline constexpr const char* kGemmPairs[] = {"none", "n", "m"};

// How a wgmma product walks its tiles, loads, adds and stores them; no bit of a result depends on
// it. 0: as the launcher's arithmetic says, and moekernels/sm90.h what the numbers mean.
struct GemmOrder {
  int band = 0, grid = 0, promotion = 0;
  bool prefetch = true, bulk_sums = true;
  GemmStyle style = GemmStyle::direct;
  GemmPair pair = GemmPair::none;
  int gather = -1, join = -1;
};

// How the launches of a layer follow one another; no bit of a result depends on it. chain: each
// begins before the one ahead has ended and waits for it on the device, where its kernel can
// (sm_90: products of bf16 in the direct style, and what moves and sums rows). route_at_once: one
// launch routes as many choices as one cluster takes.
struct LaunchOrder {
  bool chain, route_at_once;
};
// Where no setting says otherwise. Neither has run on a GPU; bench/tune.py measures both.
constexpr LaunchOrder kLaunchOrder = {false, false};

struct GemmTuned {
  GemmKernel kernel;
  unsigned ops;  // of gemm_op_bit
  int64_t least_rows_an_expert, least_m, least_n;
  int tile_m, tile_n, tile_k, stages;
  GemmOrder order;
  const char* reason;
  int64_t most_k = INT64_MAX;  // the longer its sums, the less an epilogue counts
};

// The products that write their rows as they are: they have a second tile.
constexpr unsigned kRowGemm =
    gemm_op_bit(GemmOp::forward) | gemm_op_bit(GemmOp::dgrad) | gemm_op_bit(GemmOp::down);

// clang-format off
inline constexpr GemmTuned kGemmTuned[] = {
    // measured: begin
    // measured: end
    {GemmKernel::wgmma, gemm_op_bit(GemmOp::dact), 512, 0, 256, 128, 128, 64, 6,
     {0, 0, 0, true, true, GemmStyle::pingpong, GemmPair::n},
     "predicted 10 to 18 % above direct, more than the prediction's error of 7 %", 2048},
    {GemmKernel::wgmma, gemm_op_bit(GemmOp::up), 2048, 0, 8192, 128, 256, 64, 3,
     {0, 0, 0, true, true, GemmStyle::hidden, GemmPair::n},
     "predicted 8 % above direct, more than the prediction's error of 7 %", 2048},
    {GemmKernel::wgmma, kEveryGemm, 0, 0, 129, 128, 256, 64, 4, {},
     "the largest tile of two warpgroups: 48 KiB from L2 for 1024 cycles of tensor core"},
    {GemmKernel::wgmma, kRowGemm, 0, 0, 0, 128, 128, 64, 6, {},
     "at most 128 columns: a tile that holds no more"},
    {GemmKernel::wgmma, kEveryGemm, 0, 0, 0, 128, 256, 64, 4, {},
     "the one tile that this epilogue has"},
    {GemmKernel::mma, kEveryGemm, 65, 65, 65, 128, 128, 32, 3, {},
     "more than 64 rows an expert: the large tile"},
    {GemmKernel::mma, kEveryGemm, 0, 0, 0, 64, 64, 32, 3, {},
     "few rows an expert: the small tile wastes less"},
};
// clang-format on

}  // namespace moekernels
