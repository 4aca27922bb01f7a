// What the matrix products and their epilogues add to vec.h: partial vectors, loops over them,
// rounding of scalars.
#pragma once

#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moekernels::cpu::MOEKERNELS_ISA {

template <class S>
inline Vec<S> splat(S x) {
  return x - Vec<S>{};
}

template <class T>
inline T load_unaligned(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
inline void store_unaligned(void* p, T x) {
  std::memcpy(p, &x, sizeof x);
}

// Stores that pass the caches by, to memory aligned to the vector; `drain` before another thread
// may read.
#if defined(__x86_64__)
inline void stream(float* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  _mm_stream_ps(p, (__m128)x);
#endif
}
template <class T>
inline void stream(T* p, Vec<Wide<T>> x) {
  T some[kLanes<Wide<T>>];
  store(some, x);
  if constexpr (std::is_same_v<T, double>) {
    stream(reinterpret_cast<float*>(p), load_unaligned<Vec<float>>(some));
  } else {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_unaligned<__m256i>(some));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_unaligned<__m128i>(some));
#else
    _mm_stream_si64(reinterpret_cast<long long*>(p), load_unaligned<long long>(some));
#endif
  }
}
inline void drain() { _mm_sfence(); }
#else
template <class T>
inline void stream(T* p, Vec<Wide<T>> x) {
  store(p, x);
}
inline void drain() {}
#endif

// The first n lanes only: the others read as zero and are not written. n is a number, or
// WholeVector.
template <class T>
using WholeVector = std::integral_constant<int64_t, kLanes<Wide<T>>>;

template <class T, class N>
inline Vec<Wide<T>> load(const T* p, N n) {
  if constexpr (std::is_same_v<N, WholeVector<T>>) {
    return load(p);
  } else {
    return load_tail(p, n);
  }
}
template <class T, class N>
inline void store(T* p, Vec<Wide<T>> x, N n) {
  if constexpr (std::is_same_v<N, WholeVector<T>>) {
    store(p, x);
  } else {
    store_tail(p, x, n);
  }
}

// body(i, n): i steps over [0, count) by vectors of S; n is how many lanes count (all but at the
// end).
template <class S, class Body>
inline void for_vectors(int64_t count, const Body& body) {
  constexpr int64_t lanes = kLanes<S>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, std::integral_constant<int64_t, lanes>{});
  if (i < count) body(i, count - i);
}

template <class T>
inline Wide<T> to_wide(T x) {
  return load_tail(&x, 1)[0];
}
template <class T>
inline T from_wide(Wide<T> x) {
  T out;
  store_tail(&out, splat(x), 1);
  return out;
}

// Calls f with a value of the storage type.
template <class F>
inline void with_storage(DType dtype, const F& f) {
  with_type(dtype, [&]<class T>(T*) { f(T{}); });
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
