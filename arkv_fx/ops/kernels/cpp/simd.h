// Vectors of W floats through the compiler's vector extensions: one source for AVX2, AVX512, NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;  // two registers of four where vectors are 16 bytes
#endif

#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int8_t vi8 __attribute__((vector_size(W)));
typedef uint8_t vu8 __attribute__((vector_size(W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef int16_t vi16 __attribute__((vector_size(2 * W)));

constexpr float NEVER = -std::numeric_limits<float>::infinity();

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

INLINE vf spread(float x) { return x - vf{}; }
INLINE vf number(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf bits(vi x) { return (vf)x; }

INLINE float highest(vf x) {
  float top = x[0];
  for (int i = 1; i < W; i++) top = x[i] > top ? x[i] : top;
  return top;
}

INLINE float total(vf x) {
  float sum = 0;
  for (int i = 0; i < W; i++) sum += x[i];
  return sum;
}

// e^x to 2 ulp; below -87 it is exactly 0, so that hidden slots (-inf) get no probability.
INLINE vf exponential(vf x) {
  const vf low = spread(-87.0f), high = spread(88.0f);
  vi none = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = x * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi power = ((vi)shifted - (vi)magic + 127) << 23;
  return bits((vi)(p * bits(power)) & ~none);
}

INLINE vf tanh_of(vf x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

typedef float f8 __attribute__((vector_size(32)));

INLINE f8 fold(vf x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return x;
#endif
}

INLINE f8 pairs(f8 a, f8 b) {
  return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}

// The sums of eight vectors, in order, with seven additions.
INLINE f8 totals(const vf* x) {
  f8 a = pairs(fold(x[0]), fold(x[1])), b = pairs(fold(x[2]), fold(x[3]));
  f8 c = pairs(fold(x[4]), fold(x[5])), d = pairs(fold(x[6]), fold(x[7]));
  f8 ab = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
          __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  f8 cd = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13) +
          __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15);
}
