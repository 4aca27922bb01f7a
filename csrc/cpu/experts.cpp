// Compiled once for each ISA level. The products are gemm.cpp's; here is what happens to their
// blocks while they are hot.
#include "moekernels/experts.h"

#include "activation.h"
#include "epilogue.h"
#include "gemm.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

constexpr int64_t kColumns =
    256;  // of C at a time: as many of F for dact, half as many gated for up

struct Shape {
  int64_t gates;  // 2 gated, 1 not
  int64_t width;  // G = gates * F
};
Shape shape_of(const ExpertsArgs& args) {
  const int64_t gates = is_gated(args.activation) ? 2 : 1;
  return {gates, gates * args.ffn};
}

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

inline bool is_used(const ExpertsArgs& args, int64_t row) {
  return args.token_of == nullptr || (args.token_of[row] >= 0 && args.token_of[row] < args.tokens);
}

// Gate and up apart, whatever their layout in h.
template <class S>
struct Halves {
  alignas(64) S gate[kColumns];
  alignas(64) S up[kColumns];
};

// h[j..] (+ bias) rounded to T, written to `keep` where h is kept, and left in `out`.
template <class T, class S = Wide<T>>
inline void round_row(const S* c, const T* bias, T* keep, S* out, int64_t count) {
  for_vectors<S>(count, [&](int64_t j, auto n) {
    Vec<S> x = load(c + j, n);
    if (bias != nullptr) x = x + load(bias + j, n);
    T rounded[kLanes<S>];
    store(rounded, x);
    store(out + j, load(rounded), n);
    if (keep != nullptr) store(keep + j, x, n);
  });
}

template <class T>
void up(const ExpertsUpArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const Shape shape = shape_of(of);
  const Engine& engine = engine_for(of.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const auto extent = [&](int64_t e) {
    return Extent{.m = of.offsets[e + 1] - of.offsets[e], .n = of.ffn, .k = of.hidden};
  };
  for_blocks(engine, of.experts, kColumns / shape.gates, of.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = of.offsets[e], rows = block.m1 - block.m0, columns = block.n1 - block.n0;
    const int64_t ldc = shape.gates * columns;
    S* c = static_cast<S*>(workspace.block(engine, rows * ldc));
    const Operand a = rows_of(of, of.x, first, of.hidden, of.token_of != nullptr);
    const Operand b = weights_of(of, of.w1, e, shape.width, of.hidden, true);
    const bool apart = shape.gates == 2 && !of.interleaved;  // gate and up columns lie F apart
    const auto product = [&](int64_t n0, int64_t count, S* to) {
      workspace.multiply(engine, a, b, {block.m0, block.m1, n0, n0 + count}, of.hidden, to, ldc,
                         Store::set);
    };
    if (apart) {
      product(block.n0, columns, c);
      product(of.ffn + block.n0, columns, c + columns);
    } else {
      product(shape.gates * block.n0, ldc, c);
    }
    const T* bias = of.b1 ? row_at<T>(of.b1, e, shape.width) : nullptr;
    with_activation(of.activation, [&](auto kind) {
      Halves<S> halves{};
      alignas(64) S both[kColumns];
      for (int64_t n0 = block.n0; n0 < block.n1; n0 += kColumns / shape.gates) {
        const int64_t count = std::min(block.n1 - n0, kColumns / shape.gates);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = first + block.m0 + r;
          T* h = args.h ? row_at<T>(args.h, row, shape.width) : nullptr;
          const S* gate = c + r * ldc + (apart ? 1 : shape.gates) * (n0 - block.n0);
          const auto round = [&](const S* from, int64_t column, S* out, int64_t width) {
            round_row<T>(from, bias ? bias + column : nullptr, h ? h + column : nullptr, out,
                         width);
          };
          if (shape.gates == 1 || apart) {
            round(gate, n0, halves.gate, count);
            if (apart) round(gate + columns, of.ffn + n0, halves.up, count);
          } else {
            round(gate, 2 * n0, both, 2 * count);
            for (int64_t j = 0; j < count; ++j) {
              halves.gate[j] = both[2 * j];
              halves.up[j] = both[2 * j + 1];
            }
          }
          if (args.a == nullptr) continue;
          T* out = row_at<T>(args.a, row, of.ffn) + n0;
          for_vectors<S>(count, [&](int64_t j, auto n) {
            store(out + j,
                  activate<decltype(kind)::value, Math<S>>(
                      load(halves.gate + j), load(halves.up + j), S(of.alpha), S(of.limit))
                      .a,
                  n);
          });
        }
      }
    });
  });
}

