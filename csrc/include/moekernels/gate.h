// gate: from logits to weights, ids and the sums of the losses. See moekernels/ops/gate.py for the
// meaning.
#pragma once

#include "moekernels/common.h"
#include "moekernels/registers.h"

namespace moekernels {

// Sums over tokens are made chunk by chunk and then over chunks in order. A chunk is kGateChunk
// tokens of one segment at most, whatever the number of threads, so the bits do not depend on it.
inline constexpr int64_t kGateChunk = 64;

struct GateArgs {
  const void* logits;          // [T, E]
  const void* bias;            // [E] fp32 (fp64 for fp64) or null: moves the choice only
  const bool* valid;           // [T] or null
  const int64_t* offsets;      // [S+1] tokens or null; read on the device, the CPU reads the chunks
  const int64_t* chunk_begin;  // [C+1] tokens
  const int64_t* chunk_segment;  // [C], -1: tokens of no segment
  void* weights;                 // [T, K] fp32 (fp64 for fp64), as score_sum and z_sum
  int32_t* ids;                  // [T, K]
  double* chunk_scores;          // [C, E] scratch
  double* chunk_z;               // [C] scratch
  int64_t* chunk_counts;         // [C, E] scratch
  void* scratch;                 // gate_scratch_bytes() on the device, in place of the three above
  void* score_sum;               // [S, E]
  int64_t* counts;               // [S, E]
  void* z_sum;                   // [S]
  int64_t tokens, experts, top_k, chunks, segments;
  int64_t num_groups, groups_kept;
  double scale;
  DType dtype;  // of logits
  GateScore score;
  bool sum_two, renormalize;  // a group ranks by the sum of its two best, else by its best
};

struct GateBackwardArgs {
  const void* logits;          // [T, E]
  const int32_t* ids;          // [T, K], -1 for tokens that are not valid
  const void* dweights;        // [T, K] or null
  const void* dscore_sum;      // [S, E] or null
  const void* dz_sum;          // [S] or null
  const int64_t* offsets;      // [S+1] tokens or null; read on the device, the CPU reads the chunks
  const int64_t* chunk_begin;  // [C+1]
  const int64_t* chunk_segment;  // [C]
  void* dlogits;                 // [T, E]
  int64_t tokens, experts, top_k, segments;
  double scale;
  DType dtype;
  GateScore score;
  bool renormalize;
};

namespace cuda {
// What the device's gate takes.
inline constexpr int64_t kGateMostExperts = 4096, kGateMostTopK = 32;
int64_t gate_scratch_bytes(int64_t tokens, int64_t experts, int64_t segments);
void gate(const GateArgs& args, Stream stream);
void gate_backward(const GateBackwardArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(gate, const GateArgs& args, int64_t chunk_begin, int64_t chunk_end)
MOEKERNELS_CPU_KERNEL(gate_reduce, const GateArgs& args)
MOEKERNELS_CPU_KERNEL(gate_backward, const GateBackwardArgs& args, int64_t chunk_begin,
                      int64_t chunk_end)
