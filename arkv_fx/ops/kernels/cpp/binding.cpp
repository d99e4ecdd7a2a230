// The operators arkv_cpu::attend, step and encode, see attend.py, step.py and encode.py beside this
// file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "encode.h"
#include "step.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;
typedef std::vector<Tensor>::const_iterator Next;

template <class T>
T* data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "arkv_cpu: contiguous CPU tensors only");
  return (T*)t.data_ptr();
}

template <class T>
T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

int64_t type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float ? F32 : type == ScalarType::BFloat16 ? BF16
         : type == ScalarType::Half ? F16 : Mask::BOOL;
}

Mask mask_of(const Maybe& mask) {
  if (!mask) return {};
  auto stride = [&](int i) { return mask->size(i) > 1 ? mask->stride(i) : 0; };
  return {(const char*)mask->data_ptr(), type_of(*mask), mask->size(3),
          stride(0), stride(1), stride(3)};
}

Stored stored(int64_t codec, Next& tensor) {
  Stored s{codec, data<char>(*tensor++)};
  if (codec >= FP8) s.scale = data<uint16_t>(*tensor++);
  if (rotated(codec)) s.zero = data<uint8_t>(*tensor++);
  return s;
}

// What attend and step take; `tensor` then stands behind the segments' fields.
Call call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& position,
             const Maybe& mask, const Maybe& sink, const Tensor& pos, Next& tensor,
             const std::vector<int64_t>& codecs, double scale, double softcap, int64_t sliding) {
  Call call{};
  call.batch = k.size(0), call.heads = k.size(1), call.k_dim = k.size(3), call.v_dim = v.size(3);
  call.groups = q.size(1) / call.heads, call.slots = pos.size(2), call.dtype = type_of(q);
  call.sliding = sliding, call.scale = scale, call.softcap = softcap;
  call.q = data<char>(q), call.position = data<int32_t>(position);
  call.mask = mask_of(mask), call.sink = data<float>(sink);
  STD_TORCH_CHECK(type_of(k) == call.dtype && type_of(v) == call.dtype &&
                      pos.size(0) == call.batch && pos.size(1) == call.heads,
                  "arkv_cpu: q, k, v and the state must agree in dtype, batch and heads");
  int64_t start = 0;
  for (size_t i = 0; i < codecs.size(); i += 3) {
    Segment s{tensor->size(2), codecs[i + 2], data<int32_t>(pos) + start};
    s.k = stored(codecs[i], tensor), s.v = stored(codecs[i + 1], tensor);
    start += s.slots;
    if (s.slots) call.segment.push_back(s);
  }
  const Stored key{call.dtype, data<char>(k)}, value{call.dtype, data<char>(v)};
  call.segment.push_back({1, 0, nullptr, key, value});
  // Another thread is worth its start from about fifty microseconds of work on.
  const int64_t columns = call.slots + 1;
  const int64_t work = call.batch * call.heads * call.groups * columns * (call.k_dim + call.v_dim);
  call.threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + (work >> 20));
  return call;
}

std::tuple<Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& position, const Maybe& mask,
    const Maybe& sink, const Maybe& centre, const Tensor& pos, const std::vector<Tensor>& fields,
    const std::vector<int64_t>& codecs, double scale, double softcap, int64_t sliding) {
  Next tensor = fields.begin();
  Call call = call_of(q, k, v, position, mask, sink, pos, tensor, codecs, scale, softcap, sliding);
  call.centre = data<float>(centre);
  const int64_t columns = call.slots + 1;
  Tensor out = torch::stable::new_empty(
      q, {call.batch, call.heads, call.groups, 1, call.v_dim}, ScalarType::Float);
  Tensor probs = torch::stable::new_empty(
      q, {call.batch, call.heads, call.groups, 1, columns}, ScalarType::Float);
  call.out = data<char>(out), call.out_dtype = F32;
  float* to = data<float>(probs);
  Attention attention(call);
  attention.run([&](int64_t head) {
    const int64_t first = head * call.groups;
    attention.probabilities<false>(first, first + call.groups, to + first * columns);
  });
  return {out, probs};
}

// `state` as LayerPlan.specs() orders it, `options` and `weights` as step.py.
Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
            const Maybe& sink, const std::vector<Tensor>& state,
            const std::vector<int64_t>& codecs, const std::vector<int64_t>& options,
            const std::vector<double>& weights, double scale, double softcap) {
  const int64_t sinks = options[0], sliding = options[1];
  Score score{};
  score.has_mass = options[3], score.has_norm = options[4], score.has_novelty = options[5];
  score.use_age = options[6], score.log2_decay = weights[0], score.margin = weights[1];
  Next tensor = state.begin();
  State held{};
  held.count = data<int32_t>(*tensor++), held.seen = data<int32_t>(*tensor++);
  held.bad = data<int32_t>(*tensor++);
  if (score.has_novelty) held.key_sum = data<float>(*tensor++);
  float* centre = options[2] ? data<float>(*tensor++) : nullptr;
  const Tensor& pos = *tensor++;
  held.pos = data<int32_t>(pos);
  if (score.has_mass) held.stats.mass = data<float>(*tensor++);
  if (score.has_norm) held.stats.norm = data<uint16_t>(*tensor++);
  if (score.has_novelty) held.stats.novelty = data<int16_t>(*tensor++);
  Call call = call_of(q, k, v, state[1], mask, sink, pos, tensor, codecs, scale, softcap, sliding);
  call.centre = centre;
  Tensor out = torch::stable::new_empty(q, {call.batch, q.size(1), 1, call.v_dim});
  call.out = data<char>(out), call.out_dtype = call.dtype;
  Step(call, held, score, sinks).run();
  return out;
}

void encode_vectors(const Tensor& x, const Tensor& rows, const Maybe& centre, int64_t codec,
                    const std::vector<Tensor>& fields) {
  Vectors from{type_of(x), (const char*)x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}};
  STD_TORCH_CHECK(x.is_cpu() && from.dtype <= F16 && (x.size(3) == 1 || x.stride(3) == 1),
                  "arkv_cpu: floats on a CPU only, with the elements of a vector side by side");
  from.heads = x.size(1), from.slots = rows.size(2), from.D = x.size(3);
  from.rows = data<int64_t>(rows), from.centre = data<float>(centre);
  const int64_t n = x.size(0) * from.heads * from.slots;
  const int64_t length = x.size(2);
  bool inside = true;
  for (int64_t i = 0; i < n; i++) inside &= from.rows[i] < length;
  STD_TORCH_CHECK(inside, "arkv_cpu: a row outside its tensor");
  Next tensor = fields.begin();
  const Stored to = stored(codec, tensor);
  // As in call_of; a vector's element costs some nanoseconds.
  const int64_t most = 1 + (n * from.D >> 15);
  encode_all(from, to, n, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

STABLE_TORCH_LIBRARY_IMPL(arkv_cpu, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("step", TORCH_BOX(&step));
  m.impl("encode", TORCH_BOX(&encode_vectors));
}

}  // namespace
