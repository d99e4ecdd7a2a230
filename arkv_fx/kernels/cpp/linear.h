// A few rows times weights as they lie in memory: what bounds it is to read them, once.
#pragma once
#include "vectors.h"

constexpr int ROWS = 4;  // that one pass over the weights serves

// Weights [N, K], their bias [N] or null and what comes out, [M, N], all in one dtype.
struct Weights {
  int64_t dtype, N;
  const char *data, *bias;
  char* out;
};

// Rows as floats [M, ld], zeros behind their K elements; `sums` of each group of them, [M, groups],
// for weights that have zero points.
struct Inputs {
  int64_t M, K, ld;
  const float* x;
  int64_t groups = 1;
  const float* sums = nullptr;
};

// out[m][0..W) = x[m] . each of n <= W weights. One weight after the other, from its begin to its
// end: the processor reads ahead of that by itself, and of eight at a time it does not.
template <class R, int M>
INLINE void dots(const char* w, int64_t n, int64_t K, const float* x, int64_t ld, vf* out) {
  constexpr int A = M == 1 ? 4 : 2;  // sums side by side: one would wait for itself
  constexpr int64_t size = sizeof(typename R::T);
  vf row[M][W] = {};
  for (int64_t i = 0; i < n; i++, w += K * size) {
    vf sum[M][A];
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int a = 0; a < A; a++) sum[m][a] = vf{};
    int64_t j = 0;
    for (; j + A * W <= K; j += A * W) {
      UNROLL for (int a = 0; a < A; a++) {
        const char* p = w + (j + a * W) * size;
        __builtin_prefetch(p + 8192);
        const vf y = row_at<R>(p);
        UNROLL for (int m = 0; m < M; m++) sum[m][a] += y * load<vf>(x + m * ld + j + a * W);
      }
    }
    for (; j < K; j += W) {
      const vf y = row_some<R>(w + j * size, K - j);
      UNROLL for (int m = 0; m < M; m++) sum[m][0] += y * load<vf>(x + m * ld + j);
    }
    UNROLL for (int m = 0; m < M; m++) {
      UNROLL for (int a = 1; a < A; a++) sum[m][0] += sum[m][a];
      row[m][i] = sum[m][0];
    }
  }
  UNROLL for (int m = 0; m < M; m++) out[m] = all_sums(row[m]);
}

// The products with weights [first, last) of all rows.
template <class R>
void multiply(const Weights& w, int64_t first, int64_t last, const Inputs& in) {
  constexpr int64_t size = sizeof(typename R::T);
  for (int64_t n = first; n < last; n += W) {
    const int64_t count = std::min<int64_t>(W, last - n);
    const char* data = w.data + n * in.K * size;
    const vf bias = w.bias ? row_some<R>(w.bias + n * size, count) : vf{};
    for (int64_t m = 0; m < in.M; m += ROWS) {
      vf out[ROWS];
      const float* x = in.x + m * in.ld;
      const int64_t rows = std::min<int64_t>(ROWS, in.M - m);
      if (rows == 1) dots<R, 1>(data, count, in.K, x, in.ld, out);
      if (rows == 2) dots<R, 2>(data, count, in.K, x, in.ld, out);
      if (rows == 3) dots<R, 3>(data, count, in.K, x, in.ld, out);
      if (rows == 4) dots<R, 4>(data, count, in.K, x, in.ld, out);
      for (int64_t i = 0; i < rows; i++) {
        float y[W];
        store(y, out[i] + bias);
        store_row(w.dtype, y, count, w.out + ((m + i) * w.N + n) * size);
      }
    }
  }
}

// The sums of a row's groups, W of them at once: `sums` has room for W more.
inline void add_groups(const float* x, int64_t group, int64_t groups, float* sums) {
  for (int64_t g = 0; g < groups; g += W) {
    vf sum[W] = {};
    for (int64_t i = 0; i < std::min<int64_t>(W, groups - g); i++, x += group)
      for (int64_t j = 0; j < group; j += W) sum[i] += load_some<vf>(x + j, group - j);
    store(sums + g, all_sums(sum));
  }
}

// Weights that read the same rows, shared out to threads as if they were one: multiply(weight, first,
// last) is called with rows that begin at whole steps.
template <class V, class F>
void share(const std::vector<V>& weights, int64_t step, int64_t threads, F multiply) {
  int64_t blocks = 0;
  for (const V& w : weights) blocks += whole(w.N, step) / step;
  const auto some = [&](int64_t begin, int64_t end) {
    int64_t at = 0;  // of this weight's first block among all
    for (const V& w : weights) {
      const int64_t own = whole(w.N, step) / step;
      const int64_t from = std::max<int64_t>(begin - at, 0), to = std::min(end - at, own);
      at += own;
      if (from < to) multiply(w, from * step, std::min(to * step, w.N));
    }
  };
  if (threads == 1) return some(0, blocks);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < threads; i++) some(blocks * i / threads, blocks * (i + 1) / threads);
}

inline void multiply_all(const std::vector<Weights>& weights, const Inputs& in, int64_t threads) {
  share(weights, W, threads, [&](const Weights& w, int64_t first, int64_t last) {
    if (w.dtype == F32) multiply<F32Row>(w, first, last, in);
    if (w.dtype == BF16) multiply<BF16Row>(w, first, last, in);
    if (w.dtype == F16) multiply<F16Row>(w, first, last, in);
  });
}
