// The operator arkv_cpu::attend, see _attend in arkv_fx/ops/kernels/cpp/__init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attend.h"

namespace {

using torch::stable::Tensor;

template <class T>
T* data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "arkv_cpu::attend: contiguous CPU tensors only");
  return (T*)t.data_ptr();
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& position,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& sink,
    const std::optional<Tensor>& centre, const std::vector<Tensor>& slots,
    const std::vector<int64_t>& codecs, double scale, double softcap, int64_t sliding) {
  Call call{};
  call.batch = q.size(0), call.heads = q.size(1), call.groups = q.size(2);
  call.k_dim = q.size(4), call.v_dim = v.size(3);
  const auto type = q.scalar_type();
  call.dtype = type == torch::headeronly::ScalarType::Float      ? F32
               : type == torch::headeronly::ScalarType::BFloat16 ? BF16
                                                                 : F16;
  call.sliding = sliding, call.scale = scale, call.softcap = softcap;
  call.q = data<char>(q), call.position = data<int32_t>(position);
  call.sink = data<float>(sink), call.centre = data<float>(centre), call.bias = data<float>(bias);
  if (bias) {
    call.bias_length = bias->size(3);
    call.bias_head = bias->size(1) > 1 ? call.bias_length : 0;
    call.bias_batch = bias->size(0) > 1 ? bias->size(1) * call.bias_length : 0;
  }
  int64_t columns = 1;
  auto tensor = slots.begin();
  for (size_t i = 0; i < codecs.size(); i += 3) {
    Segment s{codecs[i], codecs[i + 1], 0, codecs[i + 2]};
    s.k = data<char>(*tensor++);
    if (s.k_codec >= FP8) s.k_scale = data<uint16_t>(*tensor++);
    if (rotated(s.k_codec)) s.k_zero = data<uint8_t>(*tensor++);
    s.v = data<char>(*tensor++);
    if (s.v_codec >= FP8) s.v_scale = data<uint16_t>(*tensor++);
    if (rotated(s.v_codec)) s.v_zero = data<uint8_t>(*tensor++);
    s.slots = tensor->size(2);
    s.pos = data<int32_t>(*tensor++);
    columns += s.slots;
    if (s.slots) call.segment.push_back(s);
  }
  // Another thread is worth its start from about fifty microseconds of work on.
  const int64_t work = call.batch * call.heads * call.groups * columns * (call.k_dim + call.v_dim);
  call.threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + (work >> 20));
  Segment own{call.dtype, call.dtype, 1};
  own.k = data<char>(k), own.v = data<char>(v);
  call.segment.push_back(own);
  const auto floats = torch::headeronly::ScalarType::Float;
  Tensor out = torch::stable::new_empty(
      q, {call.batch, call.heads, call.groups, 1, call.v_dim}, floats);
  Tensor probs =
      torch::stable::new_empty(q, {call.batch, call.heads, call.groups, 1, columns}, floats);
  call.out = data<float>(out), call.probs = data<float>(probs);
  Attention(call).run();
  return {out, probs};
}

STABLE_TORCH_LIBRARY_IMPL(arkv_cpu, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }

}  // namespace
