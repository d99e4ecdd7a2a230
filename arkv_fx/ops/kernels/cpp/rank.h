// Which of a tier's tokens and the one that comes to it is the weakest: arkv_fx/ops/scores.
#pragma once
#include "vectors.h"

// ln x for normal x > 0 to 2 ulp, by the polynomial of the Cephes library.
INLINE vf logarithm(vf x) {
  const vi b = (vi)x;
  vf m = bits((b & 0x7fffff) | 0x3f000000), e = number((b >> 23) - 126);
  const vi low = m < 0.70710678f;
  e = low ? e - 1.0f : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const vf z = m * m;
  vf p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  for (float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  return e * 0.693359375f + (m + (p * m * z - e * 2.12194440e-4f - z * 0.5f));
}

// What a score keeps of tokens; null pointers for what it does not.
struct Stats {
  float* mass;
  uint16_t* norm;    // bfloat16
  int16_t* novelty;  // float16
};

// The options of the scores, see mass.py and combined.py.
struct Score {
  float log2_decay, margin;
  bool use_age;
  bool has_mass, has_norm, has_novelty;
};

// Tokens whose ranks are compared, with room for whole vectors and room[2] for their scores.
struct Candidates {
  int64_t count, space;
  int32_t* pos;  // -1: none
  float *mass, *norm, *novelty, *room[2];

  Candidates(Scratch& scratch, int64_t most) : space(whole(most, W)) {
    pos = scratch.take<int32_t>(space);
    for (float** p : {&mass, &norm, &novelty, &room[0], &room[1]}) *p = scratch.take<float>(space);
  }
  static int64_t nbytes(int64_t most) { return 6 * (4 * whole(most, W) + 64); }
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
    float shift[2] = {}, factor[2] = {};
    if (both) {
      for (int64_t i = 0; i < c.count; i += W)
        store(c.room[0] + i, logarithm(precision(i) + 1e-9f));
      normalise(c.room[0], shift[0], factor[0]);
      normalise(c.novelty, shift[1], factor[1]);
    }
    vf least = spread(-NEVER);
    vi found = vi{} - 1, index;
    for (int i = 0; i < W; i++) index[i] = i;
    for (int64_t i = 0; i < c.count; i += W, index += W) {
      vf rank;
      if (both) {
        const vf attention = (load<vf>(c.room[0] + i) - shift[0]) * factor[0] - score.margin;
        rank = larger((load<vf>(c.novelty + i) - shift[1]) * factor[1], attention);
      } else {
        rank = score.has_mass ? precision(i) : load<vf>(c.novelty + i);
      }
      rank = valid(i) ? rank : spread(NEVER);
      const vi weaker = (rank <= least) & (index < (int32_t)c.count);
      least = weaker ? rank : least;
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

  // The mass; for the time a token had to gather it (mass.py: 1 - decay^(age + 1)); by its norm.
  vf precision(int64_t i) const {
    vf rank = load<vf>(c.mass + i);
    if (score.use_age) {
      const vi age = (int32_t)now - load<vi>(c.pos + i);
      vf x = (number(age > 0 ? age : vi{}) + 1.0f) * score.log2_decay * 0.69314718f;
      exponential<1>(&x);
      rank = rank / larger(1.0f - x, spread(1e-6f));
    }
    return score.has_norm ? rank * load<vf>(c.norm + i) : rank;
  }

  // What makes x z-scores over the valid tokens: (x - shift) * factor.
  void normalise(const float* x, float& shift, float& factor) const {
    vf sum[8] = {};
    for (int64_t i = 0; i < c.count; i += W) {
      sum[0] += valid(i) ? load<vf>(x + i) : vf{};
      sum[1] -= number(valid(i));
    }
    f8 all = sums(sum);
    const float n = std::max(all[1], 1.0f);
    shift = all[0] / n;
    sum[0] = vf{};
    for (int64_t i = 0; i < c.count; i += W) {
      const vf y = valid(i) ? load<vf>(x + i) - shift : vf{};
      sum[0] += y * y;
    }
    all = sums(sum);
    factor = 1 / (std::sqrt(all[0] / n) + 1e-6f);
  }
};
