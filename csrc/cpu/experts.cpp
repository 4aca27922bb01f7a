// Compiled once for each ISA level. The products are gemm.cpp's; here is what happens to their
// blocks while they are hot.
#include "moekernels/experts.h"

#include "activation.h"
#include "epilogue.h"
#include "gemm.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

// Columns of C at a time, as the blocks of a product are cut: as many of F for dact, half as many
// where each has a gate and an up.
constexpr int64_t kColumns = 256;
static_assert(kColumns % kDWeightsColumns == 0, "a block of dact holds whole parts of <da, a>");

// How h [G] lies: gate and up alternate (interleaved), or all of up follows all of gate, or there
// is no up.
struct HLayout {
  bool gated, interleaved;
  int64_t ffn;

  explicit HLayout(const ExpertsArgs& args)
      : gated(is_gated(args.activation)), interleaved(gated && args.interleaved), ffn(args.ffn) {}
  int64_t gates() const { return gated ? 2 : 1; }
  int64_t width() const { return gates() * ffn; }
  // Where the gate of F's column j lies in a row.
  int64_t at(int64_t j) const { return interleaved ? 2 * j : j; }
};

template <class T>
inline const T* row_at(const void* data, int64_t row, int64_t width) {
  return static_cast<const T*>(data) + row * width;
}
template <class T>
inline T* row_at(void* data, int64_t row, int64_t width) {
  return static_cast<T*>(data) + row * width;
}

inline Operand weights_of(const ExpertsArgs& args, const void* w, int64_t expert, int64_t out,
                          int64_t in, bool k_is_in) {
  // Stored [out, in], transposed [in, out]; the product sums over `in` or over `out`.
  return {.data = static_cast<const char*>(w) + expert * out * in * size_of(args.dtype),
          .ld = args.transposed ? out : in,
          .k_contiguous = args.transposed != k_is_in};
}

// The rows of one expert, [rows, width], unused ones reading as zeros.
inline Operand rows_of(const ExpertsArgs& args, const void* data, int64_t first, int64_t width,
                       bool gather) {
  return {
      .data = static_cast<const char*>(data) + (gather ? 0 : first * width * size_of(args.dtype)),
      .ld = width,
      .k_contiguous = true,
      .token_of = args.token_of ? args.token_of + first : nullptr,
      .tokens = args.tokens,
      .gather = gather};
}

template <class Args>
inline bool is_used(const Args& args, int64_t row) {
  return args.token_of == nullptr || (args.token_of[row] >= 0 && args.token_of[row] < args.tokens);
}

// Columns of gate and of up, apart.
template <class S>
struct Halves {
  alignas(64) S gate[kColumns];
  alignas(64) S up[kColumns];
};

template <class T, class S = Wide<T>>
inline void split(const T* pairs, Halves<S>& halves, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    halves.gate[j] = to_wide(pairs[2 * j]);
    halves.up[j] = to_wide(pairs[2 * j + 1]);
  }
}
template <class T, class S = Wide<T>>
inline void join(const Halves<S>& halves, T* pairs, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    pairs[2 * j] = from_wide<T>(halves.gate[j]);
    pairs[2 * j + 1] = from_wide<T>(halves.up[j]);
  }
}

template <class T, class S = Wide<T>>
inline void widen(const T* from, int64_t count, S* to) {
  for_vectors<S>(count, [&](int64_t j, auto n) { store(to + j, load(from + j, n), n); });
}

// The block of h's product in C: gate and up as they lie in h, or, where they lie far apart there,
// side by side, each `columns` wide.
template <class S>
struct UpBlock {
  S* c;
  int64_t ldc, first, columns;  // F's columns [first, first + columns)

  const S* gate(const HLayout& layout, int64_t row, int64_t j) const {
    return c + row * ldc + layout.at(j - first);
  }
};

