// The operators of linear_operator.py, linear_int8_operator.py and linear_int4_operator.py.
#pragma once
#include "linear_int4.h"
#include "linear_int8.h"
#include "tensors.h"

namespace {

// Rows of a call as floats, in memory that stays this thread's until its next call.
struct Rows {
  Tensor x;
  int64_t dtype, M = 1, K;
  std::vector<int64_t> shape;
  Inputs in;

  explicit Rows(const Tensor& any_x, int64_t groups = 0) : x(plain(any_x)) {
    static thread_local std::vector<float> rows, sums;
    dtype = type_of(x), K = x.size(-1);
    STD_TORCH_CHECK(dtype <= F16, "arkv_cpu: rows in float32, bfloat16 or float16 only");
    for (int64_t i = 0; i < x.dim(); i++) shape.push_back(x.size(i));
    for (size_t i = 0; i + 1 < shape.size(); i++) M *= shape[i];
    const int64_t ld = whole(K, W), wide = width(dtype, K);
    rows.assign(M * ld, 0.0f);
    for (int64_t m = 0; m < M; m++) load_row(dtype, data<char>(x) + m * wide, K, &rows[m * ld]);
    in = {M, K, ld, rows.data()};
    if (!groups) return;
    STD_TORCH_CHECK(K % groups == 0, "arkv_cpu: groups must divide the width");
    in.groups = groups;
    sums.resize(M * groups + W);
    for (int64_t m = 0; m < M; m++) add_groups(&rows[m * ld], K / groups, groups, &sums[m * groups]);
    in.sums = sums.data();
  }

  // What N weights make of the rows.
  Tensor out(int64_t N) {
    shape.back() = N;
    return torch::stable::new_empty(x, shape);
  }

  const char* bias(const std::vector<Tensor>& biases, size_t i, int64_t N) const {
    if (biases.empty()) return nullptr;
    STD_TORCH_CHECK(type_of(biases[i]) == dtype && biases[i].numel() == N,
                    "arkv_cpu: a bias must agree with its weight in dtype and length");
    return data<char>(biases[i]);
  }
};

// As in add_segments: fifty microseconds are half a megabyte of weights.
int64_t threads_for(int64_t bytes) {
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + (bytes >> 19));
}

std::vector<Tensor> linear(const Tensor& x, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& biases) {
  Rows rows(x);
  std::vector<Tensor> out;
  std::vector<Weights> given;
  int64_t bytes = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    STD_TORCH_CHECK(type_of(w) == rows.dtype && w.dim() == 2 && w.size(1) == rows.K,
                    "arkv_cpu: rows and weights must agree in dtype and width");
    const int64_t N = w.size(0);
    out.push_back(rows.out(N));
    given.push_back(
        {rows.dtype, N, data<char>(w), rows.bias(biases, i, N), data<char>(out.back())});
    bytes += N * width(rows.dtype, rows.K);
  }
  multiply_all(given, rows.in, threads_for(bytes));
  return out;
}

int64_t scale_type(const Tensor& scales) {
  const int64_t type = type_of(scales);
  STD_TORCH_CHECK(type <= F16, "arkv_cpu: scales in float32, bfloat16 or float16 only");
  return type;
}

// Groups of the columns of N rows that have so many scales, or one for all.
int64_t groups_of(const Tensor& scales, int64_t N) {
  const int64_t n = scales.numel();
  STD_TORCH_CHECK(n == 1 || (N > 0 && n > 0 && n % N == 0),
                  "arkv_cpu: scales must agree with their weight in rows");
  return n == 1 ? 1 : n / N;
}

