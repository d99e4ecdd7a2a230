// Many vectors at once as codes: what a prompt leaves in the tiers.
#pragma once
#include "call.h"
#include "vectors.h"

// Vectors [B, H, T, D] at any strides but the last; `source` [B, H, C] are those that slots take.
struct Vectors {
  int64_t dtype;
  const char* x;
  int64_t stride[3];   // elements
  int64_t heads, slots, D;
  const int64_t* source;  // -1: nothing for this slot
  const float* centre;  // [B, H, D] or null: what is taken off first
};

// Into slots `begin` to `end` of fields [B, H, C, ...].
inline void encode_some(const Vectors& from, const Stored& to, int64_t begin, int64_t end) {
  const int64_t D = from.D, wide = width(to.codec, D);
  std::vector<float> x(whole(D, W));
  std::vector<char> room(whole(D, W));
  auto vector_of = [&](int64_t at) {
    const int64_t head = at / from.slots;
    const int64_t element = head / from.heads * from.stride[0] +
                            head % from.heads * from.stride[1] + from.source[at] * from.stride[2];
    return from.x + element * width(from.dtype, 1);
  };
  for (int64_t at = begin; at < end; at++) {
    const int64_t head = at / from.slots, ahead = at + 4;
    if (ahead < end && from.source[ahead] >= 0) {  // by rank: nothing else foresees the next
      const char* next = vector_of(ahead);
      for (int64_t i = 0; i < width(from.dtype, D); i += 64) __builtin_prefetch(next + i);
    }
    if (from.source[at] < 0) continue;
    const char* vector = vector_of(at);
    if (from.dtype == to.codec && !from.centre) {
      std::memcpy(to.codes + at * wide, vector, wide);
      continue;
    }
    load_row(from.dtype, vector, D, x.data());
    if (from.centre)
      for (int64_t j = 0; j < D; j++) x[j] -= from.centre[head * D + j];
    encode(to, at, D, x.data(), room.data());
  }
}

inline void encode_all(const Vectors& from, const Stored& to, int64_t n, int64_t threads) {
  if (threads == 1) return encode_some(from, to, 0, n);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < threads; i++)
    encode_some(from, to, n * i / threads, n * (i + 1) / threads);
}
