// Which of a tier's tokens and the one that comes to it is the weakest: arkv_fx/scores.
#pragma once
#include "vectors.h"

// Vectors side by side, as for `exponential`.
constexpr int SIDE = 4;

// ln x for normal x > 0 to 2 ulp, by the polynomial of the Cephes library.
template <int N>
INLINE void logarithm(vf* x) {
  vf m[N], e[N], z[N], p[N];
  EACH m[i] = bits(((vi)x[i] & 0x7fffff) | 0x3f000000);
  EACH e[i] = number(((vi)x[i] >> 23) - 126);
  EACH e[i] = m[i] < 0.70710678f ? e[i] - 1.0f : e[i];
  EACH m[i] = m[i] < 0.70710678f ? m[i] + m[i] - 1.0f : m[i] - 1.0f;
  EACH z[i] = m[i] * m[i];
  EACH p[i] = m[i] * 7.0376836292e-2f - 1.1514610310e-1f;
  for (float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    EACH p[i] = p[i] * m[i] + c;
  EACH p[i] = p[i] * m[i] * z[i] - e[i] * 2.12194440e-4f - z[i] * 0.5f;
  EACH x[i] = e[i] * 0.693359375f + (m[i] + p[i]);
}

// What a score keeps of tokens; null pointers for what it does not.
struct Stats {
  char* mass;      // of Score::mass, in units of MASS_UNIT
  uint16_t* norm;  // bfloat16
  int8_t* novelty;
};

// As in mass.py, novelty.py and combined.py.
constexpr float MASS_UNIT = 0x1p-8f, NOVELTY_TOP = 127, LEAST_MASS = 1e-9f / MASS_UNIT;

// The options of the scores, see mass.py and combined.py.
struct Score {
  float log2_decay, margin;
  int64_t mass;   // F16 or F32
  int64_t ahead;  // tokens that share in the novelty of one that leaves the window
  bool use_age;
  bool has_mass, has_norm, has_novelty;
};

// Tokens whose ranks are compared, and `rank`; with room for SIDE vectors behind them.
struct Candidates {
  static constexpr int64_t STEP = SIDE * W;
  int64_t count;
  int32_t* pos;  // -1: none
  float *mass, *norm, *novelty, *rank;

  Candidates(Scratch& scratch, int64_t most) {
    pos = scratch.take<int32_t>(whole(most, STEP));
    for (float** p : {&mass, &norm, &novelty, &rank}) *p = scratch.take<float>(whole(most, STEP));
  }
  static int64_t nbytes(int64_t most) { return 5 * (4 * whole(most, STEP) + 64); }
};

class Ranking {
 public:
  // `now`: the newest position; `last`: whether the loser is evicted, else it is demoted.
  Ranking(const Score& score, const Candidates& c, int64_t now, int64_t sliding, bool last)
      : score(score), c(c), now(now) {
    // What the next query cannot see is free to go.
    first = sliding ? std::max<int64_t>(0, now + 2 - sliding) : 0;
    // With one statistic only, it decides both.
    both = last && score.has_mass && score.has_novelty;
  }

  // Of equals the last one loses; -1 where there is nothing to compare (NaN).
  int64_t weakest() {
    const float* rank = score.has_mass ? c.rank : c.novelty;
    if (score.has_mass) precision();
    if (both) {
      const Normal attention = normal(c.rank), unusual = normal(c.novelty);
      for (int64_t i = 0; i < c.count; i += W) {
        const vf x = (load<vf>(c.rank + i) - attention.shift) * attention.factor - score.margin;
        store(c.rank + i, larger((load<vf>(c.novelty + i) - unusual.shift) * unusual.factor, x));
      }
    }
    vf least = spread(-NEVER);
    vi found = vi{} - 1, index;
    for (int i = 0; i < W; i++) index[i] = i;
    for (int64_t i = 0; i < c.count; i += W, index += W) {
      const vf x = valid(i) ? load<vf>(rank + i) : spread(NEVER);
      const vi weaker = (x <= least) & (index < (int32_t)c.count);
      least = weaker ? x : least;
      found = weaker ? index : found;
    }
    int64_t best = -1;
    float value = -NEVER;
    for (int i = 0; i < W; i++)
      if (found[i] >= 0 && (least[i] < value || (least[i] == value && found[i] > best)))
        value = least[i], best = found[i];
    return best;
  }

 private:
  const Score& score;
  const Candidates& c;
  const int64_t now;
  int32_t first;
  bool both;

  vi valid(int64_t i) const { return load<vi>(c.pos + i) >= first; }

  // The mass, for the time a token had to gather it (mass.py: 1 - decay^(age + 1)), by its norm;
  // of which `combined` takes the logarithm.
  void precision() {
    constexpr int N = SIDE;
    const float rate = score.log2_decay * 0.69314718f;
    for (int64_t j = 0; j < c.count; j += Candidates::STEP) {
      vf x[N], gone[N];
      EACH x[i] = load<vf>(c.mass + j + i * W);
      if (score.use_age) {
        EACH {
          const vi age = (int32_t)now - load<vi>(c.pos + j + i * W);
          gone[i] = (number(age > 0 ? age : vi{}) + 1.0f) * rate;
        }
        exponential<N>(gone);
        EACH x[i] = x[i] / larger(1.0f - gone[i], spread(1e-6f));
      }
      if (score.has_norm) EACH x[i] *= load<vf>(c.norm + j + i * W);
      if (both) {
        EACH x[i] = larger(x[i], spread(LEAST_MASS));
        logarithm<N>(x);
      }
      EACH store(c.rank + j + i * W, x[i]);
    }
  }

  // What makes x z-scores over the valid tokens: (x - shift) * factor.
  struct Normal {
    float shift, factor;
  };

  Normal normal(const float* x) const {
    constexpr int N = SIDE;
    vf sum[8] = {}, square[8] = {};
    for (int64_t j = 0; j < c.count; j += Candidates::STEP)
      EACH {
        sum[i] += valid(j + i * W) ? load<vf>(x + j + i * W) : vf{};
        sum[N + i] -= number(valid(j + i * W));
      }
    f8 all = sums(sum);
    const float n = std::max(all[4] + all[5] + all[6] + all[7], 1.0f);
    const float shift = (all[0] + all[1] + all[2] + all[3]) / n;
    for (int64_t j = 0; j < c.count; j += Candidates::STEP)
      EACH {
        const vf y = valid(j + i * W) ? load<vf>(x + j + i * W) - shift : vf{};
        square[i] += y * y;
      }
    all = sums(square);
    const float spread = std::sqrt((all[0] + all[1] + all[2] + all[3]) / n);
    return {shift, 1 / std::max(spread, 1e-6f)};
  }
};
