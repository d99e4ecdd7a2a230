// The state after a decoded token, one head at a time: what arkv_fx/ops/attend.py does after the
// attention, and exchange_one of arkv_fx/ops/exchange.py.
#pragma once
#include "attend.h"
#include "rank.h"

#include <utility>

struct State {
  int32_t *count, *seen, *bad;  // [B]
  float *key_sum, *value_sum;   // [B, H, Dk] and [B, H, Dv], null if novelty is not of them
  Positions pos;                // [B, H, N]
  Stats stats;                  // likewise
};

// A token on its way: plain numbers, and statistics as they are held.
struct Token {
  float *k, *v;
  int32_t pos;
  char mass[sizeof(float)];
  uint16_t norm;
  int8_t novelty;
};

class Step {
 public:
  Step(const Call& call, const State& state, const Score& score, int64_t sinks)
      : call(call), state(state), score(score), sinks(sinks),
        ring(call.segment[0].slots), attention(call) {
    for (int64_t b = 0; b < call.batch; b++)
      real.push_back(call.mask.shows_itself(b, call.heads * call.groups));
  }

  void run() {
    attention.run([this](int64_t head) { update(head); });
    for (int64_t b = 0; b < call.batch; b++) {
      state.count[b] += real[b];
      state.seen[b] += 1;
      const Segment& own = call.segment.back();
      state.bad[b] |= !(finite(own.k, b, call.k_dim) && finite(own.v, b, call.v_dim));
    }
  }

 private:
  const Call& call;
  const State& state;
  const Score& score;
  const int64_t sinks, ring;
  Attention attention;
  std::vector<char> real;  // [B]: not padding

  // Of all heads of sequence b; `F16Row` makes numbers beyond a half's largest of its NaN.
  bool finite(const Stored& x, int64_t b, int64_t D) const {
    const int64_t n = call.heads * D;
    const float most = x.codec == F16 ? 65504.0f : std::numeric_limits<float>::max();
    vi all = ~vi{};
    for (int64_t j = 0; j < n; j += W) {
      const vf y = plain_some(x.codec, x.codes + b * width(x.codec, n), j, n);
      all &= larger(y, -y) <= most;
    }
    bool found = true;
    for (int i = 0; i < W; i++) found &= all[i] != 0;
    return found;
  }

  // After the attention of this head, which used the centre before the token.
  void update(int64_t head) {
    static thread_local Scratch scratch;
    const int64_t k_wide = whole(call.k_dim, W), v_wide = whole(call.v_dim, W);
    const int64_t columns = attention.plan.columns;
    scratch.start(Candidates::nbytes(columns) + 4 * (2 * k_wide + 2 * v_wide + columns + W) +
                  std::max(k_wide, v_wide) + 64 * 8);
    Candidates candidates(scratch, columns);
    Token token{scratch.take<float>(k_wide), scratch.take<float>(v_wide)}, gone = token;
    gone.k = scratch.take<float>(k_wide), gone.v = scratch.take<float>(v_wide);
    float* mass = scratch.take<float>(columns + W);
    char* room = scratch.take<char>(std::max(k_wide, v_wide));
    arrive(head, token);
    observe(head, token, mass);
    if (!real[head / call.heads]) return;
    if (call.centre) centre(head, token.k);
    move(head, token, gone, candidates, room);
  }

  // The new token's numbers and its statistics before anyone attended to it.
  void arrive(int64_t head, Token& token) {
    const Segment& own = call.segment.back();
    const int64_t D = call.k_dim;
    load_row(own.k.codec, own.k.codes + head * width(own.k.codec, D), D, token.k);
    load_row(own.v.codec, own.v.codes + head * width(own.v.codec, call.v_dim), call.v_dim, token.v);
    token.pos = state.seen[head / call.heads];
    if (score.has_norm)
      token.norm = bf16_bits(spread(std::sqrt(dot(token.v, token.v, call.v_dim))))[0];
    if (!score.has_novelty || !real[head / call.heads]) return;
    float like = likeness(state.key_sum + head * D, token.k, D);
    if (state.value_sum)
      like = (like + likeness(state.value_sum + head * call.v_dim, token.v, call.v_dim)) / 2;
    const float code = std::nearbyint(like * -NOVELTY_TOP);
    token.novelty = std::abs(code) <= NOVELTY_TOP ? (int8_t)code : 0;  // 0 for NaN
  }

  // The cosine of x [D] with the mean direction so far, which x moves on.
  static float likeness(float* sum, const float* x, int64_t D) {
    const float length = std::max(std::sqrt(dot(x, x, D)), 1e-12f);
    for (int64_t j = 0; j < D; j += W)
      store_some(sum + j, load_some<vf>(sum + j, D - j) + load<vf>(x + j) / length, D - j);
    const float size = std::max(std::sqrt(dot(sum, sum, D)), 1e-12f);
    return dot(x, sum, D) / length / size;
  }

  // What the token at `slot` of the ring has when it leaves, given those behind it.
  int8_t as_it_leaves(const int8_t* novelty, int64_t slot) const {
    const int64_t window = ring - sinks, n = score.ahead + 1;
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += novelty[sinks + (slot - sinks + i) % window];
    return (int8_t)std::min(std::nearbyint(2 * total / n + NOVELTY_TOP), NOVELTY_TOP);
  }