// A row's columns [j, j + count) of F: h (+ bias), rounded to T and written where it is kept, and
// the activation of what was rounded, where it is wanted.
template <Activation kind, class T, class S = Wide<T>>
inline void finish_h(const ExpertsArgs& of, const HLayout& layout, const UpBlock<S>& block,
                     int64_t row, int64_t j, int64_t count, const T* bias, T* h, T* a) {
  const auto round = [&](const S* from, int64_t column, auto n) {
    Vec<S> x = load(from, n);
    if (bias != nullptr) x = x + load(bias + column, n);
    if (h != nullptr) store(h + column, x, n);
    return rounded_to<T>(x);
  };
  const auto finish = [&](Vec<S> gate, Vec<S> up, int64_t i, auto n) {
    if (a != nullptr)
      store(a + i, activate<kind, Math<S>>(gate, up, S(of.alpha), S(of.limit)).a, n);
  };
  const S* gate = block.gate(layout, row, j);
  if (!layout.interleaved) {
    for_vectors<S>(count, [&](int64_t i, auto n) {
      const Vec<S> g = round(gate + i, j + i, n);
      Vec<S> u{};
      if constexpr (is_gated(kind)) u = round(gate + block.columns + i, layout.ffn + j + i, n);
      finish(g, u, j + i, n);
    });
    return;
  }
  alignas(64) S pairs[kColumns];
  for_vectors<S>(2 * count,
                 [&](int64_t i, auto n) { store(pairs + i, round(gate + i, 2 * j + i, n), n); });
  Halves<S> halves{};
  split<S>(pairs, halves, count);
  for_vectors<S>(count, [&](int64_t i, auto n) {
    finish(load(halves.gate + i), load(halves.up + i), j + i, n);
  });
}

template <class T>
void up(const ExpertsUpArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const HLayout layout(of);
  const Engine& engine = engine_for(of.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const auto extent = [&](int64_t e) {
    return Extent{.m = of.offsets[e + 1] - of.offsets[e], .n = of.ffn, .k = of.hidden};
  };
  const int64_t slice = kColumns / layout.gates();
  for_blocks(engine, of.experts, slice, of.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = of.offsets[e], columns = block.n1 - block.n0;
    const int64_t ldc = layout.gates() * columns;
    S* c = static_cast<S*>(workspace.block(engine, (block.m1 - block.m0) * ldc));
    const Operand a = rows_of(of, of.x, first, of.hidden, of.token_of != nullptr);
    const Operand b = weights_of(of, of.w1, e, layout.width(), of.hidden, true);
    const auto multiply = [&](int64_t n0, int64_t count, S* to) {
      workspace.multiply(engine, {.a = a,
                                  .b = b,
                                  .block = {block.m0, block.m1, n0, n0 + count},
                                  .depth = of.hidden,
                                  .c = to,
                                  .ldc = ldc});
    };
    if (layout.gated && !layout.interleaved) {
      multiply(block.n0, columns, c);
      multiply(of.ffn + block.n0, columns, c + columns);
    } else {
      multiply(layout.at(block.n0), ldc, c);
    }
    const UpBlock<S> product{.c = c, .ldc = ldc, .first = block.n0, .columns = columns};
    const T* bias = of.b1 ? row_at<T>(of.b1, e, layout.width()) : nullptr;
    with_activation(of.activation, [&](auto kind) {
      for (int64_t j = block.n0; j < block.n1; j += slice) {
        const int64_t count = std::min(block.n1 - j, slice);
        for (int64_t r = 0; r < block.m1 - block.m0; ++r) {
          const int64_t row = first + block.m0 + r;
          T* h = args.h ? row_at<T>(args.h, row, layout.width()) : nullptr;
          T* a = args.a ? row_at<T>(args.a, row, of.ffn) : nullptr;
          finish_h<decltype(kind)::value, T>(of, layout, product, r, j, count, bias, h, a);
        }
      }
    });
  });
}

template <class T>
void act(const ExpertsActArgs& args, int64_t row_begin, int64_t row_end) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const HLayout layout(of);
  const int64_t slice = kColumns / layout.gates();
  with_activation(of.activation, [&](auto kind) {
    alignas(64) S wide[kColumns];
    for (int64_t row = row_begin; row < row_end; ++row) {
      const T* h = row_at<T>(args.h, row, layout.width());
      for (int64_t j = 0; j < of.ffn; j += slice) {
        const int64_t count = std::min(of.ffn - j, slice);
        const int64_t gates = layout.interleaved ? 2 * count : count;
        widen(h + layout.at(j), gates, wide);
        if (layout.gated && !layout.interleaved) widen(h + of.ffn + j, count, wide + count);
        const UpBlock<S> block{.c = wide, .ldc = 0, .first = j, .columns = count};
        finish_h<decltype(kind)::value, T>(of, layout, block, 0, j, count, nullptr, nullptr,
                                           row_at<T>(args.a, row, of.ffn));
      }
    }
  });
}

