// Attention of one new token over ring, tiers and itself; see arkv_fx/ops/kernels/__init__.py.
// Three steps over units of work, shared out to threads: logits; then weights and their sums of
// values; then, per query, the sums of all units joined.
#pragma once
#include "call.h"

// Queries stand in the basis that a codec's keys are stored in: as they are; lifted for fp8;
// rotated; rotated and in the order of `Nibbles`.
enum Basis { PLAIN, LIFTED, ROTATED, NIBBLES, BASES };

static int64_t width(int64_t codec, int64_t D) {
  return codec == F32 ? 4 * D : codec <= F16 ? 2 * D : codec == INT4 ? D / 2
         : codec == INT3 ? D / 8 * 3 : D;
}

class Attention {
 public:
  explicit Attention(const Call& call)
      : call(call), scale(call.scale), softcap(call.softcap), plan(call),
        k_wide(whole(call.k_dim, 2 * W)), v_wide(whole(call.v_dim, W)) {
    static thread_local Scratch scratch;
    const int64_t n = call.batch * call.heads * call.groups, u = plan.units.size() * MOST;
    scratch.start(4 * (n * (BASES * (k_wide + k_wide / 2 + 1) + 2 + plan.padded) +
                       u * (v_wide + 2)) + 64 * 16);
    queries = scratch.take<float>(n * BASES * k_wide);
    shorts = scratch.take<int16_t>(n * BASES * k_wide);
    units = scratch.take<float>(n * BASES);
    query_sums = scratch.take<float>(n);
    centres = scratch.take<float>(n);
    columns = scratch.take<float>(n * plan.padded);
    tops = scratch.take<float>(u);
    masses = scratch.take<float>(u);
    parts = scratch.take<float>(u * v_wide);
    for (const Segment& s : call.segment) used[basis_of(s.k_codec)] = true;
    if (used[NIBBLES])
      for (int64_t j = 0; j < call.k_dim; j++) nibbles.push_back(nibble_at(j, call.k_dim));
  }

