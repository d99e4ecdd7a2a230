// One token's keys or values as floats: read from their codes and written as codes, as the formats
// in arkv_fx/formats do. Vectors have room for whole W, with zeros behind their D elements.
#pragma once
#include "call.h"

typedef uint16_t half_bits __attribute__((vector_size(2 * W)));

// As torch.finfo(torch.bfloat16).tiny: a smaller scale could not be divided by.
constexpr float TINY_SCALE = 0x1p-126f;

// To the nearest, of two equally near the even one, as all casts of torch.
INLINE vi bf16_bits(vf x) {
  const vi b = (vi)x;
  return x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : vi{} + 0x7fc0;
}

INLINE vi f16_bits(vf x) {
  const vi sign = (vi)x & (int32_t)0x80000000, b = (vi)x ^ sign;
  const vi infinite = vi{} + 0x7c00, none = vi{} + 0x7e00;
  // Subnormal halves: a sum with 0.5 leaves their bits at the low end, rounded.
  const vi small = (vi)(bits(b) + 0.5f) - 0x3f000000;
  const vi normal = (b - (112 << 23) + 0xfff + (b >> 13 & 1)) >> 13;
  vi found = b < (113 << 23) ? small : normal;
  found = b >= (143 << 23) ? infinite : found;
  found = b > (255 << 23) ? none : found;
  return found | (sign >> 16 & 0x8000);
}

// e4m3 of |x| <= 448.
INLINE vi fp8_bits(vf x) {
  const vi sign = (vi)x & (int32_t)0x80000000, b = (vi)x ^ sign;
  const vi small = (vi)(bits(b) + 0x1p14f) - (141 << 23);  // one bit is 2^-9, the subnormals' step
  const vi normal = (b - (120 << 23) + 0x7ffff + (b >> 20 & 1)) >> 20;
  return (b < (121 << 23) ? small : normal) | (sign >> 24 & 0x80);
}

// Round to what bfloat16 holds as base.round_to_scale_dtype does, whose codes these must equal:
// halves go up.
inline float scale_of(float x) {
  const float least = std::max(x, TINY_SCALE);
  const uint32_t b = (load<uint32_t>(&least) + 0x8000) & 0xffff0000;
  return load<float>(&b);
}

inline uint16_t scale_bits(float scale) { return load<uint32_t>(&scale) >> 16; }
inline float scale_at(uint16_t b) { return bits(vi{} + (int32_t)((uint32_t)b << 16))[0]; }

// A row in one of the models' own formats.
inline void store_row(int64_t codec, const float* x, int64_t D, char* to) {
  for (int64_t j = 0; j < D; j += W) {
    const vf y = load<vf>(x + j);
    if (codec == F32) {
      store_some((float*)to + j, y, D - j);
      continue;
    }
    const vi b = codec == BF16 ? bf16_bits(y) : f16_bits(y);
    store_some((uint16_t*)to + j, __builtin_convertvector(b, half_bits), D - j);
  }
}

inline void load_row(int64_t codec, const char* from, int64_t D, float* x) {
  for (int64_t j = 0; j < D; j += W)
    store(x + j, plain_some(codec, from, j, D));
}

inline float dot(const float* x, const float* y, int64_t D) {
  vf sum[8] = {};
  for (int64_t j = 0; j < D; j += W)
    sum[0] += load_some<vf>(x + j, D - j) * load_some<vf>(y + j, D - j);
  return sums(sum)[0];
}

// What slot `at` of [B * H, slots] holds, in the plain basis; `room` has D bytes.
inline void decode(const Stored& from, int64_t at, int64_t D, float* x, char* room) {
  const int64_t codec = from.codec;
  const char* codes = from.codes + at * width(codec, D);
  if (!scaled(codec)) return load_row(codec, codes, D, x);
  const float scale = scale_at(from.scale[at]);
  if (rotated(codec)) {
    UNPACK[codec](codes, 1, D, room, 0);
    codes = room;
  }
  const float zero = rotated(codec) ? from.zero[at] * codes_per_zero(codec) : 0.0f;
  for (int64_t j = 0; j < D; j += W) {
    const vf y = codec == FP8 ? row_some<FP8Row>(codes + j, D - j) * FP8_UNIT
                              : row_some<ByteRow>(codes + j, D - j) - zero;
    store(x + j, y * scale);
  }
  std::fill(x + D, x + whole(D, W), 0.0f);
  if (rotated(codec)) rotate(x, D);
}

