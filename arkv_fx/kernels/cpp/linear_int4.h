// A few rows times packed int4 weights as torch's _convert_weight_to_int4pack_for_cpu lays them: in
// blocks of `block` rows, within a block column after column, two rows' codes in a byte. Of whole
// blocks (`halves`) the low nibbles are the first half of the rows; else, and in the last block where
// it is no whole one, the even rows.
#pragma once
#include "linear.h"

// Codes; [groups, N, 2] scales and values of code 8 in one of the models' dtypes; the rest as
// `Weights`.
struct Int4Weights {
  int64_t dtype, N;
  const char *codes, *bias;
  char* out;
  int64_t scale_dtype;
  const char* scales;
  int64_t block;
  bool halves;
};

// W numbers of even and of odd place.
template <int... I>
INLINE void part_pairs(vf a, vf b, vf& even, vf& odd, std::integer_sequence<int, I...>) {
  even = __builtin_shufflevector(a, b, (2 * I)...);
  odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Scales and values of code 8 of W rows side by side.
INLINE void scales_at(int64_t dtype, const char* p, vf& scale, vf& eight) {
  constexpr std::make_integer_sequence<int, W> all;
  if (dtype == BF16) {
    const vi both = load<vi>(p);
    scale = bits(both << 16), eight = bits(both & (int32_t)0xffff0000);
  } else if (dtype == F32) {
    part_pairs(load<vf>(p), load<vf>(p + 4 * W), scale, eight, all);
  } else {
    part_pairs(row_at<F16Row>(p), row_at<F16Row>(p + 2 * W), scale, eight, all);
  }
}

// The same of some rows, `step` apart.
INLINE void scales_some(int64_t dtype, const char* p, int64_t n, int64_t step, vf& scale,
                        vf& eight) {
  const int64_t size = width(dtype, 1);
  char held[2 * W * 4] = {};
  for (int64_t i = 0; i < n; i++)
    std::memcpy(held + 2 * i * size, p + 2 * i * step * size, 2 * size);
  scales_at(dtype, held, scale, eight);
}

// Where the codes of V * W bytes of a block's column stand, and whose they are.
struct Lanes {
  const char* codes;  // of the first column
  int64_t stride;     // from column to column
  int64_t low, high;  // the rows of the first byte
  int64_t step, count;  // from byte to byte; bytes that count, or all
};

// out[m][0..2V) = rows x[m] times V * W rows of low, then of high nibbles.
template <int M, int V, bool WHOLE>
INLINE void columns_int4(const Int4Weights& w, const Lanes& at, const Inputs& in, int64_t m0,
                         vf (&out)[M][2 * V]) {
  const int64_t group = in.K / in.groups, size = width(w.scale_dtype, 1);
  const char* p = at.codes;
  const float* x = in.x + m0 * in.ld;
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < 2 * V; v++) out[m][v] = vf{};
  for (int64_t g = 0; g < in.groups; g++) {
    vf sum[M][2 * V];
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int v = 0; v < 2 * V; v++) sum[m][v] = vf{};
    for (const float* end = x + group; x < end; x++, p += at.stride) {
      __builtin_prefetch(p + 2048);
      UNROLL for (int v = 0; v < V; v++) {
        const vi c = WHOLE ? widen((const int8_t*)p + v * W)
                           : widen_some((const int8_t*)p + v * W, at.count);
        const vf low = nibbles(c), high = nibbles(c >> 4);
        UNROLL for (int m = 0; m < M; m++) {
          const vf y = spread(x[m * in.ld]);
          sum[m][v] += low * y;
          sum[m][V + v] += high * y;
        }
      }
    }
    UNROLL for (int v = 0; v < 2 * V; v++) {
      const int64_t row = (v < V ? at.low : at.high) + v % V * W * at.step;
      const char* pairs = w.scales + (g * w.N + row) * 2 * size;
      vf scale, eight;
      if (WHOLE) {
        __builtin_prefetch(pairs + w.block * 2 * size);
        scales_at(w.scale_dtype, pairs, scale, eight);
      } else {
        scales_some(w.scale_dtype, pairs, at.count, at.step, scale, eight);
      }
      eight -= 8.0f * scale;
      UNROLL for (int m = 0; m < M; m++)
        out[m][v] += sum[m][v] * scale + eight * in.sums[(m0 + m) * in.groups + g];
    }
  }
}

