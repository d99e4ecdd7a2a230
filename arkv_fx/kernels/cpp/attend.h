// Attention of one new token over ring, tiers and itself; see arkv_fx/kernels/kernel.py.
// Steps over units of work, shared out to threads: logits; then weights and their sums of values;
// then, per query, the sums of all units joined; then, per head, what the caller makes of them.
#pragma once
#include "queries.h"
#include "vectors.h"

class Attention {
 public:
  const Plan plan;

  explicit Attention(const Call& call)
      : plan(call), call(call), v_wide(whole(call.v_dim, 2 * W)), queries(call) {
    static thread_local Scratch scratch;
    const int64_t n = call.batch * call.heads * call.groups, u = plan.units.size() * MOST;
    scratch.start(queries.nbytes() + 4 * (n * (plan.padded + 1) + u * (v_wide + 2)) + 64 * 5);
    queries.place(scratch);
    columns = scratch.take<float>(n * plan.padded);
    norms = scratch.take<float>(n);
    tops = scratch.take<float>(u);
    masses = scratch.take<float>(u);
    parts = scratch.take<float>(u * v_wide);
  }

  // Output, then `finish(h)` for every head h of B * H, which may ask for its probabilities.
  template <class Finish>
  void run(Finish finish) {
    const int64_t teams = plan.teams.size(), works = plan.units.size();
    const int64_t heads = call.batch * call.heads;
    const int64_t space = whole(std::max(call.k_dim, call.v_dim), 2 * W);
    if (call.threads == 1) {  // head by head, so that all of it stays in the cache
      std::vector<char> room(BLOCK * space);
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = teams / heads * h; t < teams / heads * (h + 1); t++) {
          const Team& team = plan.teams[t];
          prepare(team);
          for (size_t u = team.begin; u < team.end; u++) logits(u, room.data());
          for (size_t u = team.begin; u < team.end; u++) values(u, room.data());
          join(team);
        }
        finish(h);
      }
      return;
    }
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<char> room(BLOCK * space);
#pragma omp for
      for (int64_t t = 0; t < teams; t++) prepare(plan.teams[t]);
#pragma omp for schedule(dynamic)
      for (int64_t u = 0; u < works; u++) logits(u, room.data());
#pragma omp for schedule(dynamic)
      for (int64_t u = 0; u < works; u++) values(u, room.data());
#pragma omp for
      for (int64_t t = 0; t < teams; t++) join(plan.teams[t]);
