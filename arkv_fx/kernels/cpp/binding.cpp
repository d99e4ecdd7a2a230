// The operators arkv_cpu::attend, step, encode and those of bind_linear.h, see *_operator.py beside
// this file.
#include "bind_linear.h"
#include "encode.h"
#include "step.h"

namespace {

Mask mask_of(const Maybe& mask) {
  if (!mask) return {};
  auto stride = [&](int i) { return mask->size(i) > 1 ? mask->stride(i) : 0; };
  return {(const char*)mask->data_ptr(), type_of(*mask), mask->size(3),
          stride(0), stride(1), stride(3)};
}

std::vector<char*> addresses_of(const std::vector<Tensor>& tensors) {
  std::vector<char*> out;
  for (const Tensor& t : tensors) out.push_back(data<char>(t));
  return out;
}

Stored stored(int64_t codec, Addresses& field) {
  Stored s{codec, *field++};
  if (scaled(codec)) s.scale = (uint16_t*)*field++;
  if (rotated(codec)) s.zero = (uint8_t*)*field++;
  return s;
}

// The sizes of a call and its new token; the rest is left to whoever calls.
Call call_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  Call call{};
  call.batch = k.size(0), call.heads = k.size(1), call.k_dim = k.size(3), call.v_dim = v.size(3);
  call.groups = q.size(1) / call.heads, call.dtype = type_of(q);
  STD_TORCH_CHECK(type_of(k) == call.dtype && type_of(v) == call.dtype,
                  "arkv_cpu: q, k and v must agree in dtype");
  call.q = data<char>(q), call.k = data<char>(k), call.v = data<char>(v);
  return call;
}

// Whether positions are those of the segments of this call.
void check_positions(const Call& call, const Tensor& pos) {
  STD_TORCH_CHECK(pos.size(0) == call.batch && pos.size(1) == call.heads &&
                      pos.size(2) == call.slots,
                  "arkv_cpu: the state must agree with k and the plan in batch, heads and slots");
}

// `n` numbers as arguments.py has them in `codecs`, and where the segments' fields lie.
void add_segments(Call& call, const int64_t* codecs, int64_t n, Positions pos, Addresses& field) {
  call.slots = 0;
  for (const int64_t* c = codecs; c < codecs + n; c += 4) {
    Segment s{c[3], c[2], pos + call.slots};
    s.k = stored(c[0], field), s.v = stored(c[1], field);
    call.slots += s.slots;
    if (s.slots) call.segment.push_back(s);
  }
  const Stored key{call.dtype, call.k}, value{call.dtype, call.v};
  call.segment.push_back({1, 0, {}, key, value});
  // Another thread is worth its start from about fifty microseconds of work on.
  const int64_t columns = call.slots + 1;
  const int64_t work = call.batch * call.heads * call.groups * columns * (call.k_dim + call.v_dim);
  call.threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + (work >> 20));
}