  void run() {
    const int64_t teams = plan.teams.size(), works = plan.units.size();
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<char> room(BLOCK * whole(std::max(call.k_dim, call.v_dim), 2 * W));
#pragma omp for
      for (int64_t t = 0; t < teams; t++) prepare(plan.teams[t]);
#pragma omp for schedule(dynamic)
      for (int64_t u = 0; u < works; u++) logits(u, room.data());
#pragma omp for schedule(dynamic)
      for (int64_t u = 0; u < works; u++) values(u, room.data());
#pragma omp for
      for (int64_t t = 0; t < teams; t++) join(plan.teams[t]);
    }
  }

 private:
  const Call& call;
  const float scale, softcap;
  const Plan plan;
  const int64_t k_wide, v_wide;
  bool used[BASES] = {};
  std::vector<int64_t> nibbles;  // order of the last basis
  float* queries;       // [BASES, B * H * G, k_wide]
  int16_t* shorts;      // the same in 16 bits, for codes that are multiplied as integers,
  float* units;         // and what one of them is worth: [BASES, B * H * G]
  float* query_sums;    // [B * H * G], rotated
  float* centres;       // [B * H * G], what the keys' centre adds
  float* columns;       // [B * H * G, padded]: logits, then weights
  float *tops, *masses; // [units, MOST]: highest logit, sum of weights
  float* parts;         // [units, MOST, v_wide]: weights times values

  // Half-precision models' codes are multiplied as integers: rounding queries and weights to 16
  // bits of their largest is far below the rounding of the model's own numbers.
  bool integers(int64_t codec) const { return INTEGERS && call.dtype != F32 && codec >= INT8; }

  Basis basis_of(int64_t codec) const {
    if (codec == INT4 && integers(codec) && Nibbles::fits(call.k_dim)) return NIBBLES;
    return codec == FP8 ? LIFTED : rotated(codec) ? ROTATED : PLAIN;
  }

  int64_t at(Basis basis, int64_t query) const {
    return basis * call.batch * call.heads * call.groups + query;
  }

  void prepare(const Team& team) {
    const int64_t D = call.k_dim;
    for (int64_t i = team.query; i < team.query + team.size; i++) {
      const char* q = call.q + i * width(call.dtype, D);
      float *plain = queries + at(PLAIN, i) * k_wide, *lifted = queries + at(LIFTED, i) * k_wide;
      for (int64_t j = 0; j < k_wide; j += W) {
        const int64_t n = std::max<int64_t>(0, std::min<int64_t>(W, D - j));
        vf x = call.dtype == F32 ? row_end<F32Row>(q + j * 4, n)
               : call.dtype == BF16 ? row_end<BF16Row>(q + j * 2, n)
                                    : row_end<F16Row>(q + j * 2, n);
        store(plain + j, x);
        if (used[LIFTED]) store(lifted + j, x * LIFT);
      }
      if (integers(INT8)) shorten(PLAIN, i, plain);
      vf both[8] = {};
      if (call.centre)
        for (int64_t j = 0; j < D; j += W)
          both[0] += load<vf>(plain + j) * load_some<vf>(call.centre + team.head * D + j, D - j);
      if (used[ROTATED] || used[NIBBLES]) {
        float* turned = queries + at(ROTATED, i) * k_wide;
        std::copy(plain, plain + k_wide, turned);
        rotate(turned, D);
        if (integers(INT4)) shorten(ROTATED, i, turned);
        for (int64_t j = 0; j < k_wide; j += W) both[1] += load<vf>(turned + j);
      }
      if (used[NIBBLES]) {
        const int16_t* from = shorts + at(ROTATED, i) * k_wide;
        int16_t* to = shorts + at(NIBBLES, i) * k_wide;
        for (int64_t j = 0; j < D; j++) to[j] = from[nibbles[j]];
        units[at(NIBBLES, i)] = units[at(ROTATED, i)];
      }
      const f8 found = sums(both);
      centres[i] = found[0];
      query_sums[i] = found[1];
    }
  }

  // A query in 16 bits. What it then stands for replaces it, so that zero points cancel exactly.
  void shorten(Basis basis, int64_t i, float* q) {
    int16_t* to = shorts + at(basis, i) * k_wide;
    vf most[8] = {};
    for (int64_t j = 0; j < k_wide; j += W) {
      const vf x = load<vf>(q + j);
      most[0] = larger(most[0], larger(x, -x));
    }
    const float unit = std::max(highest(most)[0] / 32767, 1e-37f), inverse = 1 / unit;
    units[at(basis, i)] = unit;
    for (int64_t j = 0; j < k_wide; j += W) {
      const vi x = rounded(load<vf>(q + j) * inverse);
      store_shorts(to + j, x);
      if (basis == ROTATED) store(q + j, number(x) * unit);
    }
  }

  // Where a unit's n <= BLOCK rows from `first` on are; packed codes are unpacked into `room`.
  const char* rows(int64_t codec, const char* codes, int64_t D, int64_t first, int64_t n,
                   char* room, int64_t* stride) const {
    *stride = width(codec, D);
    codes += first * *stride;
    if (!rotated(codec)) return codes;
    *stride = whole(D, 2 * W);
    unpack(codec, codes, n, D, room, *stride);
    return room;
  }

  // Scales and zeros of n slots, ones and zeros where the codec has none.
  static void fields(int64_t codec, const uint16_t* scale, const uint8_t* zero, int64_t first,
                     int64_t n, float* scales, float* zeros) {
    const float rest = codec == FP8 ? FP8_UNIT / LIFT : 1.0f, step = codes_per_zero(codec);
    for (int64_t r = 0; r < whole(n, 2 * W); r += W) {
      vf x = spread(1.0f), z{};
      if (codec >= FP8) x = bits(widen_some(scale + first + r, n - r) << 16) * rest;
      if (rotated(codec)) {
        const vi y = widen_some((const int8_t*)zero + first + r, n - r);
        z = number(y & 255) * step;
      }
      store(scales + r, x);
      store(zeros + r, z);
    }
  }

  // Zero for slots that are not seen, and for those beyond n; whether any is.
  bool shown(int64_t b, const int32_t* pos, int64_t n, int32_t* seen) const {
    int32_t low = -1;
    if (call.sliding) low = std::max<int64_t>(low, call.position[b] - call.sliding);
    vi any{}, lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int64_t r = 0; r < whole(n, 2 * W); r += W) {
      const vi x = (pos ? load_some<vi>(pos + r, n - r) > low : ~vi{}) & (lane < (int32_t)(n - r));
      store(seen + r, x);
      any |= x;
    }
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= any[i];
    return found;
  }

  // What the mask adds to the logits of query i at n slots.
  void bias(int64_t i, const int32_t* pos, int64_t n, float* added) const {
    const int64_t all = call.heads * call.groups, last = call.bias_length - 1;
    const float* row = call.bias + i / all * call.bias_batch + i % all * call.bias_head;
    const int64_t offset = call.position[i / all] - last;
    for (int64_t r = 0; r < n; r++)
      added[r] = row[pos ? std::min(std::max<int64_t>(pos[r] - offset, 0), last) : last];
  }

  void logits(int64_t index, char* room) {
    const Unit& u = plan.units[index];
    const Team& team = plan.teams[u.team];
    const Segment& s = call.segment[u.segment];
    const int64_t D = call.k_dim, codec = s.k_codec, slot = team.head * s.slots + u.first;
    const Basis basis = basis_of(codec);
    const int64_t q = at(basis, team.query) * k_wide;
    vf high[MOST];
    for (vf& x : high) x = spread(NEVER);
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = slot + r;
      const int32_t* pos = s.pos ? s.pos + first : nullptr;
      float dots[MOST][BLOCK + LANES], scales[BLOCK], zeros[BLOCK], added[BLOCK];
      int32_t seen[BLOCK];
      float* to = columns + team.query * plan.padded + u.room + r;
      if (!shown(team.head / call.heads, pos, n, seen)) {
        for (int64_t g = 0; g < team.size; g++)
          std::fill(to + g * plan.padded, to + g * plan.padded + whole(n, 2 * W), NEVER);
        continue;
      }
      fields(codec, s.k_scale, s.k_zero, first, n, scales, zeros);
      if (basis == NIBBLES) {
        DOT_NIBBLES[team.size - 1](s.k + first * D / 2, D / 2, n, D, shorts + q, k_wide, dots);
      } else {
        int64_t stride;
        const char* codes = rows(codec, s.k, D, first, n, room, &stride);
        if (integers(codec))
          DOT_BYTES[team.size - 1](codes, stride, n, D, shorts + q, k_wide, dots);
        else
          DOT_ROWS[codec][team.size - 1](codes, stride, n, D, queries + q, k_wide, dots);
      }
      for (int64_t g = 0; g < team.size; g++, to += plan.padded) {
        const int64_t i = team.query + g;
        if (call.bias) bias(i, pos, n, added);
        const float unit = (integers(codec) ? units[at(basis, i)] : 1.0f) * scale;
        const float sum = query_sums[i] * scale, centre = s.centred ? centres[i] * scale : 0.0f;
        for (int64_t j = 0; j < whole(n, 2 * W); j += W) {
          vf x = load<vf>(dots[g] + j) * unit;
          if (rotated(codec)) x -= load<vf>(zeros + j) * sum;
          x = x * load<vf>(scales + j) + centre;
          if (softcap != 0) x = tanh_of(x / softcap) * softcap;
          if (call.bias) x += load<vf>(added + j);
          x = load<vi>(seen + j) ? x : spread(NEVER);
          store(to + j, x);
          high[g] = larger(high[g], x);
        }
      }
    }
    store(tops + index * MOST, highest(high));
  }

  // The highest logits of a team, sinks included; 0 where it sees nothing.
  f8 top(const Team& team) const {
    f8 most = f8{} + NEVER;
    if (call.sink)
      for (int64_t g = 0; g < team.size; g++) most[g] = call.sink[sink_of(team, g)];
    for (size_t u = team.begin; u < team.end; u++) {
      const f8 x = load<f8>(tops + u * MOST);
      most = x > most ? x : most;
    }
    return most == NEVER ? f8{} : most;
  }

  int64_t sink_of(const Team& team, int64_t g) const {
    return (team.query + g) % (call.heads * call.groups);
  }

  void values(int64_t index, char* room) {
    const Unit& u = plan.units[index];
    const Team& team = plan.teams[u.team];
    const Segment& s = call.segment[u.segment];
    const int64_t D = call.v_dim, codec = s.v_codec, slot = team.head * s.slots + u.first;
    const float lift = codec == FP8 ? LIFT : 1.0f;
    float* sum = parts + index * MOST * v_wide;
    std::fill(sum, sum + team.size * v_wide, 0.0f);
    const f8 most = top(team);
    vf mass[MOST] = {}, shift[MOST] = {};
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = slot + r;
      float weights[MOST][BLOCK], scales[BLOCK], zeros[BLOCK];
      float* p = columns + team.query * plan.padded + u.room + r;
      fields(codec, s.v_scale, s.v_zero, first, n, scales, zeros);
      vf high[MOST] = {};
      for (int64_t g = 0; g < team.size; g++, p += plan.padded) {
        const float top = most[g];
        for (int64_t j = 0; j < n; j += 2 * W) {
          vf x[2] = {load<vf>(p + j) - top, load<vf>(p + j + W) - top};
          exponential<2>(x);
          for (int i = 0; i < 2; i++) {
            const vf y = x[i] * load<vf>(scales + j + i * W) * lift;
            store(p + j + i * W, x[i]);
            store(weights[g] + j + i * W, y);
            mass[g] += x[i];
            high[g] = larger(high[g], y);
          }
        }
      }
      const f8 highs = highest(high);
      bool any = false;
      for (int g = 0; g < MOST; g++) any |= highs[g] > 0;
      if (!any) continue;  // nothing is seen, whatever lies in the slots
      int64_t stride;
      const char* codes = rows(codec, s.v, D, first, n, room, &stride);
      if (!integers(codec)) {
        if (rotated(codec))
          for (int64_t g = 0; g < team.size; g++)
            for (int64_t j = 0; j < n; j += W)
              shift[g] += load<vf>(weights[g] + j) * load<vf>(zeros + j);
        SUM_ROWS[codec][team.size - 1](codes, stride, n, D, weights, sum, v_wide);
        continue;
      }
      int16_t small[MOST][BLOCK];
      f8 unit = highs * (1.0f / 32767);
      unit = unit > 1e-37f ? unit : f8{} + 1e-37f;
      const f8 inverse = 1.0f / unit;
      for (int64_t g = 0; g < team.size; g++) {
        const float many = inverse[g], one = unit[g];
        vf moved{};
        for (int64_t j = 0; j < n; j += W) {
          const vi x = rounded(load<vf>(weights[g] + j) * many);
          store_shorts(small[g] + j, x);
          if (rotated(codec)) moved += number(x) * load<vf>(zeros + j);
        }
        shift[g] += moved * one;
      }
      SUM_BYTES[team.size - 1](codes, stride, n, D, small, (const float*)&unit, sum, v_wide);
    }
    store(masses + index * MOST, sums(mass));
    const f8 shifts = sums(shift);
    for (int64_t g = 0; g < team.size; g++)
      for (int64_t j = 0; j < v_wide; j += W)
        store(sum + g * v_wide + j, load<vf>(sum + g * v_wide + j) - shifts[g]);
  }

  void join(const Team& team) {
    const int64_t D = call.v_dim;
    const f8 most = top(team);
    f8 mass{};
    for (size_t u = team.begin; u < team.end; u++) mass += load<f8>(masses + u * MOST);
    std::vector<float> both(2 * v_wide);  // sums in the plain and in the rotated basis
    for (int64_t g = 0; g < team.size; g++) {
      float total = mass[g];
      if (call.sink) total += std::exp(call.sink[sink_of(team, g)] - most[g]);
      const float norm = total == 0 ? 0 : 1 / total;
      std::fill(both.begin(), both.end(), 0.0f);
      bool turned = false;
      float* probs = call.probs + (team.query + g) * plan.columns;
      const float* weights = columns + (team.query + g) * plan.padded;
      for (size_t i = team.begin; i < team.end; i++) {
        const Unit& u = plan.units[i];
        const bool turn = rotated(call.segment[u.segment].v_codec);
        turned |= turn;
        float *to = both.data() + turn * v_wide, *part = parts + (i * MOST + g) * v_wide;
        for (int64_t j = 0; j < v_wide; j += W) store(to + j, load<vf>(to + j) + load<vf>(part + j));
        float* p = probs + u.column;
        int64_t j = 0;
        for (; j + W <= u.count; j += W) store(p + j, load<vf>(weights + u.room + j) * norm);
        for (; j < u.count; j++) p[j] = weights[u.room + j] * norm;
      }
      if (turned) rotate(both.data() + v_wide, D);
      float* out = call.out + (team.query + g) * D;
      for (int64_t j = 0; j < D; j++) out[j] = (both[j] + both[v_wide + j]) * norm;
    }
  }
};