#pragma omp for
      for (int64_t h = 0; h < heads; h++) finish(h);
    }
  }

  // Probabilities of all columns, one row for each query i of B * H * G in [from, to), or their
  // sum over these queries. `out` has room for whole vectors behind its last row.
  template <bool SUM>
  void probabilities(int64_t from, int64_t to, float* out) const {
    for (size_t u = 0; u < plan.teams[0].end; u++) {  // all teams' units divide columns alike
      const Unit& unit = plan.units[u];
      for (int64_t j = 0; j < unit.count; j += W) {
        vf x{};
        for (int64_t i = from; i < to; i++) {
          const vf p = load<vf>(columns + i * plan.padded + unit.room + j) * norms[i];
          x = SUM ? x + p : p;
          float* row = out + (i - from) * plan.columns + unit.column;
          if (!SUM) store_some(row + j, x, unit.count - j);
        }
        if (SUM) store_some(out + unit.column + j, x, unit.count - j);
      }
    }
  }

 private:
  const Call& call;
  const int64_t v_wide;
  Queries queries;
  float* columns;        // [B * H * G, padded]: logits, then weights
  float* norms;          // [B * H * G], what makes weights probabilities
  float *tops, *masses;  // [units, MOST]: highest logit, sum of weights
  float* parts;          // [units, MOST, v_wide]: weights times values

  void prepare(const Team& team) {
    for (int64_t i = team.query; i < team.query + team.size; i++) queries.prepare(i);
  }

  // Where a unit's n <= BLOCK rows from `first` on are; packed codes are unpacked into `room`.
  const char* rows(int64_t codec, const char* codes, int64_t D, int64_t first, int64_t n,
                   char* room, int64_t* stride) const {
    *stride = width(codec, D);
    codes += first * *stride;
    if (!rotated(codec)) return codes;
    *stride = whole(D, 2 * W);
    UNPACK[codec](codes, n, D, room, *stride);
    return room;
  }

  // Scales and zeros of n slots, ones and zeros where the codec has none.
  static void fields(const Stored& stored, int64_t first, int64_t n, float* scales,
                     float* zeros) {
    const int64_t codec = stored.codec;
    const float rest = codec == FP8 ? FP8_UNIT / LIFT : 1.0f, step = codes_per_zero(codec);
    for (int64_t r = 0; r < whole(n, 2 * W); r += W) {
      vf x = spread(1.0f), z{};
      if (scaled(codec)) x = bits(widen_some(stored.scale + first + r, n - r) << 16) * rest;
      if (rotated(codec)) {
        const vi y = widen_some((const int8_t*)stored.zero + first + r, n - r);
        z = number(y & 255) * step;
      }
      store(scales + r, x);
      store(zeros + r, z);
    }
  }

  // Zero for slots that are not seen, and for those beyond n; whether any is.
  bool shown(int64_t b, const Positions& pos, int64_t n, int32_t* seen) const {
    int32_t low = -1;
    if (call.sliding) low = std::max<int64_t>(low, call.position[b] - call.sliding);
    vi any{}, lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int64_t r = 0; r < whole(n, 2 * W); r += W) {
      const vi x = (pos ? pos.some(r, n - r) > low : ~vi{}) & (lane < (int32_t)(n - r));
      store(seen + r, x);
      any |= x;
    }
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= any[i];
    return found;
  }

  // What the mask adds to the logits of query i at n slots.
  void bias(int64_t i, const Positions& pos, int64_t n, float* added) const {
    const int64_t all = call.heads * call.groups, last = call.mask.length - 1;
    const int64_t offset = call.position[i / all] - last;
    call.mask.add(i / all, i % all, n, [=, &pos](int64_t r) {
      return pos ? std::min(std::max<int64_t>(pos[r] - offset, 0), last) : last;
    }, added);
  }

  void logits(int64_t index, char* room) {
    const Unit& u = plan.units[index];
    const Team& team = plan.teams[u.team];
    const Segment& s = call.segment[u.segment];
    const int64_t D = call.k_dim, codec = s.k.codec, slot = team.head * s.slots + u.first;
    const Basis basis = queries.basis_of(codec);
    const int64_t q = queries.at(basis, team.query) * queries.wide;
    vf high[MOST];
    for (vf& x : high) x = spread(NEVER);
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = slot + r;
      const Positions pos = s.pos ? s.pos + (team.head * call.slots + u.first + r) : s.pos;
      float dots[MOST][BLOCK + LANES], scales[BLOCK], zeros[BLOCK], added[BLOCK];
      int32_t seen[BLOCK];
      float* to = columns + team.query * plan.padded + u.room + r;
      if (!shown(team.head / call.heads, pos, n, seen)) {
        for (int64_t g = 0; g < team.size; g++)
          std::fill(to + g * plan.padded, to + g * plan.padded + whole(n, 2 * W), NEVER);
        continue;
      }
      fields(s.k, first, n, scales, zeros);
      const int64_t ldq = queries.wide;
      const float* numbers = queries.numbers + q;
      const int16_t* shorts = queries.shorts + q;
      if (basis == NIBBLES) {
        DOT_NIBBLES[team.size - 1](s.k.codes + first * D / 2, D / 2, n, D, shorts, ldq, dots);
      } else {
        int64_t stride;
        const char* codes = rows(codec, s.k.codes, D, first, n, room, &stride);
        if (queries.integers(codec))
          DOT_BYTES[team.size - 1](codes, stride, n, D, shorts, ldq, dots);
        else
          DOT_ROWS[codec][team.size - 1](codes, stride, n, D, numbers, ldq, dots);
      }
      for (int64_t g = 0; g < team.size; g++, to += plan.padded) {
        const int64_t i = team.query + g;
        if (call.mask.data && (g == 0 || call.mask.head)) bias(i, pos, n, added);
        const float unit = queries.integers(codec) ? queries.units[queries.at(basis, i)] : 1.0f;
        const float sum = queries.sums[i], centre = s.centred ? queries.centres[i] : 0.0f;
        for (int64_t j = 0; j < whole(n, 2 * W); j += W) {
          vf x = load<vf>(dots[g] + j) * (unit * call.scale);
          if (rotated(codec)) x -= load<vf>(zeros + j) * (sum * call.scale);
          x = x * load<vf>(scales + j) + centre * call.scale;
          if (call.softcap != 0) x = tanh_of(x / call.softcap) * call.softcap;
          if (call.mask.data) x += load<vf>(added + j);
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
    const int64_t D = call.v_dim, codec = s.v.codec, slot = team.head * s.slots + u.first;
    const float lift = codec == FP8 ? LIFT : 1.0f;
    float* sum = parts + index * MOST * v_wide;
    std::fill(sum, sum + team.size * v_wide, 0.0f);
    const f8 most = top(team);
    vf mass[MOST] = {}, shift[MOST] = {};
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = slot + r;
      float weights[MOST][BLOCK], scales[BLOCK], zeros[BLOCK];
      float* p = columns + team.query * plan.padded + u.room + r;
      fields(s.v, first, n, scales, zeros);
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
      const char* codes = rows(codec, s.v.codes, D, first, n, room, &stride);
      if (!queries.integers(codec)) {
        SUM_ROWS[codec][team.size - 1](codes, stride, n, D, weights, sum, v_wide);
        if (!rotated(codec)) continue;
        // Taken off at once: the sum of codes is far larger than that of values, and its rounding
        // would stay.
        vf off[MOST] = {};
        for (int64_t g = 0; g < team.size; g++)
          for (int64_t j = 0; j < n; j += W)
            off[g] += load<vf>(weights[g] + j) * load<vf>(zeros + j);
        lower(sum, sums(off), team.size);
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
    lower(sum, sums(shift), team.size);
  }

  // Takes `by[g]` off all sums of query g.
  void lower(float* sum, f8 by, int64_t size) const {
    for (int64_t g = 0; g < size; g++)
      for (int64_t j = 0; j < v_wide; j += W)
        store(sum + g * v_wide + j, load<vf>(sum + g * v_wide + j) - by[g]);
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
      const float norm = norms[team.query + g] = total == 0 ? 0 : 1 / total;
      std::fill(both.begin(), both.end(), 0.0f);
      bool turned = false;
      for (size_t i = team.begin; i < team.end; i++) {
        const Unit& u = plan.units[i];
        const bool turn = rotated(call.segment[u.segment].v.codec);
        turned |= turn;
        float *to = both.data() + turn * v_wide, *part = parts + (i * MOST + g) * v_wide;
        for (int64_t j = 0; j < v_wide; j += W)
          store(to + j, load<vf>(to + j) + load<vf>(part + j));
      }
      float *out = both.data(), *other = out + v_wide;
      if (turned) rotate(other, D);
      for (int64_t j = 0; j < v_wide; j += W)
        store(out + j, (load<vf>(out + j) + load<vf>(other + j)) * norm);
      const int64_t row = width(call.out_dtype, D);
      store_row(call.out_dtype, out, D, call.out + (team.query + g) * row);
    }
  }
};