std::tuple<Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& position, const Maybe& mask,
    const Maybe& sink, const Maybe& centre, const Tensor& pos, const std::vector<Tensor>& fields,
    const std::vector<int64_t>& codecs, double scale, double softcap, int64_t sliding) {
  Call call = call_of(q, k, v);
  const std::vector<char*> held = addresses_of(fields);
  Addresses field = held.data();
  const bool narrow = pos.scalar_type() == ScalarType::Short;
  add_segments(call, codecs.data(), codecs.size(), {data<char>(pos), narrow}, field);
  check_positions(call, pos);
  call.sliding = sliding, call.scale = scale, call.softcap = softcap;
  call.position = data<int32_t>(position), call.centre = data<float>(centre);
  call.mask = mask_of(mask), call.sink = data<float>(sink);
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

// Queries times and the key divided by the channels' numbers, as ops/balance.py, in copies that stay
// until this thread's next call: powers of two, so nothing is rounded.
void balance(Call& call, const float* scale) {
  static thread_local Scratch copies;
  static thread_local std::vector<float> row;
  const int64_t D = call.k_dim, wide = width(call.dtype, D), heads = call.batch * call.heads;
  copies.start(heads * (call.groups + 1) * wide + 2 * 64);
  char* q = copies.take<char>(heads * call.groups * wide);
  char* k = copies.take<char>(heads * wide);
  row.resize(whole(D, W));
  for (int64_t head = 0; head < heads; head++, scale += D) {
    for (int64_t i = head * call.groups; i < (head + 1) * call.groups; i++) {
      load_row(call.dtype, call.q + i * wide, D, row.data());
      for (int64_t j = 0; j < D; j++) row[j] *= scale[j];
      store_row(call.dtype, row.data(), D, q + i * wide);
    }
    load_row(call.dtype, call.k + head * wide, D, row.data());
    for (int64_t j = 0; j < D; j++) row[j] /= scale[j];
    store_row(call.dtype, row.data(), D, k + head * wide);
  }
  call.q = q, call.k = k;
}

// `state` as LayerPlan.specs() orders it, `options` and `weights` as step_operator.py.
void run_step(Call& call, Addresses state, const int64_t* codecs, int64_t n,
              const int64_t* options, const double* weights) {
  Score score{};
  score.has_mass = options[3], score.mass = options[3] == 2 ? F32 : F16;
  score.has_norm = options[4], score.has_novelty = options[5];
  score.use_age = options[6], score.log2_decay = weights[0], score.margin = weights[1];
  State held{};
  held.count = (int32_t*)*state++, held.seen = (int32_t*)*state++, held.bad = (int32_t*)*state++;
  score.ahead = options[10];
  if (score.has_novelty) held.key_sum = (float*)*state++;
  if (options[9]) held.value_sum = (float*)*state++;
  if (options[7]) balance(call, (const float*)*state++);
  if (options[2]) call.centre = (float*)*state++;
  held.pos = {*state++, options[8] != 0};
  if (score.has_mass) held.stats.mass = *state++;
  if (score.has_norm) held.stats.norm = (uint16_t*)*state++;
  if (score.has_novelty) held.stats.novelty = (int8_t*)*state++;
  add_segments(call, codecs, n, held.pos, state);
  call.position = held.seen, call.sliding = options[1], call.out_dtype = call.dtype;
  Step(call, held, score, options[0]).run();
}

Tensor step(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v, const Maybe& mask,
            const Maybe& sink, const std::vector<Tensor>& state,
            const std::vector<int64_t>& codecs, const std::vector<int64_t>& options,
            const std::vector<double>& weights, double scale, double softcap) {
  const Tensor q = plain(any_q), k = plain(any_k), v = plain(any_v);
  Call call = call_of(q, k, v);
  for (size_t i = 0; i < codecs.size(); i += 4) call.slots += codecs[i + 3];
  check_positions(call, state[3 + options[2] + options[5] + options[7] + options[9]]);
  call.mask = mask_of(mask), call.sink = data<float>(sink);
  call.scale = scale, call.softcap = softcap;
  Tensor out = torch::stable::new_empty(q, {call.batch, q.size(1), 1, call.v_dim});
  call.out = data<char>(out);
  run_step(call, addresses_of(state).data(), codecs.data(), codecs.size(), options.data(),
           weights.data());
  return out;
}

void encode_vectors(const Tensor& x, const Tensor& source, const Maybe& centre, int64_t codec,
                    const std::vector<Tensor>& fields) {
  Vectors from{type_of(x), (const char*)x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}};
  STD_TORCH_CHECK(x.is_cpu() && from.dtype <= F16 && (x.size(3) == 1 || x.stride(3) == 1),
                  "arkv_cpu: floats on a CPU only, with the elements of a vector side by side");
  from.heads = x.size(1), from.slots = source.size(2), from.D = x.size(3);
  from.source = data<int64_t>(source), from.centre = data<float>(centre);
  const int64_t n = x.size(0) * from.heads * from.slots;
  const int64_t length = x.size(2);
  bool inside = true;
  for (int64_t i = 0; i < n; i++) inside &= from.source[i] < length;
  STD_TORCH_CHECK(inside, "arkv_cpu: a row outside its tensor");
  const std::vector<char*> held = addresses_of(fields);
  Addresses field = held.data();
  const Stored to = stored(codec, field);
  // As in call_of; a vector's element costs some nanoseconds.
  const int64_t most = 1 + (n * from.D >> 15);
  encode_all(from, to, n, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

STABLE_TORCH_LIBRARY_IMPL(arkv_cpu, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("step", TORCH_BOX(&step));
  m.impl("encode", TORCH_BOX(&encode_vectors));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("unpack_int4", TORCH_BOX(&unpack_int4));
}

}  // namespace

// The step past torch's dispatcher, see direct.py: of contiguous tensors, without mask and sinks.
// `sizes` are heads, k_dim, v_dim, dtype and the number of codecs.
extern "C" void arkv_step(const int64_t* sizes, const int64_t* codecs, const int64_t* options,
                          const double* weights, int64_t batch, int64_t groups, double scale,
                          double softcap, char* q, char* k, char* v, Addresses state, char* out) {
  Call call{};
  call.batch = batch, call.groups = groups;
  call.heads = sizes[0], call.k_dim = sizes[1], call.v_dim = sizes[2], call.dtype = sizes[3];
  call.q = q, call.k = k, call.v = v, call.out = out;
  call.scale = scale, call.softcap = softcap;
  run_step(call, state, codecs, sizes[4], options, weights);
}
