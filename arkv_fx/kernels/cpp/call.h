// What comes in, and how it is divided among threads.
#pragma once
#include <algorithm>
#include <vector>

#include "mask.h"
#include "rows.h"

// Keys or values of a segment: the fields of their codec, [B, H, slots, ...] each.
struct Stored {
  int64_t codec;
  char* codes;
  uint16_t* scale;
  uint8_t* zero;
};

// Positions of slots, -1 where one is empty: int16 where the plan counts no further, else int32.
struct Positions {
  char* data;
  bool narrow;

  explicit operator bool() const { return data; }
  Positions operator+(int64_t n) const { return {data + n * (narrow ? 2 : 4), narrow}; }
  int32_t operator[](int64_t i) const {
    return narrow ? load<int16_t>(data + 2 * i) : load<int32_t>(data + 4 * i);
  }
  // The first n of W from the i-th on, zeros behind.
  vi some(int64_t i, int64_t n) const {
    return narrow ? widen_some((const int16_t*)data + i, n) : load_some<vi>((int32_t*)data + i, n);
  }
  void read(int64_t from, int64_t n, int32_t* to) const {
    if (narrow)
      std::copy_n((const int16_t*)data + from, n, to);
    else
      std::copy_n((const int32_t*)data + from, n, to);
  }
  void set(int64_t i, int32_t x) const {
    if (narrow)
      store(data + 2 * i, (int16_t)x);
    else
      store(data + 4 * i, x);
  }
};

struct Segment {
  int64_t slots, centred;
  Positions pos;  // its slots among all of the first head's; none: the new token, never hidden by it
  Stored k, v;
};

struct Call {
  int64_t threads, batch, heads, groups, k_dim, v_dim, dtype, sliding;
  int64_t slots;            // of one head, in all segments
  const char* q;            // [B, H, G, Dk]
  char *k, *v;              // [B, H, Dk], [B, H, Dv]
  const int32_t* position;  // [B]
  Mask mask;                // its columns by position, the new token's last
  const float* sink;        // [H * G]
  float* centre;            // [B, H, Dk]
  float scale, softcap;
  char* out;                // [B, H, G, Dv]
  int64_t out_dtype;
  std::vector<Segment> segment;  // ring, tiers, the new token
};

// Rows of one segment for one team: up to MOST queries of one head.
struct Unit {
  int64_t team, segment, first, count;
  int64_t column, room;  // where its logits begin in a row of probs, and of the padded scratch
};

struct Team {
  int64_t head, query, size;  // head of B * H; first query of B * H * G
  size_t begin, end;          // its units
};

inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Plan {
  int64_t columns = 0, padded = 0;
  std::vector<Team> teams;
  std::vector<Unit> units;

  explicit Plan(const Call& call) {
    const int64_t heads = call.batch * call.heads, parts = (call.groups + MOST - 1) / MOST;
    const int64_t segments = call.segment.size();
    for (int64_t s = 0; s < segments; s++) columns += call.segment[s].slots;
    // One thread takes a segment at once; several need units that can be shared out evenly.
    int64_t most = whole(columns, BLOCK);
    if (call.threads > 1) most = whole(columns * heads * parts / (call.threads * 8) + 1, BLOCK);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t from = call.groups * part / parts, to = call.groups * (part + 1) / parts;
        const size_t begin = units.size();
        int64_t column = 0, room = 0;
        for (int64_t s = 0; s < segments; s++)
          for (int64_t i = 0; i < call.segment[s].slots; i += most) {
            const int64_t count = std::min(most, call.segment[s].slots - i);
            units.push_back({(int64_t)teams.size(), s, i, count, column, room});
            column += count;
            room += whole(count, 2 * W);
          }
        padded = room;
        teams.push_back({h, h * call.groups + from, to - from, begin, units.size()});
      }
  }
};

// Scratch that is kept from call to call: fresh memory would cost a page fault every 4 KiB.
class Scratch {
 public:
  void start(size_t bytes) {
    if (held.size() < bytes + 64) held.resize(bytes + 64);
    next = (char*)(((uintptr_t)held.data() + 63) / 64 * 64);
  }
  template <class T>
  T* take(int64_t n) {
    T* p = (T*)next;
    next += whole(n * sizeof(T), 64);
    return p;
  }

 private:
  std::vector<char> held;
  char* next = nullptr;
};