template <class T>
void down(const ExpertsDownArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const Engine& engine = engine_for(of.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const auto extent = [&](int64_t e) {
    return Extent{.m = of.offsets[e + 1] - of.offsets[e], .n = of.hidden, .k = of.ffn};
  };
  for_blocks(engine, of.experts, kColumns, of.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = of.offsets[e], rows = block.m1 - block.m0, columns = block.n1 - block.n0;
    S* c = static_cast<S*>(workspace.block(engine, rows * columns));
    const Operand a = rows_of(of, args.a, first, of.ffn, false);
    workspace.multiply(engine, a, weights_of(of, of.w2, e, of.hidden, of.ffn, true), block, of.ffn,
                       c, columns, Store::set);
    const T* bias = of.b2 ? row_at<T>(of.b2, e, of.hidden) + block.n0 : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + block.m0 + r;
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

template <class T>
void dact(const ExpertsDActArgs& args, int64_t worker, int64_t workers) {
  using S = Wide<T>;
  const ExpertsArgs& of = args.of;
  const Shape shape = shape_of(of);
  const Engine& engine = engine_for(of.dtype);
  Workspace& workspace = Workspace::mine();
  workspace.reset();
  const int64_t parts = experts_dweights_parts(of.ffn);
  const auto extent = [&](int64_t e) {
    return Extent{.m = of.offsets[e + 1] - of.offsets[e], .n = of.ffn, .k = of.hidden};
  };
  for_blocks(engine, of.experts, kColumns, !of.transposed, worker, workers, extent,
             [&](int64_t e, const Block& block) {
    const int64_t first = of.offsets[e], rows = block.m1 - block.m0, columns = block.n1 - block.n0;
    S* c = static_cast<S*>(workspace.block(engine, rows * columns));
    const Operand a = rows_of(of, args.dy, first, of.hidden, false);
    workspace.multiply(engine, a, weights_of(of, of.w2, e, of.hidden, of.ffn, false), block,
                       of.hidden, c, columns, Store::set);
    const bool interleaved = shape.gates == 2 && of.interleaved;
    const int64_t parts_a_block = ceil_div(columns, kColumns);
    with_activation(of.activation, [&](auto kind) {
      Halves<S> in{}, out{};
      for (int64_t at = 0; at < rows * parts_a_block; ++at) {
        const int64_t r = at % rows, n0 = block.n0 + at / rows * kColumns,
                      count = std::min(block.n1 - n0, kColumns);
        const int64_t row = first + block.m0 + r;
        const T* h = row_at<T>(args.h, row, shape.width) + (interleaved ? 2 : 1) * n0;
        T* dh = row_at<T>(args.dh, row, shape.width) + (interleaved ? 2 : 1) * n0;
        if (interleaved) {
          for (int64_t j = 0; j < count; ++j) {
            in.gate[j] = to_wide(h[2 * j]);
            in.up[j] = to_wide(h[2 * j + 1]);
          }
        }
        const S weight = of.weights ? static_cast<const S*>(of.weights)[row] : S(1);
        T* weighted = args.weighted_a ? row_at<T>(args.weighted_a, row, of.ffn) + n0 : nullptr;
        const S* da_row = c + r * columns + n0 - block.n0;
        Vec<S> dot{};
        for_vectors<S>(count, [&](int64_t j, auto n) {
          const Vec<S> g = interleaved ? load(in.gate + j, n) : load(h + j, n);
          Vec<S> u{};
          if (shape.gates == 2) u = interleaved ? load(in.up + j, n) : load(h + of.ffn + j, n);
          const Vec<S> da = load(da_row + j, n);
          const auto act = activate<decltype(kind)::value, Math<S>>(g, u, S(of.alpha), S(of.limit));
          dot = dot + da * act.a;
          const Vec<S> dg = da * weight * act.by_gate, du = da * weight * act.by_up;
          if (interleaved) {
            store(out.gate + j, dg, n);
            store(out.up + j, du, n);
          } else {
            store(dh + j, dg, n);
            if (shape.gates == 2) store(dh + of.ffn + j, du, n);
          }
          if (weighted != nullptr) store(weighted + j, weight * act.a, n);
        });
        if (interleaved) {
          for (int64_t j = 0; j < count; ++j) {
            dh[2 * j] = from_wide<T>(out.gate[j]);
            dh[2 * j + 1] = from_wide<T>(out.up[j]);
          }
        }
        if (args.dweights_parts != nullptr) {
          static_cast<S*>(args.dweights_parts)[row * parts + n0 / kColumns] = sum_lanes<S>(dot);
        }
      }
    });
  });
  zero_tail(args.dh, shape.width * size_of(of.dtype), of.offsets[of.experts], of.num_rows, worker,
            workers);
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
  const ExpertsArgs& of = args.of;
  const int64_t column_begin = args.width * worker / workers,
                columns = args.width * (worker + 1) / workers - column_begin;
  for (int64_t e = 0; e < of.experts; ++e) {
    for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
      const int64_t count = std::min(kColumns, columns - j0), column = column_begin + j0;
      alignas(64) S sum[kColumns] = {};
      for (int64_t row = of.offsets[e]; row < of.offsets[e + 1]; ++row) {
        if (!is_used(of, row)) continue;
        const S weight = of.weights ? static_cast<const S*>(of.weights)[row] : S(1);
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
    zero_tail(args.h, shape_of(args.of).width * size_of(args.of.dtype),
              args.of.offsets[args.of.experts], args.of.num_rows, worker, workers);
  }
}

void experts_down(const ExpertsDownArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { down<T>(args, worker, workers); });
}

void experts_dact(const ExpertsDActArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { dact<T>(args, worker, workers); });
}

void experts_dweights(const ExpertsDWeightsArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { dweights<T>(args, worker, workers); });
}

void experts_dbias(const ExpertsDBiasArgs& args, int64_t worker, int64_t workers) {
  with_storage(args.of.dtype, [&]<class T>(T) { dbias<T>(args, worker, workers); });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
