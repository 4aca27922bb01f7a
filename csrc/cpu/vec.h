// Explicit vectors of fp32 or fp64, loaded from and stored to any float dtype; each ISA level gets
// its own registers. Everything lives in the level's namespace, so that no copy built for one level
// is linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "moekernels/common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
// GCC 12 warns about its own AVX-512 headers (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace moekernels::cpu::MOEKERNELS_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
// What sums of T are kept in: fp32, fp64 for fp64.
template <class T>
using Wide = typename WideOf<T>::type;

template <class W>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(W));

template <class W, int bytes = kVectorBytes>
struct VecOf {
  typedef W type __attribute__((vector_size(bytes)));
};
template <class W>
using Vec = typename VecOf<W>::type;

using Float = Vec<float>;
using Int = Vec<int32_t>;
using Uint = Vec<uint32_t>;
using Half = typename VecOf<uint16_t, kVectorBytes / 2>::type;

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// --- load
inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Float load(const bf16* p) {
  Half h;
  std::memcpy(&h, p, sizeof(h));
  return bits_as<Float>(__builtin_convertvector(h, Uint) << 16);
}

#if defined(__AVX512F__)
inline Float load(const f16* p) {
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(f16* p, Float v) {
  __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
#elif defined(__F16C__)
inline Float load(const f16* p) {
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, Float v) {
  __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}
#else
inline Float load(const f16* p) {
  Half h;
  std::memcpy(&h, p, sizeof(h));
  const Uint u = __builtin_convertvector(h, Uint);
  // 2^112 moves the exponent's bias, and makes subnormals normal; infinity and NaN keep a full
  // exponent.
  const Float magnitude = bits_as<Float>((u & 0x7fff) << 13) * 0x1p112f;
  const Uint full = (Uint)((u & 0x7c00) == 0x7c00) & 0x7f800000;
  return bits_as<Float>(bits_as<Uint>(magnitude) | full | ((u & 0x8000) << 16));
}
inline void store(f16* p, Float v) {
  const Uint u = bits_as<Uint>(v), sign = (u >> 16) & 0x8000;
  const Uint a = u & 0x7fffffff;
  // Normal halves: round the 13 low bits to nearest even. Subnormal ones: the adder rounds at
  // 2^-24.
  const Uint normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  const Uint subnormal = bits_as<Uint>(bits_as<Float>(a) + 0.5f) - 0x3f000000;
  const Uint finite = a < 0x38800000 ? subnormal : normal;
  const Uint infinite = a > 0x7f800000 ? Uint{} + 0x7e00 : Uint{} + 0x7c00;
  const Half h = __builtin_convertvector(sign | (a >= 0x477ff000 ? infinite : finite), Half);
  std::memcpy(p, &h, sizeof(h));
}
#endif

// --- store, rounding to nearest even
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
// The upper halves of floats rounded to nearest even, in 32 bits each.
inline Uint bf16_bits(Float v) {
  const Uint u = bits_as<Uint>(v);
  const Uint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return v == v ? rounded : Uint{} + 0x7fc0;
}
inline void store(bf16* p, Float v) {
  const Half h = __builtin_convertvector(bf16_bits(v), Half);
  std::memcpy(p, &h, sizeof(h));
}

// What loading T after storing it gives, without the way through memory where T allows it.
template <class T>
inline Vec<Wide<T>> rounded_to(Vec<Wide<T>> v) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return v;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return bits_as<Float>(bf16_bits(v) << 16);
  } else {
    T some[kLanes<Wide<T>>];
    store(some, v);
    return load(some);
  }
}

// The last n < lanes elements; what is past them is `fill` on loading and left alone on storing.
template <class T>
inline Vec<Wide<T>> load_tail(const T* p, int64_t n, Wide<T> fill = 0) {
  T some[kLanes<Wide<T>>] = {};
  std::memcpy(some, p, n * sizeof(T));
  Vec<Wide<T>> v = load(some);
  for (int64_t i = n; i < kLanes<Wide<T>>; ++i) v[i] = fill;
  return v;
}
template <class T>
inline void store_tail(T* p, Vec<Wide<T>> v, int64_t n) {
  T some[kLanes<Wide<T>>];
  store(some, v);
  std::memcpy(p, some, n * sizeof(T));
}

// join(low half, high half) until one lane is left: always in the same order.
template <class W, int bytes = kVectorBytes, class Join>
inline W fold_lanes(const typename VecOf<W, bytes>::type& v, const Join& join) {
  if constexpr (bytes == 2 * sizeof(W)) {
    return join(v[0], v[1]);
  } else {
    typename VecOf<W, bytes / 2>::type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return fold_lanes<W, bytes / 2>(join(low, high), join);
  }
}
template <class W>
inline W sum_lanes(const Vec<W>& v) {
  return fold_lanes<W>(v, [](auto a, auto b) { return a + b; });
}
template <class W>
inline W max_lanes(const Vec<W>& v) {
  return fold_lanes<W>(v, [](auto a, auto b) { return b > a ? b : a; });
}

// Calls f with a null pointer of the type that `dtype` names.
template <class F>
inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
  }
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
