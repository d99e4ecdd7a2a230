// The two reductions over rows of codes, for G queries at once: dots with keys, sums of values.
#pragma once
#include "codecs.h"

constexpr int64_t BLOCK = 64;  // rows that are read together: they fit the first-level cache
constexpr int LANES = W;       // dots that are reduced together

// How keys of one kind multiply queries: queries' type, elements of a step and of its parts, which
// meet one vector of queries each.
template <class R>
struct Floats {
  typedef float Q;
  typedef vf Sum;
  static constexpr int STEP = W, PART = W;
  static INLINE vf at(const char* p) { return row_at<R>(p); }
  static INLINE vf end(const char* p, int64_t n) { return row_end<R>(p, n); }
  static INLINE vf add(vf sum, vf x, vf q, int) { return sum + x * q; }
  static constexpr int64_t BYTES = W * sizeof(typename R::T);
};

// Queries in 16 bits, rounded to 2^-16 of their largest: far finer than half precision itself.
struct Integers {
  typedef int16_t Q;
  typedef vi Sum;
  static constexpr int STEP = 2 * W, PART = 2 * W;
  static INLINE vs at(const char* p) { return shorts((const int8_t*)p); }
  static INLINE vs end(const char* p, int64_t n) {
    int8_t held[STEP] = {};
    std::memcpy(held, p, n);
    return shorts(held);
  }
  static INLINE vi add(vi sum, vs x, vi q, int) { return add_products(sum, x, (vs)q); }
  static constexpr int64_t BYTES = STEP;
};

// Packed int4 without unpacking: four codes of 16 bits are shifted apart, see `nibble_at`.
struct Nibbles {
  typedef int16_t Q;
  typedef vi Sum;
  typedef uint16_t vu __attribute__((vector_size(4 * W)));
  static constexpr int STEP = 8 * W, PART = 2 * W;
  static constexpr int64_t BYTES = 4 * W;
  static INLINE vu at(const char* p) { return load<vu>(p); }
  static INLINE vu end(const char*, int64_t) { return vu{}; }
  static INLINE vi add(vi sum, vu x, vi q, int part) {
    return add_products(sum, (vs)(part < 3 ? x >> 4 * part & 15 : x >> 12), (vs)q);
  }
  static bool fits(int64_t D) { return INTEGERS && D % STEP == 0; }
};

// Which element of a query stands at place i of one that meets `Nibbles`.
inline int64_t nibble_at(int64_t i, int64_t D) {
  const int64_t step = i / Nibbles::STEP, shift = i % Nibbles::STEP / (2 * W), lane = i % (2 * W);
  return step * Nibbles::BYTES + 2 * lane + shift / 2 + shift % 2 * (D / 2);
}

// dots[g][r] = q[g] . row r, for n <= BLOCK rows; dots has room for LANES more.
template <class K, int G>
void dot_rows(const char* rows, int64_t stride, int64_t n, int64_t D, const typename K::Q* q,
              int64_t ldq, float (*dots)[BLOCK + LANES]) {
  constexpr int S = LANES / G;
  for (int64_t r = 0; r < n; r += S) {
    const char* row[S];
    UNROLL for (int s = 0; s < S; s++) row[s] = rows + (r + s < n ? r + s : n - 1) * stride;
    typename K::Sum sum[LANES];  // of query g and row r + s at g * S + s
    UNROLL for (int i = 0; i < LANES; i++) sum[i] = typename K::Sum{};
    for (int64_t j = 0; j < D; j += K::STEP) {
      decltype(K::at(nullptr)) x[S];
      UNROLL for (int s = 0; s < S; s++) {
        const char* p = row[s] + j / K::STEP * K::BYTES;
        ahead(p);
        x[s] = j + K::STEP <= D ? K::at(p) : K::end(p, D - j);
      }
      UNROLL for (int part = 0; part < K::STEP / K::PART; part++)
        UNROLL for (int g = 0; g < G; g++) {  // a query is read once for all rows
          const auto y = load<typename K::Sum>(q + g * ldq + j + part * K::PART);
          UNROLL for (int s = 0; s < S; s++)
            sum[g * S + s] = K::add(sum[g * S + s], x[s], y, part);
        }
    }
    const vf all = numbers(all_sums(sum));
    UNROLL for (int g = 0; g < G; g++)
      std::memcpy(&dots[g][r], (const float*)&all + g * S, S * sizeof(float));
  }
}

// sums[g][0..N * W] += weights[g] . columns of the rows; `left` < W: only so many elements.
template <class R, int G, int N, bool END>
INLINE void sum_columns(const char* rows, int64_t stride, int64_t n, int64_t left,
                        const float (*weights)[BLOCK], float* sums, int64_t ld) {
  vf sum[G][N];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int i = 0; i < N; i++) sum[g][i] = load<vf>(sums + g * ld + i * W);
  for (int64_t r = 0; r < n; r++, rows += stride) {
    vf w[G];
    UNROLL for (int g = 0; g < G; g++) w[g] = spread(weights[g][r]);
    UNROLL for (int i = 0; i < N; i++) {
      const char* p = rows + i * W * sizeof(typename R::T);
      ahead(p);
      vf x = END ? row_end<R>(p, left) : row_at<R>(p);
      UNROLL for (int g = 0; g < G; g++) sum[g][i] += w[g] * x;
    }
  }
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int i = 0; i < N; i++) store(sums + g * ld + i * W, sum[g][i]);
}

