// Stored numbers to floats: `Row` types read W elements of a row; packed codes become bytes first.
#pragma once
#include "simd.h"

// As arkv_fx.ops.kernels.cpp.CODECS numbers them.
enum Codec : int64_t { F32, BF16, F16, FP8, INT8, INT4, INT3, CODECS };

// Reads what is left of a row (n < W elements) with zeros behind.
template <class V, class T>
INLINE V part(const char* p, int64_t n) {
  T held[W] = {};
  std::memcpy(held, p, n * sizeof(T));
  return load<V>(held);
}

struct F32Row {
  typedef float T;
  typedef vf V;
  static INLINE vf floats(vf x) { return x; }
};

struct BF16Row {
  typedef uint16_t T;
  typedef vu16 V;
  static INLINE vf floats(vu16 x) { return bits(__builtin_convertvector(x, vi) << 16); }
};

struct F16Row {
  typedef int16_t T;
  typedef vi16 V;
  // The bits of a half moved to those of a float make the number times 2^-112.
  static INLINE vf floats(vi16 x) {
    return bits((__builtin_convertvector(x, vi) << 13) & (int32_t)0x8fffe000) * 0x1p112f;
  }
};

// Numbers times 2^-120, as for halves; undoing it for every element would cost a multiplication,
// so queries and weights are lifted by `LIFT` and the rest goes into the scale.
constexpr float LIFT = 0x1p96f, FP8_UNIT = 0x1p120f;

struct FP8Row {
  typedef int8_t T;
  typedef vi8 V;
  static INLINE vf floats(vi8 x) {
    return bits((__builtin_convertvector(x, vi) << 20) & (int32_t)0x87f00000);
  }
};

struct ByteRow {  // int8, and unpacked int4 and int3
  typedef int8_t T;
  typedef vi8 V;
  static INLINE vf floats(vi8 x) { return number(__builtin_convertvector(x, vi)); }
};

template <class R>
INLINE vf row_at(const char* p) {
  return R::floats(load<typename R::V>(p));
}

template <class R>
INLINE vf row_end(const char* p, int64_t n) {
  return R::floats(part<typename R::V, typename R::T>(p, n));
}

inline float codes_per_zero(int64_t codec) {
  return codec == INT4 ? 15.0f / 255 : codec == INT3 ? 7.0f / 255 : 0.0f;
}
inline bool rotated(int64_t codec) { return codec == INT4 || codec == INT3; }

// `mask` in every byte of V. Bits that a shift of V moves over a byte's edge are masked away.
template <class V>
INLINE V bytes(uint64_t mask) {
  mask *= 0x0101010101010101ull;
  uint64_t all[4] = {mask, mask, mask, mask};
  return load<V>(all);
}
typedef uint64_t u64x2 __attribute__((vector_size(16)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));

template <class V, class M>
INLINE void unpack4(const char* p, int64_t half, char* out, M m) {
  V x = load<V>(p);
  store<V>(out, x & m(15));
  store<V>(out + half, (x >> 4) & m(15));
}

// Eight runs of codes from three bit planes; codes are joined two bits, then two codes, at a time.
template <class V, class M>
INLINE void unpack3(const char* p, int64_t run, char* out, M m) {
  V low = load<V>(p), middle = load<V>(p + run), high = load<V>(p + 2 * run);
  V even = (low & m(0x55)) | ((middle & m(0x55)) << 1);
  V odd = ((low >> 1) & m(0x55)) | (middle & m(0xaa));
  V two[4];  // in each byte run i in the low and run i + 4 in the high nibble
  two[0] = (even & m(0x33)) | ((high & m(0x11)) << 2);
  two[1] = (odd & m(0x33)) | ((high & m(0x22)) << 1);
  two[2] = ((even >> 2) & m(0x33)) | (high & m(0x44));
  two[3] = ((odd >> 2) & m(0x33)) | ((high >> 1) & m(0x44));
  for (int i = 0; i < 4; i++) {
    store<V>(out + i * run, two[i] & m(15));
    store<V>(out + (i + 4) * run, (two[i] >> 4) & m(15));
  }
}

// `run` bytes at a time in the widest steps that fit.
#define IN_STEPS(function, run, ...)                                                        \
  int64_t j = 0;                                                                            \
  for (; j + 32 <= run; j += 32) function<u64x4>(__VA_ARGS__, bytes<u64x4>);                \
  for (; j + 16 <= run; j += 16) function<u64x2>(__VA_ARGS__, bytes<u64x2>);                \
  for (; j + 8 <= run; j += 8) function<uint64_t>(__VA_ARGS__, bytes<uint64_t>);            \
  for (; j < run; j++) function<uint8_t>(__VA_ARGS__, bytes<uint8_t>);

// n rows of D packed codes as n rows of D bytes at a stride of `wide`.
inline void unpack(int64_t codec, const char* p, int64_t n, int64_t D, char* out, int64_t wide) {
  for (int64_t r = 0; r < n; r++, out += wide) {
    if (codec == INT4) {
      IN_STEPS(unpack4, D / 2, p + j, D / 2, out + j)
      p += D / 2;
    } else {
      IN_STEPS(unpack3, D / 8, p + j, D / 8, out + j)
      p += D / 8 * 3;
    }
  }
}

template <class V>
INLINE void swing(float* p, float* q) {
  V a = load<V>(p), b = load<V>(q);
  store<V>(p, a + b);
  store<V>(q, a - b);
}

// The orthonormal Hadamard rotation of arkv_fx.ops.formats.hadamard, in place.
inline void rotate(float* x, int64_t D) {
  int64_t block = D & -D;
  float unit = 1.0f / std::sqrt((float)block);
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t i = 0; i < D; i += 2 * half) {
      int64_t j = i;
      for (; j + W <= i + half; j += W) swing<vf>(x + j, x + j + half);
      for (; j < i + half; j++) swing<float>(x + j, x + j + half);
    }
  for (int64_t i = 0; i < D; i++) x[i] *= unit;
}
