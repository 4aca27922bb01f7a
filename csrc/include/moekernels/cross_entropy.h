// cross_entropy: of logits over a shard of a vocabulary, in two passes between which the shards'
// sums are exchanged. See moekernels/ops/cross_entropy.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct CrossEntropyArgs {
  void* logits;           // [C, V]; exponentials behind the first pass, their gradient in the end
  const int64_t* labels;  // [C] in the whole vocabulary, negative: no loss
  int64_t first;          // the shard's first entry
  void* stats;            // [3, C]: largest logit, sum of the others than the label, label's logit
  const void* shards;     // [P, 3, C], the stats of all; second pass
  void* losses;           // [C]; second pass
  int64_t tokens, width, peers, rank;
  DType dtype;  // fp32 or fp64, of all but the labels
};

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(cross_entropy_sums, const CrossEntropyArgs& args, int64_t begin, int64_t end)
MOEKERNELS_CPU_KERNEL(cross_entropy_losses, const CrossEntropyArgs& args, int64_t begin,
                      int64_t end)