// The products of rows [m0, m0 + M) with V * W bytes of a block's columns, with their bias, each to
// where its row stands in y.
template <int M, int V, bool WHOLE>
void lanes_int4(const Int4Weights& w, const Lanes& at, const Inputs& in, int64_t m0, int64_t first,
                float (*y)[64]) {
  vf out[M][2 * V];
  columns_int4<M, V, WHOLE>(w, at, in, m0, out);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < 2 * V; v++) {
      const int64_t row = (v < V ? at.low : at.high) - first + v % V * W * at.step;
      if (WHOLE) {
        store(&y[m][row], out[m][v]);
      } else {
        float held[W];
        store(held, out[m][v]);
        for (int64_t i = 0; i < at.count; i++) y[m][row + i * at.step] = held[i];
      }
    }
}

template <int M>
void block_int4(const Int4Weights& w, int64_t first, int64_t count, const Inputs& in, int64_t m0) {
  float y[M][64];
  const int64_t half = count / 2, size = width(w.dtype, 1);
  const bool halves = w.halves && count == w.block;
  for (int64_t j = 0; j < half;) {
    Lanes at{w.codes + first * in.K / 2 + j, half, first + (halves ? j : 2 * j), 0,
             halves ? 1 : 2, std::min<int64_t>(half - j, W)};
    at.high = halves ? at.low + half : at.low + 1;
    constexpr int V = M == 1 ? 2 : 1;
    if (halves && half - j >= V * W)
      lanes_int4<M, V, true>(w, at, in, m0, first, y), j += V * W;
    else
      lanes_int4<M, 1, false>(w, at, in, m0, first, y), j += W;
  }
  for (int m = 0; m < M; m++) {
    if (w.bias)
      for (int64_t n = 0; n < count; n += W)
        store_some(&y[m][n], load_some<vf>(&y[m][n], count - n) +
                                 plain_some(w.dtype, w.bias, first + n, first + count),
                   count - n);
    store_row(w.dtype, y[m], count, w.out + ((m0 + m) * w.N + first) * size);
  }
}

// The products with weights [first, last), whole blocks or the end, of all rows.
inline void multiply_int4(const Int4Weights& w, int64_t first, int64_t last, const Inputs& in) {
  for (int64_t n = first; n < last; n += w.block) {
    const int64_t count = std::min(w.block, last - n);
    for (int64_t m = 0; m < in.M; m += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, in.M - m);
      if (rows == 1) block_int4<1>(w, n, count, in, m);
      if (rows == 2) block_int4<2>(w, n, count, in, m);
      if (rows == 3) block_int4<3>(w, n, count, in, m);
      if (rows == 4) block_int4<4>(w, n, count, in, m);
    }
  }
}

// Rows [first, first + count) of a block as numbers in `dtype`, [count, K].
inline void unpack_block(const Int4Weights& w, int64_t first, int64_t count, int64_t K,
                         int64_t groups, char* out) {
  const int64_t half = count / 2, group = K / groups, size = width(w.scale_dtype, 1);
  const bool halves = w.halves && count == w.block;
  std::vector<int8_t> codes(whole(K, W));
  std::vector<float> row(whole(K, W) + W);
  for (int64_t r = 0; r < count; r++, out += K * width(w.dtype, 1)) {
    const bool high = halves ? r >= half : r % 2;
    const char* p = w.codes + first * K / 2 + (halves ? r % half : r / 2);
    const int shift = high ? 4 : 0;
    int8_t* to = codes.data();
    for (int64_t k = 0; k < K; k++) to[k] = p[k * half] >> shift & 15;
    for (int64_t g = 0; g < groups; g++) {
      vf scale, eight;
      scales_some(w.scale_dtype, w.scales + (g * w.N + first + r) * 2 * size, 1, 1, scale, eight);
      const vf s = spread(scale[0]), z = spread(eight[0] - 8 * scale[0]);
      for (int64_t j = 0; j < group; j += W) {
        const int64_t k = g * group + j;
        store(&row[k], row_some<ByteRow>((const char*)to + k, K - k) * s + z);
      }
    }
    store_row(w.dtype, row.data(), K, out);
  }
}
