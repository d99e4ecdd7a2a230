// What vector extensions express badly or not at all: by name on x86, element by element elsewhere.
#pragma once
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
constexpr bool INTEGERS = true;  // products of 16-bit integers are twice as fast as of floats

#if defined(__AVX512BW__)
#define WIDE(name) _mm512_##name
typedef __m512i wide;
#define LOAD_HALF(p) _mm256_loadu_si256((const __m256i*)(p))
#define LOAD_QUARTER(p) _mm_loadu_si128((const __m128i*)(p))
#else
#define WIDE(name) _mm256_##name
typedef __m256i wide;
#define LOAD_HALF(p) _mm_loadu_si128((const __m128i*)(p))
#define LOAD_QUARTER(p) _mm_loadl_epi64((const __m128i*)(p))
#endif

// W integers as wide ones.
INLINE vi widen(const int8_t* p) { return (vi)WIDE(cvtepi8_epi32)(LOAD_QUARTER(p)); }
INLINE vi widen(const int16_t* p) { return (vi)WIDE(cvtepi16_epi32)(LOAD_HALF(p)); }
INLINE vi widen(const uint16_t* p) { return (vi)WIDE(cvtepu16_epi32)(LOAD_HALF(p)); }

// 2 W bytes as shorts.
INLINE vs shorts(const int8_t* p) { return (vs)WIDE(cvtepi8_epi16)(LOAD_HALF(p)); }

// The low four bits of each as numbers.
INLINE vf nibbles(vi x) {
#if defined(__AVX512BW__)
  const __m512 all = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vf)_mm512_permutexvar_ps((wide)x, all);
#else
  return __builtin_convertvector(x & 15, vf);
#endif
}

// `sum` and the sums of neighbours' products.
INLINE vi add_products(vi sum, vs x, vs y) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((wide)sum, (wide)x, (wide)y);
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
  return (vi)_mm256_dpwssd_avx_epi32((wide)sum, (wide)x, (wide)y);
#else
  return sum + (vi)WIDE(madd_epi16)((wide)x, (wide)y);
#endif
}

// 2 W columns of two rows of bytes as shorts, one row's beside the other's. Which columns the two
// vectors have is up to the instruction; `in_order` puts sums of them right.
INLINE void interleave(const char* a, const char* b, vs* x) {
#if defined(__AVX512BW__)
#define UNPACK(part) _mm256_unpack##part##_epi8
#else
#define UNPACK(part) _mm_unpack##part##_epi8
#endif
  const auto p = LOAD_HALF(a), q = LOAD_HALF(b);
  x[0] = (vs)WIDE(cvtepi8_epi16)(UNPACK(lo)(p, q));
  x[1] = (vs)WIDE(cvtepi8_epi16)(UNPACK(hi)(p, q));
}

INLINE void in_order(vi& x, vi& y) {
#if defined(__AVX512BW__)
  const wide low = _mm512_shuffle_i64x2((wide)x, (wide)y, 0x44);
  y = (vi)_mm512_shuffle_i64x2((wide)x, (wide)y, 0xee);
  x = (vi)low;
#endif
}

// Rounded, |x| < 2^15.
INLINE void store_shorts(int16_t* p, vi x) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((wide)x));
#else
  const wide y = _mm256_packs_epi32((wide)x, (wide)x);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(y, 8)));
#endif
}

// The low byte of each.
INLINE void store_bytes(void* p, vi x) {
#if defined(__AVX512BW__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((wide)x));
#else
  wide y = (wide)(x & 255);
  y = _mm256_packus_epi16(_mm256_packus_epi32(y, y), y);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(y),
                                                   _mm256_extracti128_si256(y, 1)));
#endif
}

#else
constexpr bool INTEGERS = false;

template <class T>
INLINE vi widen(const T* p) {
  typedef T narrow __attribute__((vector_size(W * sizeof(T))));
  return __builtin_convertvector(load<narrow>(p), vi);
}

INLINE vf nibbles(vi x) { return __builtin_convertvector(x & 15, vf); }

INLINE void store_bytes(void* p, vi x) {
  typedef uint8_t narrow __attribute__((vector_size(W)));
  const narrow y = __builtin_convertvector(x, narrow);
  std::memcpy(p, &y, W);
}

// Only so that what INTEGERS leaves out compiles.
INLINE vs shorts(const int8_t*) { return vs{}; }
INLINE vi add_products(vi, vs, vs) { return vi{}; }
INLINE void interleave(const char*, const char*, vs*) {}
INLINE void in_order(vi&, vi&) {}
INLINE void store_shorts(int16_t*, vi) {}
#endif
