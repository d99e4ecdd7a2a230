// The two reductions over rows of codes, for G queries at once: dots with keys, sums of values.
#pragma once
#include "codecs.h"

constexpr int64_t BLOCK = 64;  // rows that are read together: they fit the first-level cache
constexpr int LANES = 8;       // dots that are reduced together

// dots[g][r] = q[g] . row r, for n <= BLOCK rows; dots has room for LANES more.
template <class R, int G>
void dot_rows(const char* rows, int64_t stride, int64_t n, int64_t D, const float* q, int64_t ldq,
              float (*dots)[BLOCK + LANES]) {
  constexpr int S = LANES / G;
  constexpr int64_t size = sizeof(typename R::T);
  for (int64_t r = 0; r < n; r += S) {
    const char* row[S];
    for (int s = 0; s < S; s++) row[s] = rows + (r + s < n ? r + s : n - 1) * stride;
    vf sum[LANES] = {};
    int64_t j = 0;
    for (; j + W <= D; j += W) {
      vf x[S];
      for (int s = 0; s < S; s++) x[s] = row_at<R>(row[s] + j * size);
      for (int g = 0; g < G; g++) {
        vf y = load<vf>(q + g * ldq + j);
        for (int s = 0; s < S; s++) sum[s * G + g] += x[s] * y;
      }
    }
    if (j < D)
      for (int s = 0; s < S; s++) {
        vf x = row_end<R>(row[s] + j * size, D - j);
        for (int g = 0; g < G; g++) sum[s * G + g] += x * load<vf>(q + g * ldq + j);
      }
    f8 all = totals(sum);
    for (int s = 0; s < S; s++)
      for (int g = 0; g < G; g++) dots[g][r + s] = all[s * G + g];
  }
}

// sums[g][0..N * W] += weights[g] . columns of the rows; `left` < W: only so many elements.
template <class R, int G, int N, bool END>
INLINE void sum_columns(const char* rows, int64_t stride, int64_t n, int64_t left,
                        const float (*weights)[BLOCK], float* sums, int64_t ld) {
  vf sum[G][N];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < N; i++) sum[g][i] = load<vf>(sums + g * ld + i * W);
  for (int64_t r = 0; r < n; r++, rows += stride) {
    vf w[G];
    for (int g = 0; g < G; g++) w[g] = spread(weights[g][r]);
    for (int i = 0; i < N; i++) {
      const char* p = rows + i * W * sizeof(typename R::T);
      vf x = END ? row_end<R>(p, left) : row_at<R>(p);
      for (int g = 0; g < G; g++) sum[g][i] += w[g] * x;
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < N; i++) store(sums + g * ld + i * W, sum[g][i]);
}

// sums[g] += sum over rows of weights[g][r] * row r; sums has room for whole vectors.
template <class R, int G>
void sum_rows(const char* rows, int64_t stride, int64_t n, int64_t D,
              const float (*weights)[BLOCK], float* sums, int64_t ld) {
  constexpr int N = G == 1 ? 8 : G <= 3 ? 4 : G <= 6 ? 2 : 1;  // what 16 registers hold
  constexpr int64_t size = sizeof(typename R::T);
  int64_t j = 0;
  for (; j + N * W <= D; j += N * W)
    sum_columns<R, G, N, false>(rows + j * size, stride, n, 0, weights, sums + j, ld);
  for (; j + W <= D; j += W)
    sum_columns<R, G, 1, false>(rows + j * size, stride, n, 0, weights, sums + j, ld);
  if (j < D)
    sum_columns<R, G, 1, true>(rows + j * size, stride, n, D - j, weights, sums + j, ld);
}

typedef void (*DotRows)(const char*, int64_t, int64_t, int64_t, const float*, int64_t,
                        float (*)[BLOCK + LANES]);
typedef void (*SumRows)(const char*, int64_t, int64_t, int64_t, const float (*)[BLOCK], float*,
                        int64_t);

#define FOR_GROUPS(f, R) {f<R, 1>, f<R, 2>, f<R, 3>, f<R, 4>, f<R, 5>, f<R, 6>, f<R, 7>, f<R, 8>}
#define FOR_CODECS(f)                                                                    \
  {FOR_GROUPS(f, F32Row), FOR_GROUPS(f, BF16Row), FOR_GROUPS(f, F16Row),                 \
   FOR_GROUPS(f, FP8Row), FOR_GROUPS(f, ByteRow), FOR_GROUPS(f, ByteRow), FOR_GROUPS(f, ByteRow)}

constexpr int MOST = 8;  // queries that one pass over the rows serves
static const DotRows DOT_ROWS[CODECS][MOST] = FOR_CODECS(dot_rows);
static const SumRows SUM_ROWS[CODECS][MOST] = FOR_CODECS(sum_rows);