  // The average mass moves on by one step; padding attends to nothing.
  void observe(int64_t head, Token& token, float* seen) {
    if (!score.has_mass) return;
    const bool attends = real[head / call.heads];
    const float kept = std::exp2(score.log2_decay), share = (1 - kept) / MASS_UNIT;
    const float most = score.mass == F16 ? 65504.0f : std::numeric_limits<float>::max();
    char* mass = state.stats.mass + head * call.slots * width(score.mass, 1);
    if (attends)
      attention.probabilities<true>(head * call.groups, (head + 1) * call.groups, seen);
    else
      std::fill(seen, seen + call.slots + 1, 0.0f);
    for (int64_t i = 0; i <= call.slots; i += W) {  // the last is the token's
      const vf before = plain_some(score.mass, mass, i, call.slots);
      const vf x = kept * before + share * load<vf>(seen + i);
      store(seen + i, x < most ? x : spread(most));
    }
    store_row(score.mass, seen, call.slots, mass);
    store_row(score.mass, seen + call.slots, 1, token.mass);
  }

  // Until a token leaves the ring, the centre is the mean key of all tokens so far.
  void centre(int64_t head, const float* k) {
    const float before = state.count[head / call.heads];
    if (before > ring) return;
    float* to = call.centre + head * call.k_dim;
    for (int64_t j = 0; j < call.k_dim; j++) to[j] = (to[j] * before + k[j]) / (before + 1);
  }

  // The token takes its ring slot, the one there goes down the tiers, as far as it wins.
  void move(int64_t head, Token& token, Token& gone, Candidates& candidates, char* room) {
    const int64_t count = state.count[head / call.heads], now = token.pos;
    const size_t levels = call.segment.size() - 1;
    int64_t slot = count < sinks ? count : sinks + (count - sinks) % (ring - sinks);
    int64_t start = head * call.slots;
    for (size_t i = 0; i < levels; start += call.segment[i++].slots) {
      const Segment& s = call.segment[i];
      const bool last = i + 1 == levels;
      if (i > 0) {
        gather(start, s.slots, token, candidates);
        slot = Ranking(score, candidates, now, call.sliding, last).weakest();
        if (slot < 0 || slot >= s.slots) continue;  // the token on its way is the weakest itself
      }
      const int64_t at = head * s.slots + slot;
      const int8_t left = i == 0 && score.ahead && slot >= sinks
          ? as_it_leaves(state.stats.novelty + start, slot) : 0;
      exchange(start + slot, token, gone);
      if (i == 0 && score.ahead) gone.novelty = left;
      const bool more = !last && gone.pos >= 0;
      if (more) {
        decode(s.k, at, call.k_dim, gone.k, room);
        decode(s.v, at, call.v_dim, gone.v, room);
        if (s.centred) add_centre(head, 1, gone.k);
      }
      if (s.centred) add_centre(head, -1, token.k);
      encode(s.k, at, call.k_dim, token.k, room);
      encode(s.v, at, call.v_dim, token.v, room);
      if (!more) return;
      std::swap(token, gone);
    }
  }

  void add_centre(int64_t head, float sign, float* k) const {
    const float* from = call.centre + head * call.k_dim;
    for (int64_t j = 0; j < call.k_dim; j++) k[j] += sign * from[j];
  }

  // Position and statistics go in at slot `at` of all, what was there into `gone`.
  void exchange(int64_t at, const Token& token, Token& gone) {
    const Stats& stats = state.stats;
    gone.pos = state.pos[at];
    state.pos.set(at, token.pos);
    if (score.has_mass) {
      const int64_t bytes = width(score.mass, 1);
      std::memcpy(gone.mass, stats.mass + at * bytes, bytes);
      std::memcpy(stats.mass + at * bytes, token.mass, bytes);
    }
    if (score.has_norm) gone.norm = std::exchange(stats.norm[at], token.norm);
    if (score.has_novelty) gone.novelty = std::exchange(stats.novelty[at], token.novelty);
  }

  // n slots from `start` of all and the token behind them.
  void gather(int64_t start, int64_t n, const Token& token, Candidates& c) const {
    const Stats& stats = state.stats;
    c.count = n + 1;
    const int64_t end = whole(c.count, Candidates::STEP);
    state.pos.read(start, n, c.pos);
    std::fill(c.pos + n, c.pos + end, -1);
    c.pos[n] = token.pos;
    auto fill = [&](bool has, int64_t codec, const void* from, const void* own, float* to) {
      if (!has) return;
      load_row(codec, (const char*)from + start * width(codec, 1), n, to);
      std::fill(to + n, to + end, 0.0f);
      to[n] = plain_some(codec, (const char*)own, 0, 1)[0];
    };
    fill(score.has_mass, score.mass, stats.mass, token.mass, c.mass);
    fill(score.has_norm, BF16, stats.norm, &token.norm, c.norm);
    if (!score.has_novelty) return;
    std::copy(stats.novelty + start, stats.novelty + start + n, c.novelty);
    std::fill(c.novelty + n, c.novelty + end, 0.0f);
    c.novelty[n] = token.novelty;
  }
};