std::vector<Tensor> linear_int8(const Tensor& x, const std::vector<Tensor>& codes,
                                const std::vector<Tensor>& scales,
                                const std::vector<Tensor>& zeros,
                                const std::vector<Tensor>& biases) {
  std::vector<Tensor> out;
  if (codes.empty()) return out;
  STD_TORCH_CHECK(scales.size() == codes.size() &&
                      (zeros.empty() || zeros.size() == codes.size()) &&
                      (biases.empty() || biases.size() == codes.size()),
                  "arkv_cpu: scales, zero points and biases for each weight, or none");
  const int64_t groups = groups_of(scales[0], codes[0].size(0));
  Rows rows(x, groups);
  std::vector<Int8Weights> given;
  int64_t bytes = 0;
  for (size_t i = 0; i < codes.size(); i++) {
    const Tensor& w = codes[i];
    const int64_t N = w.size(0), n = scales[i].numel();
    STD_TORCH_CHECK(w.scalar_type() == ScalarType::Char && w.dim() == 2 && w.size(1) == rows.K,
                    "arkv_cpu: codes must be int8 and as wide as the rows");
    STD_TORCH_CHECK(groups_of(scales[i], N) == groups, "arkv_cpu: weights of one grouping only");
    const int8_t* zero = nullptr;
    if (!zeros.empty()) {
      STD_TORCH_CHECK(zeros[i].scalar_type() == ScalarType::Char && zeros[i].numel() == n,
                      "arkv_cpu: zero points must be int8 and as many as scales");
      zero = data<int8_t>(zeros[i]);
    }
    out.push_back(rows.out(N));
    given.push_back({rows.dtype, N, data<char>(w), rows.bias(biases, i, N),
                     data<char>(out.back()), scale_type(scales[i]), n == 1,
                     data<char>(scales[i]), zero});
    bytes += N * rows.K;
  }
  share(given, W, threads_for(bytes), [&](const Int8Weights& w, int64_t first, int64_t last) {
    multiply_int8(w, first, last, rows.in);
  });
  return out;
}

std::vector<Tensor> linear_int4(const Tensor& x, const std::vector<Tensor>& codes,
                                const std::vector<Tensor>& scales,
                                const std::vector<Tensor>& biases, int64_t block, bool halves) {
  std::vector<Tensor> out;
  if (codes.empty()) return out;
  STD_TORCH_CHECK(scales.size() == codes.size() &&
                      (biases.empty() || biases.size() == codes.size()),
                  "arkv_cpu: scales and biases for each weight, or none");
  STD_TORCH_CHECK(block > 0 && block <= 64 && block % 2 == 0, "arkv_cpu: blocks of up to 64 rows");
  const int64_t groups = scales[0].size(0);
  STD_TORCH_CHECK(groups > 0, "arkv_cpu: groups must divide the width");
  Rows rows(x, groups);
  std::vector<Int4Weights> given;
  int64_t bytes = 0;
  for (size_t i = 0; i < codes.size(); i++) {
    const Tensor &w = codes[i], &s = scales[i];
    const int64_t N = w.size(0);
    STD_TORCH_CHECK(w.scalar_type() == ScalarType::Byte && w.dim() == 2 && N % 2 == 0 &&
                        2 * w.size(1) == rows.K,
                    "arkv_cpu: codes must be bytes and half as wide as the rows");
    STD_TORCH_CHECK(s.dim() == 3 && s.size(0) == groups && s.size(1) == N && s.size(2) == 2,
                    "arkv_cpu: scales must agree with their weight in rows and grouping");
    out.push_back(rows.out(N));
    given.push_back({rows.dtype, N, data<char>(w), rows.bias(biases, i, N),
                     data<char>(out.back()), scale_type(s), data<char>(s), block, halves});
    bytes += N * rows.K / 2;
  }
  share(given, block, threads_for(bytes), [&](const Int4Weights& w, int64_t first, int64_t last) {
    multiply_int4(w, first, last, rows.in);
  });
  return out;
}

void unpack_int4(Tensor out, const Tensor& codes, const Tensor& scales, int64_t first,
                 int64_t block, bool halves) {
  const int64_t N = codes.size(0), K = 2 * codes.size(1), groups = scales.size(0);
  const int64_t count = out.size(0), dtype = scale_type(out);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == K && scales.size(1) == N && scales.dim() == 3 &&
                      groups > 0 && K % groups == 0 && codes.scalar_type() == ScalarType::Byte,
                  "arkv_cpu: codes, scales and what comes out must agree");
  STD_TORCH_CHECK(block > 0 && first % block == 0 && first + count <= N,
                  "arkv_cpu: whole blocks of what there is");
  STD_TORCH_CHECK(count % block == 0 || first + count == N, "arkv_cpu: whole blocks only");
  const Int4Weights w{dtype, N, data<char>(codes), nullptr, nullptr, scale_type(scales),
                      data<char>(scales), block, halves};
  char* to = data<char>(out);
  const int64_t blocks = (count + block - 1) / block;
#pragma omp parallel for num_threads(threads_for(count * K))
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = first + b * block;
    // The last block of the weight is a short one; of other blocks all rows are asked for.
    unpack_block(w, at, std::min(block, N - at), K, groups, to + b * block * K * width(dtype, 1));
  }
}

}  // namespace