// sums[g] += sum over rows of weights[g][r] * row r; sums has room for whole vectors.
template <class R, int G>
void sum_rows(const char* rows, int64_t stride, int64_t n, int64_t D,
              const float (*weights)[BLOCK], float* sums, int64_t ld) {
  constexpr int N = (G == 1 ? 8 : G <= 3 ? 4 : G <= 6 ? 2 : 1) * REGISTERS / 16;
  constexpr int64_t size = sizeof(typename R::T);
  int64_t j = 0;
  for (; j + N * W <= D; j += N * W)
    sum_columns<R, G, N, false>(rows + j * size, stride, n, 0, weights, sums + j, ld);
  for (; j + W <= D; j += W)
    sum_columns<R, G, 1, false>(rows + j * size, stride, n, 0, weights, sums + j, ld);
  if (j < D)
    sum_columns<R, G, 1, true>(rows + j * size, stride, n, D - j, weights, sums + j, ld);
}

// The same for bytes, the weights in 16 bits, two rows at a time; `units[g]` undoes their scale.
// N times 2 W columns.
template <int G, int N>
INLINE void add_two_rows(const char* a, const char* b, int64_t r, const int16_t (*weights)[BLOCK],
                         vi (&sum)[G][2 * N]) {
  vs x[2 * N];
  UNROLL for (int i = 0; i < N; i++) interleave(a + i * 2 * W, b + i * 2 * W, x + 2 * i);
  UNROLL for (int g = 0; g < G; g++) {
    const vs w = (vs)(vi{} + load<int32_t>(&weights[g][r]));
    UNROLL for (int i = 0; i < 2 * N; i++) sum[g][i] = add_products(sum[g][i], x[i], w);
  }
}

template <int G, int N>
INLINE void sum_byte_columns(const char* rows, int64_t stride, int64_t n,
                             const int16_t (*weights)[BLOCK], const float* units, float* sums,
                             int64_t ld) {
  vi sum[G][2 * N];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int i = 0; i < 2 * N; i++) sum[g][i] = vi{};
  int64_t r = 0;
  for (; r + 2 <= n; r += 2, rows += 2 * stride)
    add_two_rows<G, N>(rows, rows + stride, r, weights, sum);
  if (r < n) add_two_rows<G, N>(rows, rows, r, weights, sum);  // the second with no weight
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int i = 0; i < N; i++) in_order(sum[g][2 * i], sum[g][2 * i + 1]);
    UNROLL for (int i = 0; i < 2 * N; i++) {
      float* to = sums + g * ld + i * W;
      store(to, load<vf>(to) + number(sum[g][i]) * units[g]);
    }
  }
}

template <int G>
void sum_bytes(const char* rows, int64_t stride, int64_t n, int64_t D,
               const int16_t (*weights)[BLOCK], const float* units, float* sums, int64_t ld) {
  constexpr int N = std::max(1, (G == 1 ? 4 : G == 2 ? 2 : G <= 4 ? 1 : 0) * REGISTERS / 16);
  int64_t j = 0;
  for (; j + N * 2 * W <= D; j += N * 2 * W)
    sum_byte_columns<G, N>(rows + j, stride, n, weights, units, sums + j, ld);
  for (; j + 2 * W <= D; j += 2 * W)
    sum_byte_columns<G, 1>(rows + j, stride, n, weights, units, sums + j, ld);
  if (j == D) return;
  char end[BLOCK * 2 * W] = {};
  for (int64_t r = 0; r < n; r++) std::memcpy(end + r * 2 * W, rows + r * stride + j, D - j);
  sum_byte_columns<G, 1>(end, 2 * W, n, weights, units, sums + j, ld);
}

constexpr int MOST = 8;  // queries that one pass over the rows serves

// The functions by codec and number of queries; packed codes have become bytes.
#define GROUPS(f, ...) \
  {f<__VA_ARGS__ 1>, f<__VA_ARGS__ 2>, f<__VA_ARGS__ 3>, f<__VA_ARGS__ 4>, \
   f<__VA_ARGS__ 5>, f<__VA_ARGS__ 6>, f<__VA_ARGS__ 7>, f<__VA_ARGS__ 8>}
#define COMMA ,
#define OF_ROW(f, R) GROUPS(f, R COMMA)
#define FLOATS(R) Floats<R>
#define ITSELF(R) R

static const decltype(&dot_rows<Floats<F32Row>, 1>) DOT_ROWS[CODECS][MOST] =
    BY_CODEC(dot_rows, FLOATS);
static const decltype(&sum_rows<F32Row, 1>) SUM_ROWS[CODECS][MOST] = BY_CODEC(sum_rows, ITSELF);
static const decltype(&dot_rows<Integers, 1>) DOT_BYTES[MOST] =
    GROUPS(dot_rows, Integers COMMA);
static const decltype(&dot_rows<Nibbles, 1>) DOT_NIBBLES[MOST] =
    GROUPS(dot_rows, Nibbles COMMA);
static const decltype(&sum_bytes<1>) SUM_BYTES[MOST] = GROUPS(sum_bytes, );
