// Bound by memory: a row is read from there once, and again from the first cache. Compiled once for
// each ISA level.
#include "moekernels/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

template <class T>
void rows(const RmsNormArgs& args, int64_t row_begin, int64_t row_end) {
  using W = Wide<T>;
  const int64_t hidden = args.hidden;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * hidden;
    const T* row = x;
    Vec<W> squares{};
    if (args.added != nullptr) {
      const T* added = static_cast<const T*>(args.added) + r * hidden;
      T* sum = static_cast<T*>(args.sum) + r * hidden;
      for_vectors<W>(hidden, [&](int64_t j, auto n) {
        store(sum + j, load(x + j, n) + load(added + j, n), n);
        const Vec<W> v = load(sum + j, n);  // as it is kept
        squares = squares + v * v;
      });
      row = sum;
    } else {
      for_vectors<W>(hidden, [&](int64_t j, auto n) {
        const Vec<W> v = load(x + j, n);
        squares = squares + v * v;
      });
    }
    const W mean = sum_lanes<W>(squares) / static_cast<W>(hidden);
    const W rstd = 1 / std::sqrt(mean + static_cast<W>(args.eps));
    static_cast<W*>(args.rstd)[r] = rstd;
    T* y = static_cast<T*>(args.y) + r * hidden;
    for_vectors<W>(hidden, [&](int64_t j, auto n) {
      store(y + j, load(row + j, n) * rstd * load(weight + j, n), n);
    });
  }
}

template <class T>
void backward_row(const RmsNormBackwardArgs& args, int64_t r, Wide<T>* part) {
  using W = Wide<T>;
  const int64_t hidden = args.hidden;
  const T* weight = static_cast<const T*>(args.weight);
  const T* x = static_cast<const T*>(args.x) + r * hidden;
  const T* dy = static_cast<const T*>(args.dy) + r * hidden;
  const T* dsum = args.dsum ? static_cast<const T*>(args.dsum) + r * hidden : nullptr;
  T* dx = static_cast<T*>(args.dx) + r * hidden;
  const W rstd = static_cast<const W*>(args.rstd)[r];
  Vec<W> dot{};
  for_vectors<W>(hidden, [&](int64_t j, auto n) {
    const Vec<W> product = load(dy + j, n) * (load(x + j, n) * rstd);
    store(part + j, load(part + j, n) + product, n);
    dot = dot + product * load(weight + j, n);
  });
  const W mean = sum_lanes<W>(dot) / static_cast<W>(hidden);
  for_vectors<W>(hidden, [&](int64_t j, auto n) {
    const Vec<W> hat = load(x + j, n) * rstd;
    Vec<W> d = (load(dy + j, n) * load(weight + j, n) - hat * mean) * rstd;
    if (dsum != nullptr) d = d + load(dsum + j, n);
    store(dx + j, d, n);
  });
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int64_t row_begin, int64_t row_end) {
  with_storage(args.dtype, [&]<class T>(T) { rows<T>(args, row_begin, row_end); });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, int64_t piece_begin, int64_t piece_end) {
  with_storage(args.dtype, [&]<class T>(T) {
    for (int64_t piece = piece_begin; piece < piece_end; ++piece) {
      Wide<T>* part = static_cast<Wide<T>*>(args.parts) + piece * args.hidden;
      for (int64_t j = 0; j < args.hidden; ++j) part[j] = 0;
      const int64_t end = std::min(args.num_rows, (piece + 1) * kRmsNormPiece);
      for (int64_t r = piece * kRmsNormPiece; r < end; ++r) backward_row<T>(args, r, part);
    }
  });
}

void rms_norm_dweight(const RmsNormBackwardArgs& args, int64_t column_begin, int64_t column_end) {
  with_storage(args.dtype, [&]<class T>(T) {
    using W = Wide<T>;
    const int64_t pieces = rms_norm_pieces(args.num_rows);
    const W* parts = static_cast<const W*>(args.parts) + column_begin;
    T* dweight = static_cast<T*>(args.dweight) + column_begin;
    for_vectors<W>(column_end - column_begin, [&](int64_t j, auto n) {
      Vec<W> total{};
      for (int64_t i = 0; i < pieces; ++i) total = total + load(parts + i * args.hidden + j, n);
      store(dweight + j, total, n);
    });
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
