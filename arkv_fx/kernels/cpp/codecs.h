// Stored numbers to floats: `Row` types read W elements of a row; packed codes become bytes first.
#pragma once
#include "simd.h"
#include "traits.h"

#include <utility>

struct F32Row {
  typedef float T;
  static INLINE vf floats(const T* p) { return load<vf>(p); }
};

struct BF16Row {
  typedef uint16_t T;
  static INLINE vf floats(const T* p) { return bits(widen(p) << 16); }
};

struct F16Row {
  typedef int16_t T;
  // The bits of a half moved to those of a float make the number times 2^-112.
  static INLINE vf floats(const T* p) {
    return bits((widen(p) << 13) & (int32_t)0x8fffe000) * 0x1p112f;
  }
};

// Numbers times 2^-120, as for halves; undoing it for every element would cost a multiplication,
// so queries and weights are lifted by `LIFT` and the rest goes into the scale.
constexpr float LIFT = 0x1p96f, FP8_UNIT = 0x1p120f;

struct FP8Row {
  typedef int8_t T;
  static INLINE vf floats(const T* p) { return bits((widen(p) << 20) & (int32_t)0x87f00000); }
};

struct ByteRow {  // int8, and unpacked int4 and int3
  typedef int8_t T;
  static INLINE vf floats(const T* p) { return number(widen(p)); }
};

template <class R>
INLINE vf row_at(const char* p) {
  return R::floats((const typename R::T*)p);
}

// What is left of a row, n <= W elements, and zeros behind.
template <class R>
INLINE vf row_end(const char* p, int64_t n) {
  typename R::T held[W] = {};
  std::memcpy(held, p, n * sizeof(held[0]));
  return R::floats(held);
}

// The first n of W elements.
template <class R>
INLINE vf row_some(const char* p, int64_t n) {
  return n >= W ? row_at<R>(p) : row_end<R>(p, n);
}

// Elements from j on of a row in one of the models' own formats that has D of them.
INLINE vf plain_some(int64_t codec, const char* row, int64_t j, int64_t D) {
  return codec == F32 ? row_some<F32Row>(row + 4 * j, D - j)
         : codec == BF16 ? row_some<BF16Row>(row + 2 * j, D - j)
                         : row_some<F16Row>(row + 2 * j, D - j);
}

// Bytes of the codes of D elements.
inline int64_t width(int64_t codec, int64_t D) { return D * TRAITS[codec].bits / 8; }

// Whether there are codes and not numbers; whether they are packed, with a zero.
inline bool scaled(int64_t codec) { return TRAITS[codec].top != 0; }
inline bool rotated(int64_t codec) { return TRAITS[codec].bits < 8; }
inline float codes_per_zero(int64_t codec) {
  return rotated(codec) ? TRAITS[codec].top / 255.0f : 0.0f;
}

// `mask` in every byte of V. Bits that a shift of V moves over a byte's edge are masked away.
template <class V>
INLINE V bytes(uint64_t mask) {
  mask *= 0x0101010101010101ull;
  uint64_t all[4] = {mask, mask, mask, mask};
  return load<V>(all);
}
typedef uint64_t u64x2 __attribute__((vector_size(16)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));

// Packed codes of n rows become bytes at a stride of `wide`, sizeof(V) bytes at a time.
template <class V>
void unpack4(const char* p, int64_t n, int64_t half, char* out, int64_t wide) {
  const V nibble = bytes<V>(15);
  for (; n; n--, p += half, out += wide)
    for (int64_t j = 0; j + (int64_t)sizeof(V) <= half; j += sizeof(V)) {
      ahead(p + j);
      V x = load<V>(p + j);
      store<V>(out + j, x & nibble);
      store<V>(out + half + j, (x >> 4) & nibble);
    }
}

// Eight runs of codes from three bit planes, joined two bits, then two codes, at a time: in each
// byte of the results run i is in the low and run i + 4 in the high nibble.
template <class V>
INLINE void join_planes(V low, V middle, V high, V* two) {
  const V m55 = bytes<V>(0x55), m33 = bytes<V>(0x33);
  V even = (low & m55) | ((middle & m55) << 1);
  V odd = ((low >> 1) & m55) | (middle & ~m55);
  two[0] = (even & m33) | ((high & bytes<V>(0x11)) << 2);
  two[1] = (odd & m33) | ((high & bytes<V>(0x22)) << 1);
  two[2] = ((even >> 2) & m33) | (high & bytes<V>(0x44));
  two[3] = ((odd >> 2) & m33) | ((high & bytes<V>(0x88)) >> 1);
}

