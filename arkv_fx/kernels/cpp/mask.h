// Attention masks as models give them, read where they lie.
#pragma once
#include "codecs.h"

// Bool (true attends) or additive, [B or 1, H * G or 1, 1, S] with any strides.
struct Mask {
  static constexpr int64_t BOOL = CODECS;
  const char* data;             // null: there is none
  int64_t type, length;         // BOOL or one of the codecs F32, BF16, F16; S
  int64_t batch, head, column;  // strides in elements, 0 where there is one for all

  // What it adds to the logits of columns i = 0..n-1, which are its own columns `at(i)`. Below half
  // of its dtype's lowest number it hides, as arkv_fx.kernels.softmax.allowed has it.
  template <class At>
  void add(int64_t b, int64_t h, int64_t n, At at, float* to) const {
    const int64_t row = b * batch + h * head;
    auto each = [&](auto read, float least) {
      for (int64_t i = 0; i < n; i++) {
        const float x = read(row + at(i) * column);
        to[i] = x > least ? x : NEVER;
      }
    };
    const char* p = data;
    if (type == BOOL)
      each([p](int64_t i) { return p[i] ? 0.0f : NEVER; }, NEVER);
    else if (type == F32)
      each([p](int64_t i) { return load<float>(p + 4 * i); }, -0x1.fffffep126f);
    else if (type == BF16)
      each([p](int64_t i) { return bf16_at(p + 2 * i); }, -0x1.fep126f);
    else
      each([p](int64_t i) { return f16_at(p + 2 * i); }, -32752.0f);
  }

  // Whether the new token of sequence b attends to itself in any head; if not, it is padding.
  bool shows_itself(int64_t b, int64_t heads) const {
    if (!data) return true;
    bool any = false;
    for (int64_t h = 0; h < (head ? heads : 1); h++) {
      float x;
      add(b, h, 1, [this](int64_t) { return length - 1; }, &x);
      any |= x > NEVER;
    }
    return any;
  }

 private:
  // As `BF16Row` and `F16Row`, one number at a time.
  static float bf16_at(const char* p) {
    const uint32_t b = (uint32_t)load<uint16_t>(p) << 16;
    return load<float>(&b);
  }
  static float f16_at(const char* p) {
    const uint32_t b = ((uint32_t)(int32_t)load<int16_t>(p) << 13) & 0x8fffe000;
    return load<float>(&b) * 0x1p112f;
  }
};
