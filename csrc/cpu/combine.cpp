// Bound by memory: every row is read once, the sum of a token stays in registers. Compiled once for
// each ISA level.
#include "moekernels/combine.h"

#include "vec.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int kUnroll = 4;

inline bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}

template <class T, bool weighted>
void combine_tokens(const CombineArgs& args, int64_t token_begin, int64_t token_end) {
  using W = Wide<T>;
  constexpr int64_t lanes = kLanes<W>, block = kUnroll * lanes;
  const T* rows = static_cast<const T*>(args.rows);
  const int64_t hidden = args.hidden, top_k = args.top_k;
  for (int64_t t = token_begin; t < token_end; ++t) {
    const int32_t* row_of = args.row_of + t * top_k;
    const W* weights = static_cast<const W*>(args.weights) + (weighted ? t * top_k : 0);
    T* out = static_cast<T*>(args.out) + t * hidden;
    int64_t h = 0;
    for (; h + block <= hidden; h += block) {
      Vec<W> total[kUnroll] = {};
      for (int64_t k = 0; k < top_k; ++k) {
        if (!inside(row_of[k], args.num_rows)) continue;
        const T* row = rows + row_of[k] * hidden + h;
        for (int u = 0; u < kUnroll; ++u) {
          const Vec<W> part = load(row + u * lanes);
          total[u] += weighted ? part * weights[k] : part;
        }
      }
      for (int u = 0; u < kUnroll; ++u) store(out + h + u * lanes, total[u]);
    }
    for (; h < hidden; h += lanes) {
      const int64_t n = hidden - h;
      Vec<W> total = {};
      for (int64_t k = 0; k < top_k; ++k) {
        if (!inside(row_of[k], args.num_rows)) continue;
        const T* row = rows + row_of[k] * hidden + h;
        const Vec<W> part = n >= lanes ? load(row) : load_tail(row, n);
        total += weighted ? part * weights[k] : part;
      }
      n >= lanes ? store(out + h, total) : store_tail(out + h, total, n);
    }
  }
}

// drow = weight * dout and dweight = <dout, row>, in one pass over both.
template <class T>
Wide<T> scale_and_dot(const T* dout, const T* row, Wide<T> weight, T* drow, int64_t hidden) {
  using W = Wide<T>;
  constexpr int64_t lanes = kLanes<W>, block = kUnroll * lanes;
  Vec<W> dots[kUnroll] = {};
  int64_t h = 0;
  for (; h + block <= hidden; h += block) {
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = h + u * lanes;
      const Vec<W> d = load(dout + i);
      dots[u] += d * load(row + i);
      if (drow != nullptr) store(drow + i, d * weight);
    }
  }
  for (; h < hidden; h += lanes) {
    const int64_t n = hidden - h;
    const Vec<W> d = n >= lanes ? load(dout + h) : load_tail(dout + h, n);
    dots[0] += d * (n >= lanes ? load(row + h) : load_tail(row + h, n));
    if (drow == nullptr) continue;
    n >= lanes ? store(drow + h, d * weight) : store_tail(drow + h, d * weight, n);
  }
  return sum_lanes<W>((dots[0] + dots[1]) + (dots[2] + dots[3]));
}

template <class T>
void backward_tokens(const CombineBackwardArgs& args, int64_t token_begin, int64_t token_end) {
  using W = Wide<T>;
  const int64_t hidden = args.hidden, top_k = args.top_k;
  for (int64_t t = token_begin; t < token_end; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = t * top_k + k, r = args.row_of[slot];
      W dweight = 0;
      if (inside(r, args.num_rows)) {
        // Only the token that the row names writes it: no two threads can, whatever row_of holds.
        T* drow = args.token_of[r] == t ? static_cast<T*>(args.drows) + r * hidden : nullptr;
        dweight = scale_and_dot(static_cast<const T*>(args.dout) + t * hidden,
                                static_cast<const T*>(args.rows) + r * hidden,
                                static_cast<const W*>(args.weights)[slot], drow, hidden);
      }
      static_cast<W*>(args.dweights)[slot] = dweight;
    }
  }
}

}  // namespace

void combine(const CombineArgs& args, int64_t token_begin, int64_t token_end) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.weights != nullptr) {
      combine_tokens<T, true>(args, token_begin, token_end);
    } else {
      combine_tokens<T, false>(args, token_begin, token_end);
    }
  });
}

void combine_backward(const CombineBackwardArgs& args, int64_t token_begin, int64_t token_end) {
  with_type(args.dtype, [&](auto* type) {
    backward_tokens<std::remove_pointer_t<decltype(type)>>(args, token_begin, token_end);
  });
}

void combine_clear(const CombineBackwardArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t row_bytes = args.hidden * size_of(args.dtype);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t t = args.token_of[r];
    bool claimed = false;
    if (inside(t, args.tokens)) {
      for (int64_t k = 0; k < args.top_k; ++k) claimed |= args.row_of[t * args.top_k + k] == r;
    }
    if (!claimed) std::memset(static_cast<char*>(args.drows) + r * row_bytes, 0, row_bytes);
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