template <class V>
void unpack3(const char* p, int64_t n, int64_t run, char* out, int64_t wide) {
  const V nibble = bytes<V>(15);
  for (; n; n--, p += 3 * run, out += wide)
    for (int64_t j = 0; j + (int64_t)sizeof(V) <= run; j += sizeof(V)) {
      V two[4];
      join_planes(load<V>(p + j), load<V>(p + run + j), load<V>(p + 2 * run + j), two);
      for (int i = 0; i < 4; i++) {
        store<V>(out + i * run + j, two[i] & nibble);
        store<V>(out + (i + 4) * run + j, (two[i] >> 4) & nibble);
      }
    }
}

// Runs of 16 bytes, two rows in one vector.
inline void unpack3_pairs(const char* p, int64_t n, char* out, int64_t wide) {
  const u64x4 nibble = bytes<u64x4>(15);
  for (; n >= 2; n -= 2, p += 96, out += 2 * wide) {
    ahead(p);
    ahead(p + 64);
    u64x4 x[3], two[4];
    for (int i = 0; i < 3; i++)
      x[i] = __builtin_shufflevector(load<u64x2>(p + 16 * i), load<u64x2>(p + 48 + 16 * i),
                                     0, 1, 2, 3);
    join_planes(x[0], x[1], x[2], two);
    for (int i = 0; i < 8; i += 2) {
      const u64x4 a = (i < 4 ? two[i] : two[i - 4] >> 4) & nibble;
      const u64x4 b = (i < 4 ? two[i + 1] : two[i - 3] >> 4) & nibble;
      store<u64x4>(out + i * 16, __builtin_shufflevector(a, b, 0, 1, 4, 5));
      store<u64x4>(out + wide + i * 16, __builtin_shufflevector(a, b, 2, 3, 6, 7));
    }
  }
  unpack3<u64x2>(p, n, 16, out, wide);
}

inline void unpack_int4(const char* p, int64_t n, int64_t D, char* out, int64_t wide) {
  const int64_t half = D / 2;
  auto f = half % 32 == 0 ? unpack4<u64x4> : half % 16 == 0 ? unpack4<u64x2>
           : half % 8 == 0 ? unpack4<uint64_t> : unpack4<uint8_t>;
  f(p, n, half, out, wide);
}

inline void unpack_int3(const char* p, int64_t n, int64_t D, char* out, int64_t wide) {
  const int64_t run = D / 8;
  if (run == 16) return unpack3_pairs(p, n, out, wide);
  auto f = run % 32 == 0 ? unpack3<u64x4> : run % 16 == 0 ? unpack3<u64x2>
           : run % 8 == 0 ? unpack3<uint64_t> : unpack3<uint8_t>;
  f(p, n, run, out, wide);
}

static constexpr decltype(&unpack_int4) UNPACK[CODECS] = UNPACKERS;

template <class V>
INLINE void swing(float* p, float* q) {
  V a = load<V>(p), b = load<V>(q);
  store<V>(p, a + b);
  store<V>(q, a - b);
}

// Sums and differences of neighbours HALF apart within a vector.
template <int HALF, int... I>
INLINE vf swing_within(vf x, std::integer_sequence<int, I...>) {
  const vi sign = {(I & HALF ? (int32_t)0x80000000 : 0)...};  // the second is what is taken off
  return __builtin_shufflevector(x, x, (I ^ HALF)...) + bits((vi)x ^ sign);
}

// The orthonormal Hadamard rotation of arkv_fx.formats.hadamard, in place.
inline void rotate(float* x, int64_t D) {
  int64_t block = D & -D, half = 1;
  float unit = 1.0f / std::sqrt((float)block);
  if (block >= W) {
    for (int64_t j = 0; j < D; j += W) {
      constexpr std::make_integer_sequence<int, W> all;
      vf y = swing_within<1>(load<vf>(x + j), all);
      y = swing_within<4>(swing_within<2>(y, all), all);
      store(x + j, W > 8 ? swing_within<W / 2>(y, all) : y);
    }
    half = W;
  }
  for (; half < block; half *= 2)
    for (int64_t i = 0; i < D; i += 2 * half) {
      int64_t j = i;
      for (; j + W <= i + half; j += W) swing<vf>(x + j, x + j + half);
      for (; j < i + half; j++) swing<float>(x + j, x + j + half);
    }
  for (int64_t i = 0; i < D; i++) x[i] *= unit;
}
