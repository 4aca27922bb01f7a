// attention: rotary positions and causal attention over packed segments, in one. See
// moekernels/ops/attention.py for the meaning.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

// A head of `width` is a query's, of `heads`, or a key's or a value's, of `kv_heads` each; queries
// come first in a token's row, keys behind them, values last.
struct AttentionArgs {
  const void* qkv;        // [T, heads + 2 kv_heads, width]
  const void* cos;        // [T, half] fp32 (fp64 for fp64): element i turns with i + half
  const void* sin;        // [T, half]
  const void* q_weight;   // [width]: queries, and keys, are normalised before they turn, or null
  const void* k_weight;   // [width], or null
  const int64_t* bounds;  // [S+1], ascending from 0 to T
  void* out;              // [T, heads, width]
  void* lse;              // [heads, T] fp32 (fp64): log of the sum of a query's exponentials
  int64_t tokens, segments, heads, kv_heads, width, half;
  double scale, eps;  // of the scores, beside the mean of squares
  DType dtype;
};

struct AttentionBackwardArgs {
  AttentionArgs of;  // with what the forward has written
  const void* dout;  // [T, heads, width]
  void* dqkv;        // [T, heads + 2 kv_heads, width]
  void* dweights;    // [items, 2, width] fp32 (fp64): of q_weight and k_weight, or null
};

}  // namespace moekernels

// Items are pairs of a segment and a key head: item i is segment i / kv_heads.
MOEKERNELS_CPU_KERNEL(attention, const AttentionArgs& args, int64_t item_begin, int64_t item_end)
MOEKERNELS_CPU_KERNEL(attention_backward, const AttentionBackwardArgs& args, int64_t item_begin,
                      int64_t item_end)