// Rows through w2, summed over F, or else over H, or as they are in `product`: f(expert, block, C
// of it, [rows, columns]) while the block is hot.
template <class T, class S, class F>
void through_w2(const ExpertsArgs& of, const void* rows, const void* product, bool over_ffn,
                int64_t worker, int64_t workers, const F& f) {
  const Engine& engine = engine_for(of.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const int64_t n = over_ffn ? of.hidden : of.ffn, k = over_ffn ? of.ffn : of.hidden;
  const auto extent = [&](int64_t e) {
    return Extent{.m = of.offsets[e + 1] - of.offsets[e], .n = n, .k = k};
  };
  for_blocks(engine, of.experts, kColumns, over_ffn == of.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    S* c = static_cast<S*>(workspace.block(engine, block.rows() * block.columns()));
    if (product != nullptr) {
      for (int64_t r = 0; r < block.rows(); ++r) {
        widen(row_at<T>(product, of.offsets[e] + block.m0 + r, n) + block.n0, block.columns(),
              c + r * block.columns());
      }
      return f(e, block, c);
    }
    workspace.multiply(engine, {.a = rows_of(of, rows, of.offsets[e], k, false),
                                .b = weights_of(of, of.w2, e, of.hidden, of.ffn, over_ffn),
                                .block = block,
                                .depth = k,
                                .c = c,
                                .ldc = block.columns()});
    f(e, block, c);
  });
}

template <class T>
void down(const ExpertsDownArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  through_w2<T, S>(of, args.a, nullptr, true, worker, workers,
                   [&](int64_t e, const Block& block, const S* c) {
    const int64_t columns = block.columns();
    const T* bias = of.b2 ? row_at<T>(of.b2, e, of.hidden) + block.n0 : nullptr;
    for (int64_t r = 0; r < block.rows(); ++r) {
      const int64_t row = of.offsets[e] + block.m0 + r;
      T* y = row_at<T>(args.y, row, of.hidden) + block.n0;
      const bool used = is_used(of, row);
      const S weight = of.weights ? static_cast<const S*>(of.weights)[row] : S(1);
      for_vectors<S>(columns, [&](int64_t j, auto n) {
        Vec<S> x = load(c + r * columns + j, n);
        if (bias != nullptr) x = x + load(bias + j, n);
        store(y + j, used ? x * weight : Vec<S>{}, n);
      });
    }
  });
  zero_tail(args.y, of.hidden * size_of(of.dtype), of.offsets[of.experts], of.num_rows, worker,
            workers);
}

// From da [count], gate and up of h, which may be dh's own memory: dh, the weighted activation
// where it is wanted, and <da, a>. P is T, or its wide type where gate and up were split.
template <Activation kind, class T, class P, class S = Wide<T>>
inline S activation_backward(const ExpertsArgs& of, const S* da_row, S weight, const P* gate,
                             const P* up, P* dgate, P* dup, T* weighted_a, int64_t count) {
  Vec<S> dot{};
  for_vectors<S>(count, [&](int64_t j, auto n) {
    Vec<S> u{};
    if constexpr (is_gated(kind)) u = load(up + j, n);
    const Vec<S> da = load(da_row + j, n);
    const auto act = activate<kind, Math<S>>(load(gate + j, n), u, S(of.alpha), S(of.limit));
    dot = dot + da * act.a;
    const Vec<S> dg = da * weight * act.by_gate, du = da * weight * act.by_up;
    store(dgate + j, dg, n);
    if constexpr (is_gated(kind)) store(dup + j, du, n);
    if (weighted_a != nullptr) store(weighted_a + j, weight * act.a, n);
  });
  return sum_lanes<S>(dot);
}

