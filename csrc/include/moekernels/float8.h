// e4m3, the 8-bit float of products in FP8: a sign, 4 bits of exponent, 3 of mantissa; no infinity,
// 0x7f and 0xff are NaN, 448 is the largest. Blocks of 128 share a scale.
#pragma once

#include "moekernels/common.h"

namespace moekernels {

inline constexpr int64_t kScaleBlock =
    128;  // of rows and columns; sums are promoted behind as many
inline constexpr int64_t kProductStep = 32;  // products that are added before they are rounded
inline constexpr float kMostE4m3 = 448.0f;
// Of a block's largest magnitude: scales and their inverses are normal numbers.
inline constexpr float kLeastAmax = 0x1.cp-118f;  // 448 * 2^-126

MOEKERNELS_BOTH constexpr int64_t scale_blocks(int64_t n) {
  return (n + kScaleBlock - 1) / kScaleBlock;
}

// The e4m3 of a float, given by its bits, to nearest even; what is larger than 448 becomes that.
// U: uint32_t, or a vector of them; `grid(magnitude)` has the bits of magnitude + 2^14, whose last
// place is that of e4m3's subnormal numbers.
template <class U, class Grid>
MOEKERNELS_BOTH inline U e4m3_of(U bits, const Grid& grid) {
  const U sign = (bits >> 24) & 0x80, exact = bits & 0x7fffffff;
  const U a = exact > 0x43e00000 ? U{} + 0x43e00000 : exact;
  const U normal = (a - 0x3c000000 + 0x7ffff + ((a >> 20) & 1)) >> 20;
  const U subnormal = grid(a) - 0x46800000;
  const U finite = a < 0x3c800000 ? subnormal : normal;
  return exact > 0x7f800000 ? U{} + 0x7f : sign | finite;
}

}  // namespace moekernels
