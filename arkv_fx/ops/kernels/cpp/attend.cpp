// Attention of one new token over ring, tiers and itself; see arkv_fx/ops/kernels/__init__.py.
//
// Three steps over units of work (some rows of one segment of one head), shared out to threads:
// logits; then weights and their sums of values; then, per head, all units' sums joined.
#include <algorithm>
#include <vector>

#include "rows.h"

// Eight bytes each, in the order of the fields in arkv_fx/ops/kernels/cpp/__init__.py.
struct Segment {
  int64_t k_codec, v_codec, slots, centred;
  const int32_t* pos;  // null: the new token, which only the mask hides
  const char* k;
  const uint16_t* k_scale;
  const uint8_t* k_zero;
  const char* v;
  const uint16_t* v_scale;
  const uint8_t* v_zero;
};

struct Call {
  int64_t threads, batch, heads, groups, k_dim, v_dim, dtype, sliding, segments;
  const char* q;            // [B, H, G, Dk]
  const int32_t* position;  // [B]
  const float* bias;        // [B or 1, H * G or 1, S]: strides, and S
  int64_t bias_batch, bias_head, bias_length;
  const float* sink;    // [H * G]
  const float* centre;  // [B, H, Dk]
  float* out;           // [B, H, G, Dv]
  float* probs;         // [B, H, G, N]
  Segment segment[];
};

struct Unit {
  int64_t head, segment, first, count, column;  // head counts over batch and heads
};

static int64_t width(int64_t codec, int64_t D) {
  return codec == F32 ? 4 * D : codec <= F16 ? 2 * D : codec == INT4 ? D / 2
         : codec == INT3 ? D / 8 * 3 : D;
}

static int64_t whole(int64_t n) { return (n + W - 1) / W * W; }

