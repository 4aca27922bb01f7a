// A block is read twice, the second time from the first cache. Compiled once for each ISA level.
#include "moekernels/quantize.h"

#include <algorithm>

#include "simd.h"

namespace moekernels::cpu::MOEKERNELS_ISA {
namespace {

using Bytes = typename VecOf<uint8_t, kVectorBytes / 4>::type;

inline uint32_t max_lanes_of(const Uint& v) {
  return fold_lanes<uint32_t>(v, [](auto a, auto b) { return b > a ? b : a; });
}

struct Scaling {
  float scale, inverse;

  // Of a block by the bits of its largest magnitude, in which a NaN is more than an infinity.
  explicit Scaling(uint32_t bits) {
    const float amax = bits_as<float>(std::max(bits, bits_as<uint32_t>(kLeastAmax)));
    scale = amax / kMostE4m3;
    inverse = kMostE4m3 / amax;
  }
};

template <class T>
inline Uint magnitudes(const T* x, int64_t count, Uint largest) {
  for_vectors<float>(count, [&](int64_t i, auto n) {
    const Uint bits = bits_as<Uint>(load(x + i, n)) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  });
  return largest;
}

template <class T>
inline void convert(const T* x, int64_t count, float inverse, uint8_t* to) {
  for_vectors<float>(count, [&](int64_t i, auto n) {
    const Uint bits = bits_as<Uint>(load(x + i, n) * inverse);
    const Uint code =
        e4m3_of(bits, [](Uint a) { return bits_as<Uint>(bits_as<Float>(a) + 0x1p14f); });
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(to + i, &bytes, n);
  });
}

// One block of x, [rows, columns] within a matrix of `ld` columns.
template <class T>
inline void block(const T* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* to, int64_t ld_to,
                  bool transposed, float* scale) {
  Uint largest{};
  for (int64_t r = 0; r < rows; ++r) largest = magnitudes(x + r * ld, columns, largest);
  const Scaling scaling(max_lanes_of(largest));
  *scale = scaling.scale;
  if (!transposed) {
    for (int64_t r = 0; r < rows; ++r)
      convert(x + r * ld, columns, scaling.inverse, to + r * ld_to);
    return;
  }
  uint8_t turned[kScaleBlock][kScaleBlock];
  for (int64_t r = 0; r < rows; ++r) convert(x + r * ld, columns, scaling.inverse, turned[r]);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * ld_to + r] = turned[r][c];
  }
}

template <class T>
void quantize_runs(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const int64_t across = scale_blocks(args.columns), down = args.runs_of_matrix();
  for (int64_t run = begin; run < end; ++run) {
    const int64_t matrix = run / down, i = run % down, first = i * args.run();
    const int64_t rows = std::min(args.rows - first, args.run());
    const int64_t base = matrix * args.rows * args.columns;
    const T* x = static_cast<const T*>(args.x) + base + first * args.columns;
    for (int64_t j = 0; j < across; ++j) {
      const int64_t column = j * kScaleBlock;
      const int64_t columns = std::min(args.columns - column, kScaleBlock);
      const int64_t at =
          args.transposed ? column * args.rows + first : first * args.columns + column;
      const int64_t scale = args.transposed ? j * down + i : i * across + j;
      block(x + column, args.columns, rows, columns, args.values + base + at,
            args.transposed ? args.rows : args.columns, args.transposed,
            args.scales + matrix * across * down + scale);
    }
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, int64_t run_begin, int64_t run_end) {
  with_storage(args.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<Wide<T>, float>) quantize_runs<T>(args, run_begin, run_end);
  });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
