// A few rows times int8 weights as they lie: codes less a zero point, times a scale, of each group of
// a row's columns (or of all).
#pragma once
#include "linear.h"

// Codes [N, K]; scales [N, groups] in one of the models' dtypes and zero points [N, groups] or null,
// or `one` of each for all; the rest as `Weights`.
struct Int8Weights {
  int64_t dtype, N;
  const char *codes, *bias;
  char* out;
  int64_t scale_dtype;
  bool one;
  const char* scales;
  const int8_t* zeros;
};

// sums[r][m] = x[m] . R rows of codes from `w` on, times their scales [R, groups]. A sums side by side:
// a group that is short has no use for many.
template <int M, int R, int A>
INLINE void dots_int8(const char* w, const Inputs& in, const float* x, const float* scales,
                      vf (&sums)[R][M]) {
  const int64_t K = in.K, group = K / in.groups, ld = in.ld;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int m = 0; m < M; m++) sums[r][m] = vf{};
  for (int64_t g = 0, j = 0; g < in.groups; g++) {
    const int64_t end = j + group;
    vf sum[R][M][A];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int a = 0; a < A; a++) sum[r][m][a] = vf{};
    for (; j + A * W <= end; j += A * W) {
      UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(w + r * K + j + 4096);
      UNROLL for (int a = 0; a < A; a++) {
        vf y[R];
        UNROLL for (int r = 0; r < R; r++) y[r] = row_at<ByteRow>(w + r * K + j + a * W);
        UNROLL for (int m = 0; m < M; m++) {
          const vf z = load<vf>(x + m * ld + j + a * W);
          UNROLL for (int r = 0; r < R; r++) sum[r][m][a] += y[r] * z;
        }
      }
    }
    for (; j < end; j += W)
      UNROLL for (int r = 0; r < R; r++) {
        const vf y = row_some<ByteRow>(w + r * K + j, end - j);
        UNROLL for (int m = 0; m < M; m++)
          sum[r][m][0] += y * load_some<vf>(x + m * ld + j, end - j);
      }
    j = end;
    UNROLL for (int r = 0; r < R; r++) {
      const vf scale = spread(scales[r * in.groups + g]);
      UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int a = 1; a < A; a++) sum[r][m][0] += sum[r][m][a];
        sums[r][m] += sum[r][m][0] * scale;
      }
    }
  }
}

// out[m][0..W) of n <= W rows of codes, R at a time: what they multiply is then read less often.
template <int M, int R, int A>
INLINE void rows_int8(const char* w, int64_t n, const Inputs& in, const float* x,
                      const float* scales, vf* out) {
  vf row[M][W] = {};
  int64_t i = 0;
  for (; i + R <= n; i += R) {
    vf sums[R][M];
    dots_int8<M, R, A>(w + i * in.K, in, x, scales + i * in.groups, sums);
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int r = 0; r < R; r++) row[m][i + r] = sums[r][m];
  }
  for (; i < n; i++) {
    vf sums[1][M];
    dots_int8<M, 1, 1>(w + i * in.K, in, x, scales + i * in.groups, sums);
    UNROLL for (int m = 0; m < M; m++) row[m][i] = sums[0][m];
  }
  UNROLL for (int m = 0; m < M; m++) out[m] = all_sums(row[m]);
}

template <int M>
void rows_int8(const char* w, int64_t n, const Inputs& in, const float* x, const float* scales,
               vf* out) {
  constexpr int R = REGISTERS / 8;  // sums of four rows fill half of the registers
  if (M > 1) return rows_int8<M, R, 1>(w, n, in, x, scales, out);
  // One row: memory is read best in its order; short groups of 32 are two rows' at once.
  if (in.K / in.groups < 4 * W) return rows_int8<M, 2, 32 / W>(w, n, in, x, scales, out);
  rows_int8<M, 1, 4>(w, n, in, x, scales, out);
}

// What zero points take off: the sums of a row's groups, times them and their scales.
inline float off_zero(const int8_t* zeros, const float* scales, const float* sums, int64_t groups) {
  float off = 0.0f;
  for (int64_t g = 0; g < groups; g++) off += zeros[g] * scales[g] * sums[g];
  return off;
}

// The products with weights [first, last) of all rows.
inline void multiply_int8(const Int8Weights& w, int64_t first, int64_t last, const Inputs& in) {
  static thread_local std::vector<float> room;
  const int64_t groups = in.groups, size = width(w.dtype, 1), scale_size = width(w.scale_dtype, 1);
  room.assign(whole(W * groups, W), 0.0f);
  float* scales = room.data();
  if (w.one) std::fill_n(scales, W * groups, plain_some(w.scale_dtype, w.scales, 0, 1)[0]);
  for (int64_t n = first; n < last; n += W) {
    const int64_t count = std::min<int64_t>(W, last - n);
    const char* codes = w.codes + n * in.K;
    if (!w.one)
      load_row(w.scale_dtype, w.scales + n * groups * scale_size, count * groups, scales);
    const vf bias = w.bias ? plain_some(w.dtype, w.bias, n, w.N) : vf{};
    for (int64_t m = 0; m < in.M; m += ROWS) {
      vf out[ROWS];
      const float* x = in.x + m * in.ld;
      const int64_t rows = std::min<int64_t>(ROWS, in.M - m);
      if (rows == 1) rows_int8<1>(codes, count, in, x, scales, out);
      if (rows == 2) rows_int8<2>(codes, count, in, x, scales, out);
      if (rows == 3) rows_int8<3>(codes, count, in, x, scales, out);
      if (rows == 4) rows_int8<4>(codes, count, in, x, scales, out);
      for (int64_t i = 0; i < rows; i++) {
        float y[W];
        store(y, out[i]);
        if (w.zeros)
          for (int64_t r = 0; r < count; r++)
            y[r] -= off_zero(w.zeros + (w.one ? 0 : (n + r) * groups), scales + r * groups,
                             in.sums + (m + i) * groups, groups);
        store(y, load<vf>(y) + bias);
        store_row(w.dtype, y, count, w.out + ((m + i) * w.N + n) * size);
      }
    }
  }
}