template <class V>
void pack4(const uint8_t* codes, int64_t half, char* to) {
  for (int64_t j = 0; j < half; j += sizeof(V))
    store<V>(to + j, load<V>(codes + j) | load<V>(codes + half + j) << 4);
}

template <class V>
void pack3(const uint8_t* codes, int64_t run, char* to) {
  const V one = bytes<V>(1);
  for (int64_t j = 0; j < run; j += sizeof(V)) {
    V plane[3] = {};
    UNROLL for (int i = 0; i < 8; i++) {
      const V x = load<V>(codes + i * run + j);
      UNROLL for (int bit = 0; bit < 3; bit++) plane[bit] |= (x >> bit & one) << i;
    }
    for (int bit = 0; bit < 3; bit++) store<V>(to + bit * run + j, plane[bit]);
  }
}

// Codes of one byte each become packed ones, see int4.py and int3.py.
template <class F>
INLINE F by_run(int64_t run, F u8, F u64, F two) {
  return run % 16 == 0 ? two : run % 8 == 0 ? u64 : u8;
}

inline void pack_int4(const uint8_t* codes, int64_t D, char* to) {
  by_run(D / 2, pack4<uint8_t>, pack4<uint64_t>, pack4<u64x2>)(codes, D / 2, to);
}

inline void pack_int3(const uint8_t* codes, int64_t D, char* to) {
  by_run(D / 8, pack3<uint8_t>, pack3<uint64_t>, pack3<u64x2>)(codes, D / 8, to);
}

static constexpr decltype(&pack_int4) PACK[CODECS] = PACKERS;

// (x - zero) / scale in 0..top after a rotation, the zero point in steps that a byte holds.
inline void encode_affine(const Stored& to, int64_t at, int64_t D, float* x, uint8_t* codes) {
  const float unit = codes_per_zero(to.codec), top = TRAITS[to.codec].top;
  rotate(x, D);
  vf high[8] = {};  // so that zero lies in the span
  for (int64_t j = 0; j < D; j += W) {
    const vf y = load<vf>(x + j);
    high[0] = larger(high[0], y);
    high[1] = larger(high[1], -y);
  }
  const f8 span = highest(high);
  const float scale = scale_of((span[0] + span[1]) / top);
  const float zero = std::min(255.0f, std::nearbyint(span[1] / scale / unit));
  for (int64_t j = 0; j < D; j += W) {
    vf y = load<vf>(x + j) / scale + zero * unit;
    y = y < top ? larger(y, vf{}) : spread(top);
    store_bytes(codes + j, rounded(y));
  }
  to.scale[at] = scale_bits(scale);
  to.zero[at] = (uint8_t)zero;
}

// Store x in slot `at` of [B * H, slots]; x is lost and `room` has as many bytes.
inline void encode(const Stored& to, int64_t at, int64_t D, float* x, char* room) {
  const int64_t codec = to.codec;
  char* codes = to.codes + at * width(codec, D);
  if (!scaled(codec)) return store_row(codec, x, D, codes);
  uint8_t* bytes = (uint8_t*)room;
  if (rotated(codec)) {
    encode_affine(to, at, D, x, bytes);
    return PACK[codec](bytes, D, codes);
  }
  vf most[8] = {};
  for (int64_t j = 0; j < D; j += W) {
    const vf y = load<vf>(x + j);
    most[0] = larger(most[0], larger(y, -y));
  }
  const float top = TRAITS[codec].top, scale = scale_of(highest(most)[0] / top);
  for (int64_t j = 0; j < D; j += W) {
    vf y = load<vf>(x + j) / scale;
    // A scale that was rounded down makes values beyond the largest code.
    y = y < top ? larger(y, spread(-top)) : spread(top);
    const vi b = codec == FP8 ? fp8_bits(y) : rounded(y);
    store_bytes(bytes + j, b);
  }
  std::memcpy(codes, bytes, D);
  to.scale[at] = scale_bits(scale);
}
