// Tensors of torch as C++ that knows their addresses and dtypes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "mask.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;
typedef char* const* Addresses;

template <class T>
T* data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "arkv_cpu: contiguous CPU tensors only");
  return (T*)t.data_ptr();
}

template <class T>
T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

Tensor plain(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

int64_t type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float ? F32 : type == ScalarType::BFloat16 ? BF16
         : type == ScalarType::Half ? F16 : Mask::BOOL;
}

}  // namespace