static float bf16(uint16_t x) {
  uint32_t wide = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

enum Basis { PLAIN, LIFTED, ROTATED, BASES };

static Basis basis_of(int64_t codec) {
  return codec == FP8 ? LIFTED : rotated(codec) ? ROTATED : PLAIN;
}

// What is left of a codec's unit after the lift of the other factor.
static float unit_of(int64_t codec) { return codec == FP8 ? FP8_UNIT / LIFT : 1.0f; }

class Attention {
 public:
  Attention(const Call& call, float scale, float softcap)
      : call(call), scale(scale), softcap(softcap), G(call.groups),
        heads(call.batch * call.heads), k_wide(whole(call.k_dim)), v_wide(whole(call.v_dim)) {
    plan();
  }

  void run() {
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<char> room(BLOCK * std::max(k_wide, v_wide));
#pragma omp for
      for (int64_t h = 0; h < heads; h++) prepare(h);
#pragma omp for schedule(dynamic)
      for (size_t u = 0; u < units.size(); u++) logits(u, room.data());
#pragma omp for schedule(dynamic)
      for (size_t u = 0; u < units.size(); u++) values(u, room.data());
#pragma omp for
      for (int64_t h = 0; h < heads; h++) join(h);
    }
  }

 private:
  const Call& call;
  const float scale, softcap;
  const int64_t G, heads, k_wide, v_wide;
  int64_t columns = 0;
  std::vector<Unit> units;
  std::vector<size_t> begin;  // each head's first unit, and the end
  bool used[BASES] = {};
  // [heads, BASES, G, k_wide]; [heads, G] each: sums of rotated queries, logits of the centre;
  // [units, G] each: the highest logit, the sum of weights; [units, G, v_wide].
  std::vector<float> queries, query_sums, centres, tops, masses, parts;

  void plan() {
    for (int64_t s = 0; s < call.segments; s++) {
      columns += call.segment[s].slots;
      used[basis_of(call.segment[s].k_codec)] = true;
    }
    // One thread takes a segment at once; several need units that can be shared out evenly.
    int64_t most = columns;
    if (call.threads > 1) most = std::max<int64_t>(BLOCK, columns * heads / (call.threads * 8));
    most = (most + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t h = 0; h < heads; h++) {
      begin.push_back(units.size());
      for (int64_t s = 0, column = 0; s < call.segments; column += call.segment[s++].slots)
        for (int64_t i = 0; i < call.segment[s].slots; i += most)
          units.push_back({h, s, i, std::min(most, call.segment[s].slots - i), column + i});
    }
    begin.push_back(units.size());
    queries.resize(heads * BASES * G * k_wide);
    query_sums.resize(heads * G);
    centres.resize(heads * G);
    tops.resize(units.size() * G);
    masses.resize(units.size() * G);
    parts.resize(units.size() * G * v_wide);
  }

  float* query(int64_t h, Basis basis) { return &queries[(h * BASES + basis) * G * k_wide]; }

  void prepare(int64_t h) {
    const int64_t D = call.k_dim;
    for (int64_t g = 0; g < G; g++) {
      const char* q = call.q + (h * G + g) * width(call.dtype, D);
      float* plain = query(h, PLAIN) + g * k_wide;
      for (int64_t j = 0; j < D; j += W) {
        const int64_t n = std::min<int64_t>(W, D - j);
        vf x = call.dtype == F32 ? row_end<F32Row>(q + j * 4, n)
               : call.dtype == BF16 ? row_end<BF16Row>(q + j * 2, n)
                                    : row_end<F16Row>(q + j * 2, n);
        store(plain + j, x);
        if (used[LIFTED]) store(query(h, LIFTED) + g * k_wide + j, x * LIFT);
      }
      float centre = 0, sum = 0;
      if (call.centre)
        for (int64_t j = 0; j < D; j++) centre += plain[j] * call.centre[h * D + j];
      if (used[ROTATED]) {
        float* turned = query(h, ROTATED) + g * k_wide;
        std::copy(plain, plain + D, turned);
        rotate(turned, D);
        for (int64_t j = 0; j < D; j++) sum += turned[j];
      }
      centres[h * G + g] = centre;
      query_sums[h * G + g] = sum;
    }
  }

  // n <= BLOCK rows of codes from slot `first` on, as bytes where they are packed.
  const char* rows(int64_t codec, const char* codes, int64_t D, const Unit& u, int64_t first,
                   int64_t n, char* room, int64_t* stride) {
    const int64_t size = width(codec, D);
    codes += (u.head * call.segment[u.segment].slots + first) * size;
    *stride = size;
    if (codec != INT4 && codec != INT3) return codes;
    *stride = whole(D);
    unpack(codec, codes, n, D, room, *stride);
    return room;
  }

  // Scales and zeros of n slots as floats, ones and zeros where the codec has none.
  static void fields(int64_t codec, const uint16_t* scale, const uint8_t* zero, int64_t first,
                     int64_t n, float* scales, float* zeros) {
    const float unit = unit_of(codec), step = codes_per_zero(codec);
    for (int64_t r = 0; r < n; r++) {
      scales[r] = (codec >= FP8 ? bf16(scale[first + r]) : 1.0f) * unit;
      zeros[r] = rotated(codec) ? zero[first + r] * step : 0.0f;
    }
  }

  // 0 for slots that are seen, -inf for the others; whether any is.
  bool shown(const Unit& u, int64_t first, int64_t n, float* hidden) {
    const Segment& s = call.segment[u.segment];
    std::fill(hidden, hidden + BLOCK, 0.0f);
    if (!s.pos) return true;
    const int32_t* pos = s.pos + u.head * s.slots + first;
    int32_t low = -1;
    if (call.sliding)
      low = std::max<int64_t>(low, call.position[u.head / call.heads] - call.sliding);
    bool any = false;
    for (int64_t r = 0; r < n; r++) {
      hidden[r] = pos[r] > low ? 0.0f : NEVER;
      any |= pos[r] > low;
    }
    return any;
  }

  // What a mask adds to the logits of n slots.
  void bias(const Unit& u, int64_t g, int64_t first, int64_t n, float* added) {
    const Segment& s = call.segment[u.segment];
    const int64_t b = u.head / call.heads, h = u.head % call.heads, last = call.bias_length - 1;
    const float* row = call.bias + b * call.bias_batch + (h * G + g) * call.bias_head;
    const int64_t offset = call.position[b] - last;
    for (int64_t r = 0; r < n; r++) {
      int64_t at = s.pos ? s.pos[u.head * s.slots + first + r] - offset : last;
      added[r] = row[std::min(std::max<int64_t>(at, 0), last)];
    }
  }

  void logits(size_t index, char* room) {
    const Unit& u = units[index];
    const Segment& s = call.segment[u.segment];
    const int64_t D = call.k_dim, codec = s.k_codec;
    const float* q = query(u.head, basis_of(codec));
    float* top = &tops[index * G];
    std::fill(top, top + G, NEVER);
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = u.first + r;
      float dots[MOST][BLOCK + LANES] = {}, scales[BLOCK] = {}, zeros[BLOCK] = {};
      float hidden[BLOCK], added[BLOCK] = {};
      const bool any = shown(u, first, n, hidden);
      int64_t stride;
      const char* codes = any ? rows(codec, s.k, D, u, first, n, room, &stride) : nullptr;
      const int64_t at = u.head * s.slots + first;
      if (any) fields(codec, s.k_scale, s.k_zero, at, n, scales, zeros);
      for (int64_t g0 = 0; g0 < G; g0 += MOST) {
        const int64_t some = std::min<int64_t>(MOST, G - g0);
        if (any) DOT_ROWS[codec][some - 1](codes, stride, n, D, q + g0 * k_wide, k_wide, dots);
        for (int64_t g = g0; g < g0 + some; g++) {
          if (any && call.bias && (g == 0 || call.bias_head)) bias(u, g, first, n, added);
          const float centre = s.centred ? centres[u.head * G + g] : 0.0f;
          const float sum = query_sums[u.head * G + g];
          float* to = call.probs + (u.head * G + g) * columns + u.column + r;
          vf high = spread(NEVER);
          for (int64_t i = 0; i < n; i += W) {
            vf x = load<vf>(dots[g - g0] + i) - load<vf>(zeros + i) * sum;
            x = (x * load<vf>(scales + i) + centre) * scale;
            if (softcap != 0) x = tanh_of(x / softcap) * softcap;
            x = load<vf>(hidden + i) == 0.0f ? x + load<vf>(added + i) : spread(NEVER);
            if (i + W <= n) {
              store(to + i, x);
              high = x > high ? x : high;
            } else {
              for (int64_t j = 0; i + j < n; j++) {
                to[i + j] = x[j];
                top[g] = std::max(top[g], (float)x[j]);
              }
            }
          }
          top[g] = std::max(top[g], highest(high));
        }
      }
    }
  }

  // The highest logit of a query head, its sink's included; 0 if it sees nothing.
  float top(int64_t h, int64_t g) {
    float most = call.sink ? call.sink[h % call.heads * G + g] : NEVER;
    for (size_t u = begin[h]; u < begin[h + 1]; u++) most = std::max(most, tops[u * G + g]);
    return most == NEVER ? 0.0f : most;
  }

  void values(size_t index, char* room) {
    const Unit& u = units[index];
    const Segment& s = call.segment[u.segment];
    const int64_t D = call.v_dim, codec = s.v_codec;
    const float lift = codec == FP8 ? LIFT : 1.0f;
    float *sums = &parts[index * G * v_wide], *mass = &masses[index * G];
    std::fill(sums, sums + G * v_wide, 0.0f);
    std::fill(mass, mass + G, 0.0f);
    std::vector<float> most(G), shift(G);
    for (int64_t g = 0; g < G; g++) most[g] = top(u.head, g);
    for (int64_t r = 0; r < u.count; r += BLOCK) {
      const int64_t n = std::min(BLOCK, u.count - r), first = u.first + r;
      float weights[MOST][BLOCK], scales[BLOCK] = {}, zeros[BLOCK] = {};
      fields(codec, s.v_scale, s.v_zero, u.head * s.slots + first, n, scales, zeros);
      const char* codes = nullptr;
      int64_t stride = 0;
      for (int64_t g0 = 0; g0 < G; g0 += MOST) {
        const int64_t some = std::min<int64_t>(MOST, G - g0);
        float seen = 0;
        for (int64_t g = g0; g < g0 + some; g++) {
          float* p = call.probs + (u.head * G + g) * columns + u.column + r;
          vf sum{}, moved{};
          for (int64_t i = 0; i < n; i += W) {
            vf x = spread(NEVER);
            const int64_t left = std::min<int64_t>(W, n - i);
            left == W ? x = load<vf>(p + i) : (std::memcpy(&x, p + i, 4 * left), x);
            x = exponential(x - most[g]);
            left == W ? store(p + i, x) : (void)std::memcpy(p + i, &x, 4 * left);
            sum += x;
            x *= load<vf>(scales + i);
            moved += x * load<vf>(zeros + i);
            store(weights[g - g0] + i, x * lift);
          }
          const float here = ::total(sum);
          mass[g] += here;
          shift[g] += ::total(moved);
          seen += here;
        }
        if (seen == 0) continue;  // nothing to see, whatever lies in the slots
        if (!codes) codes = rows(codec, s.v, D, u, first, n, room, &stride);
        SUM_ROWS[codec][some - 1](codes, stride, n, D, weights, sums + g0 * v_wide, v_wide);
      }
    }
    for (int64_t g = 0; g < G; g++)
      for (int64_t j = g * v_wide; j < (g + 1) * v_wide; j += W)
        store(sums + j, load<vf>(sums + j) - shift[g]);
  }

  void join(int64_t h) {
    const int64_t D = call.v_dim;
    std::vector<float> turned(v_wide);
    for (int64_t g = 0; g < G; g++) {
      float* out = call.out + (h * G + g) * D;
      std::fill(out, out + D, 0.0f);
      std::fill(turned.begin(), turned.end(), 0.0f);
      float mass = call.sink ? std::exp(call.sink[h % call.heads * G + g] - top(h, g)) : 0.0f;
      bool any = false;
      for (size_t u = begin[h]; u < begin[h + 1]; u++) {
        const bool turn = rotated(call.segment[units[u].segment].v_codec);
        any |= turn;
        mass += masses[u * G + g];
        const float* part = &parts[(u * G + g) * v_wide];
        float* to = turn ? turned.data() : out;
        for (int64_t j = 0; j < D; j++) to[j] += part[j];
      }
      if (any) rotate(turned.data(), D);
      const float norm = 1.0f / (mass == 0 ? 1.0f : mass);
      for (int64_t j = 0; j < D; j++) out[j] = (out[j] + turned[j]) * norm;
      float* p = call.probs + (h * G + g) * columns;
      int64_t j = 0;
      for (; j + W <= columns; j += W) store(p + j, load<vf>(p + j) * norm);
      for (; j < columns; j++) p[j] *= norm;
    }
  }
};

extern "C" void arkv_attend(const Call* call, float scale, float softcap) {
  Attention(*call, scale, softcap).run();
}
