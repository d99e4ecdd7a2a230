// Vectors of W floats through the compiler's vector extensions: one source for AVX2, AVX512, NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512BW__)
constexpr int W = 16, REGISTERS = 32;
#else
constexpr int W = 8, REGISTERS = 16;  // two registers of four where vectors are 16 bytes
#endif

#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(4 * W)));
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction left
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// For what is read once and in order, tens of rows before it is needed: the processor itself reads
// ahead to the end of a page of 4 KiB only. A little at a time; a burst of these is slower than none.
INLINE void ahead(const void* p) { __builtin_prefetch((const char*)p + 2048); }

template <class V>
INLINE V load(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof(V));
  return x;
}

template <class V>
INLINE void store(void* p, V x) {
  std::memcpy(p, &x, sizeof(V));
}

#include "x86.h"

INLINE vf spread(float x) { return x - vf{}; }

// The first n of W elements, zeros behind.
template <class V, class T>
INLINE V load_some(const T* p, int64_t n) {
  if (n >= W) return load<V>(p);
  T held[W] = {};
  for (int64_t i = 0; i < n; i++) held[i] = p[i];
  return load<V>(held);
}

// The first n of W elements.
template <class V, class T>
INLINE void store_some(T* p, V x, int64_t n) {
  if (n >= W) return store(p, x);  // a copy of unknown length is a call
  std::memcpy(p, &x, n * sizeof(T));
}

template <class T>
INLINE vi widen_some(const T* p, int64_t n) {
  if (n >= W) return widen(p);
  T held[W] = {};
  for (int64_t i = 0; i < n; i++) held[i] = p[i];
  return widen(held);
}

INLINE vf number(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf bits(vi x) { return (vf)x; }

// To the nearest integer, |x| < 2^22.
INLINE vi rounded(vf x) { return (vi)(x + ROUNDER) - (vi)(vf{} + ROUNDER); }

INLINE vf larger(vf x, vf y) { return y > x ? y : x; }

// Before arrays become registers: GCC would otherwise keep them in memory.
#define UNROLL _Pragma("GCC unroll 16")
#define EACH UNROLL for (int i = 0; i < N; i++)

// e^x for x <= 88 to 2 ulp, of N vectors side by side: one alone would wait for itself. Below -87
// it is exactly 0, so that hidden slots (-inf) get no probability.
template <int N>
INLINE void exponential(vf* x) {
  const vf low = spread(-87.0f);
  vi some[N], power[N];
  vf r[N], square[N], p[N];
  EACH some[i] = x[i] >= low;
  EACH x[i] = larger(low, x[i]);
  EACH r[i] = x[i] * 1.44269504f + ROUNDER;
  EACH power[i] = (vi)r[i] << 23;  // what is to be added to an exponent
  EACH r[i] -= ROUNDER;
  EACH x[i] -= r[i] * 0.693359375f;
  EACH r[i] = x[i] + r[i] * 2.12194440e-4f;
  EACH square[i] = r[i] * r[i];
  EACH p[i] = r[i] * 1.9875691500e-4f + 1.3981999507e-3f;
  EACH x[i] = r[i] * 8.3334519073e-3f + 4.1665795894e-2f;
  EACH p[i] = p[i] * square[i] + x[i];
  EACH x[i] = r[i] * 1.6666665459e-1f + 5.0000001201e-1f;
  EACH p[i] = p[i] * square[i] + x[i];
  EACH p[i] = p[i] * square[i] + (r[i] + 1.0f);
  EACH x[i] = bits(((vi)p[i] + power[i]) & some[i]);
}

INLINE vf tanh_of(vf x) {
  vf e = x + x;
  e = e < 80.0f ? e : spread(80.0f);
  exponential<1>(&e);
  return 1.0f - 2.0f / (e + 1.0f);
}

typedef float f8 __attribute__((vector_size(32)));

#if defined(__AVX512BW__)
#define HALVES(x)                                             \
  __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),      \
      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15)
template <class F> INLINE f8 fold(vf x, F f) { return f(HALVES(x)); }
#else
template <class V, class F> INLINE V fold(V x, F) { return x; }
#endif

// Each of eight vectors reduced to one number by f, in order.
template <class V, class F>
INLINE auto reduce(const V* x, F f) {
  auto pairs = [f](auto a, auto b) {
    return f(__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14),
             __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15));
  };
  auto fours = [f](auto a, auto b) {
    return f(__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13),
             __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  };
  auto ab = fours(pairs(fold(x[0], f), fold(x[1], f)), pairs(fold(x[2], f), fold(x[3], f)));
  auto cd = fours(pairs(fold(x[4], f), fold(x[5], f)), pairs(fold(x[6], f), fold(x[7], f)));
  return f(__builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11),
           __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15));
}

template <class V>
INLINE auto sums(const V* x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}
INLINE f8 highest(const vf* x) {
  return reduce(x, [](auto a, auto b) { return b > a ? b : a; });
}

// Each of W vectors reduced to its sum, in order.
#if defined(__AVX512BW__)
template <class V>
INLINE V all_sums(const V* x) {
  typedef int64_t vl __attribute__((vector_size(4 * W)));
#define JOIN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  V y[8], z[4];  // sums within quarters of the vectors
  UNROLL for (int i = 0; i < 8; i++) {
    const V a = x[2 * i], b = x[2 * i + 1];
    y[i] = JOIN(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           JOIN(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const vl a = (vl)y[2 * i], b = (vl)y[2 * i + 1];
    z[i] = (V)JOIN(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + (V)JOIN(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  UNROLL for (int i = 0; i < 2; i++) {  // then halves, then quarters
    const V a = z[2 * i], b = z[2 * i + 1];
    z[i] = JOIN(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           JOIN(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  return JOIN(z[0], z[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         JOIN(z[0], z[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#undef JOIN
}
#else
template <class V>
INLINE V all_sums(const V* x) {
  return sums(x);
}
#endif

INLINE vf numbers(vf x) { return x; }
INLINE vf numbers(vi x) { return number(x); }