template <class T>
void dact(const ExpertsDActArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const HLayout layout(of);
  const int64_t parts = experts_dweights_parts(of.ffn);
  through_w2<T, S>(of, args.dy, args.da, false, worker, workers,
                   [&](int64_t e, const Block& block, S* c) {
    with_activation(of.activation, [&](auto kind) {
      Halves<S> in{}, out{};
      for (int64_t j = block.n0; j < block.n1; j += kDWeightsColumns) {
        const int64_t count = std::min(block.n1 - j, kDWeightsColumns);
        for (int64_t r = 0; r < block.rows(); ++r) {
          const int64_t row = of.offsets[e] + block.m0 + r;
          const T* h = row_at<T>(args.h, row, layout.width()) + layout.at(j);
          T* dh = row_at<T>(args.dh, row, layout.width()) + layout.at(j);
          const S weight = of.weights ? static_cast<const S*>(of.weights)[row] : S(1);
          T* weighted_a = args.weighted_a ? row_at<T>(args.weighted_a, row, of.ffn) + j : nullptr;
          const S* da = c + r * block.columns() + j - block.n0;
          const auto backward = [&](const auto* gate, const auto* up, auto* dgate, auto* dup) {
            return activation_backward<decltype(kind)::value, T>(of, da, weight, gate, up, dgate,
                                                                 dup, weighted_a, count);
          };
          S dot;
          if (layout.interleaved) {
            split<T>(h, in, count);
            dot = backward(in.gate, in.up, out.gate, out.up);
            join<T>(out, dh, count);
          } else {
            dot = backward(h, h + of.ffn, dh, dh + of.ffn);
          }
          if (args.dweights_parts != nullptr) {
            static_cast<S*>(args.dweights_parts)[row * parts + j / kDWeightsColumns] = dot;
          }
        }
      }
    });
  });
  const int64_t used = of.offsets[of.experts];
  zero_tail(args.dh, layout.width() * size_of(of.dtype), used, of.num_rows, worker, workers);
  if (args.weighted_a != nullptr) {
    zero_tail(args.weighted_a, of.ffn * size_of(of.dtype), used, of.num_rows, worker, workers);
  }
}

template <class T>
void dweights(const ExpertsDWeightsArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const int64_t parts = experts_dweights_parts(of.ffn);
  const int64_t begin = of.num_rows * worker / workers, end = of.num_rows * (worker + 1) / workers;
  int64_t expert = 0;
  for (int64_t row = begin; row < end; ++row) {
    while (expert < of.experts && row >= of.offsets[expert + 1]) ++expert;
    S total = 0;
    if (expert < of.experts && row >= of.offsets[0] && is_used(of, row)) {
      const S* part = static_cast<const S*>(args.dweights_parts) + row * parts;
      for (int64_t i = 0; i < parts; ++i) total += part[i];
      if (of.b2 != nullptr) {
        const T* dy = row_at<T>(args.dy, row, of.hidden);
        const T* bias = row_at<T>(of.b2, expert, of.hidden);
        Vec<S> dot{};
        for_vectors<S>(of.hidden,
                       [&](int64_t j, auto n) { dot = dot + load(dy + j, n) * load(bias + j, n); });
        total += sum_lanes<S>(dot);
      }
    }
    static_cast<S*>(args.dweights)[row] = total;
  }
}

template <class T>
void dbias(const ExpertsDBiasArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const int64_t column_begin = args.width * worker / workers,
                columns = args.width * (worker + 1) / workers - column_begin;
  for (int64_t e = 0; e < args.experts; ++e) {
    for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
      const int64_t count = std::min(kColumns, columns - j0), column = column_begin + j0;
      alignas(64) S sum[kColumns] = {};
      for (int64_t row = args.offsets[e]; row < args.offsets[e + 1]; ++row) {
        if (!is_used(args, row)) continue;
        const S weight = args.weights ? static_cast<const S*>(args.weights)[row] : S(1);
        const T* from = row_at<T>(args.rows, row, args.width) + column;
        for_vectors<S>(count, [&](int64_t j, auto n) {
          store(sum + j, load(sum + j) + weight * load(from + j, n));
        });
      }
      if (args.accumulate) {
        S* out = row_at<S>(args.out, e, args.width) + column;
        for_vectors<S>(
            count, [&](int64_t j, auto n) { store(out + j, load(out + j, n) + load(sum + j), n); });
      } else {
        T* out = row_at<T>(args.out, e, args.width) + column;
        for_vectors<S>(count, [&](int64_t j, auto n) { store(out + j, load(sum + j), n); });
      }
    }
  }
}

}  // namespace

void experts_up(const ExpertsUpArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { up<T>(args, worker, workers); });
  if (args.h != nullptr) {
    zero_tail(args.h, HLayout(args.of).width() * size_of(args.of.dtype),
              args.of.offsets[args.of.experts], args.of.num_rows, worker, workers);
  }
}

void experts_down(const ExpertsDownArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { down<T>(args, worker, workers); });
}

void experts_dact(const ExpertsDActArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { dact<T>(args, worker, workers); });
}

void experts_act(const ExpertsActArgs& args, int64_t row_begin, int64_t row_end) {
  with_storage(args.of.dtype, [&]<class T>(T) { act<T>(args, row_begin, row_end); });
}

void experts_dweights(const ExpertsDWeightsArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { dweights<T>(args, worker, workers); });
}

void experts_dbias(const ExpertsDBiasArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.dtype, [&]<class T>(T) { dbias<T>(args, worker, workers); });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
