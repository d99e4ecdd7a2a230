// The new token's queries in the bases that keys are stored in.
#pragma once
#include "call.h"

// As they are; lifted for fp8; rotated; rotated and in the order of `Nibbles`.
enum Basis { PLAIN, LIFTED, ROTATED, NIBBLES, BASES };

class Queries {
 public:
  const int64_t wide;  // of a row
  float* numbers;      // [BASES, B * H * G, wide]
  int16_t* shorts;     // the same in 16 bits, for codes that are multiplied as integers,
  float* units;        // and what one of them is worth: [BASES, B * H * G]
  float* sums;         // [B * H * G], rotated
  float* centres;      // [B * H * G], what the keys' centre adds

  explicit Queries(const Call& call)
      : wide(whole(call.k_dim, 2 * W)), call(call), count(call.batch * call.heads * call.groups) {
    for (const Segment& s : call.segment) used[basis_of(s.k.codec)] = true;
    if (used[NIBBLES])
      for (int64_t j = 0; j < call.k_dim; j++) nibbles.push_back(nibble_at(j, call.k_dim));
  }

  int64_t nbytes() const { return 4 * count * (BASES * (wide + wide / 2 + 1) + 2) + 64 * 5; }

  void place(Scratch& scratch) {
    numbers = scratch.take<float>(count * BASES * wide);
    shorts = scratch.take<int16_t>(count * BASES * wide);
    units = scratch.take<float>(count * BASES);
    sums = scratch.take<float>(count);
    centres = scratch.take<float>(count);
  }

  // Half-precision models' codes are multiplied as integers: rounding queries and weights to 16
  // bits of their largest is far below the rounding of the model's own numbers.
  bool integers(int64_t codec) const { return INTEGERS && call.dtype != F32 && TRAITS[codec].integers; }

  Basis basis_of(int64_t codec) const {
    if (codec == INT4 && integers(codec) && Nibbles::fits(call.k_dim)) return NIBBLES;
    return codec == FP8 ? LIFTED : rotated(codec) ? ROTATED : PLAIN;
  }

  int64_t at(Basis basis, int64_t query) const { return basis * count + query; }

  // Query i of B * H * G in all bases.
  void prepare(int64_t i) {
    const int64_t D = call.k_dim, head = i / call.groups;
    const char* q = call.q + i * width(call.dtype, D);
    float *plain = numbers + at(PLAIN, i) * wide, *lifted = numbers + at(LIFTED, i) * wide;
    for (int64_t j = 0; j < wide; j += W) {
      const vf x = j < D ? plain_some(call.dtype, q, j, D) : vf{};
      store(plain + j, x);
      if (used[LIFTED]) store(lifted + j, x * LIFT);
    }
    if (integers(INT8)) shorten(PLAIN, i, plain);
    vf both[8] = {};
    if (call.centre)
      for (int64_t j = 0; j < D; j += W)
        both[0] += load<vf>(plain + j) * load_some<vf>(call.centre + head * D + j, D - j);
    if (used[ROTATED] || used[NIBBLES]) {
      float* turned = numbers + at(ROTATED, i) * wide;
      std::copy(plain, plain + wide, turned);
      rotate(turned, D);
      if (integers(INT4)) shorten(ROTATED, i, turned);
      for (int64_t j = 0; j < wide; j += W) both[1] += load<vf>(turned + j);
    }
    if (used[NIBBLES]) {
      const int16_t* from = shorts + at(ROTATED, i) * wide;
      int16_t* to = shorts + at(NIBBLES, i) * wide;
      for (int64_t j = 0; j < D; j++) to[j] = from[nibbles[j]];
      units[at(NIBBLES, i)] = units[at(ROTATED, i)];
    }
    const f8 found = ::sums(both);
    centres[i] = found[0];
    sums[i] = found[1];
  }

 private:
  const Call& call;
  const int64_t count;
  bool used[BASES] = {};
  std::vector<int64_t> nibbles;  // order of the last basis

  // A query in 16 bits. What it then stands for replaces it, so that zero points cancel exactly.
  void shorten(Basis basis, int64_t i, float* q) {
    int16_t* to = shorts + at(basis, i) * wide;
    vf most[8] = {};
    for (int64_t j = 0; j < wide; j += W) {
      const vf x = load<vf>(q + j);
      most[0] = larger(most[0], larger(x, -x));
    }
    const float unit = std::max(highest(most)[0] / 32767, 1e-37f), inverse = 1 / unit;
    units[at(basis, i)] = unit;
    for (int64_t j = 0; j < wide; j += W) {
      const vi x = rounded(load<vf>(q + j) * inverse);
      store_shorts(to + j, x);
      if (basis == ROTATED) store(q + j, number(x) * unit);
    }
  }
};
