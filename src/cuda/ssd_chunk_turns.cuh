// SPDX-License-Identifier: MIT
// What Mamba-3 adds to prefill on tensor cores: angles, keys and queries turned by them, the angle,
// k and v states.
//
// Angles are 31 bits of a turn, and whether they are not finite as the lowest bit of the word. Sums
// of them are exact, so a sequence may be cut anywhere.
#pragma once

#include "core/problem.h"
#include "cuda/ssd_chunk_mma_ptx.cuh"

namespace ssmk::cuda {

// How the pairs of angles of a chunk's tokens are dealt out: a thread has one pair and some tokens
// in a row.
struct TurnCut {
  int log_slots = 0, groups = 1, each = 1;  // slots: pairs, rounded up to a power of two
};
inline TurnCut turn_cut_of(int64_t nangles, int tokens, int threads) {
  TurnCut cut;
  if (nangles == 0) return cut;
  while (int64_t(2) << cut.log_slots < nangles) ++cut.log_slots;
  cut.groups = threads >> cut.log_slots < tokens ? threads >> cut.log_slots : tokens;
  cut.each = tokens / cut.groups;
  return cut;
}

// The slice of a head that a block has: its first channel, and how many.
struct HeadSlice {
  int head, group, slice, channel, channels;
};

// ---- Angles

__device__ __forceinline__ uint32_t add_turns(uint32_t a, uint32_t b) {
  return ((a & ~1u) + (b & ~1u)) | ((a | b) & 1u);
}

// pi tanh(angle) dt; not finite is marked in `bad`.
__device__ __forceinline__ uint32_t turn_of(float angle, float dt, uint32_t *bad) {
  const float e = exp2_fast(angle * (2.0f * kLog2e));  // may be infinite
  const float half_turns = fmaf(-2.0f, reciprocal(1.0f + e), 1.0f) * dt;
  if (!(fabsf(half_turns) < 0x1p22f)) {  // rarely
    if (!(fabsf(half_turns) < 3.4e38f)) *bad = 1u;
    return uint32_t(__float2ll_rn(half_turns * 0x1p30f)) << 1;
  }
  // Whole turns are left out first, exactly: numbers of 64 bits are slow to make.
  constexpr float kRound = 0x1.8p23f;
  const float turns = __fadd_rn(fmaf(half_turns, 0.5f, kRound), -kRound);
  return uint32_t(__float2int_rn(fmaf(-2.0f, turns, half_turns) * 0x1p30f)) << 1;
}

__device__ __forceinline__ uint32_t turns_of_angle(float theta) {
  if (!(fabsf(theta) < 3.4e38f)) return 1u;
  const double turns = double(theta) * 0.15915494309189534561;
  return uint32_t(__double2ll_rn((turns - floor(turns)) * 2147483648.0)) << 1;
}
__device__ __forceinline__ float angle_of_turns(uint32_t turns) {
  if (turns & 1u) return __int_as_float(0x7fffffff);
  const float theta = float(double(turns) * (6.283185307179586477 / 4294967296.0));
  return theta < 6.2831855f ? theta : 0.0f;
}
// Marks are not looked at.
__device__ __forceinline__ void sine_cosine_of(uint32_t turns, float *sine, float *cosine) {
  // [-1/2, 1/2) of a turn, to 2^-23.
  const float above_one = __uint_as_float(turns >> 9 ^ 0x00400000u | 0x3f800000u);
  const float angle = fmaf(above_one, 6.283185307f, -1.5f * 6.283185307f);
  *sine = __sinf(angle);
  *cosine = __cosf(angle);
}

// The share that the first token of a sequence adds to what came before it.
__device__ __forceinline__ float first_share(const SsdChunkProblem &p, int64_t row, int64_t token,
                                             int64_t head) {
  const float bias = p.dt_bias.given() ? load_at(p.dt_bias, head) : 0.0f;
  const float dt = transform_dt(p.dt_transform, load_at(p.dt, row, token, head) + bias);
  const float trap = load_at(p.trap, row, token, head);
  return (p.mamba3.trap_sigmoid ? 1.0f - trap : sigmoid(-trap)) * dt;
}

// ---- Keys and queries.  Rows tells where a row of a tile has its words (of two columns) and its
// 16-byte pieces.

// The turns of each token within its group, and those of the groups.
template <int kBatch>
__device__ __forceinline__ void sum_turns(const TurnCut &cut, uint32_t angles, DType dtype,
                                          int nangles, const float *dt, uint32_t turns,
                                          uint32_t *totals, int thread) {
  const int pair = thread & ((1 << cut.log_slots) - 1), group = thread >> cut.log_slots;
  if (2 * pair >= nangles || group >= cut.groups) return;
  uint32_t a = 0, b = 0, bad_a = 0, bad_b = 0;
  // kBatch at a time: what is under way is not waited for.  Tokens beyond a group's are read, for
  // nothing.
  const int first = group * cut.each, end = first + cut.each;
#pragma unroll 1
  for (int t = first; t < end; t += kBatch) {
    float2 v[kBatch];
    float step[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) step[i] = dt[t + i];
    const uint32_t at = t * nangles + 2 * pair;
    if (dtype == DType::kF32) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint2 w = load_two_words(angles + (at + i * nangles) * 4);
        v[i] = {__uint_as_float(w.x), __uint_as_float(w.y)};
      }
    } else {
      uint32_t w[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) w[i] = load_word(angles + (at + i * nangles) * 2);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        v[i] = dtype == DType::kBF16 ? unpack_two<__nv_bfloat16>(w[i]) : unpack_two<__half>(w[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (t + i < end) {
        a += turn_of(v[i].x, step[i], &bad_a);
        b += turn_of(v[i].y, step[i], &bad_b);
        store_two_words(turns + (at + i * nangles) * 4, a | bad_a, b | bad_b);
      }
  }
  *reinterpret_cast<uint2 *>(totals + group * nangles + 2 * pair) = {a | bad_a, b | bad_b};
}

// Two pairs of a row in two words, with their biases, turned and rounded.  Interleaved, a word is a
// pair; in halves, each has one element of both pairs.
template <class T, bool kHalf>
__device__ __forceinline__ uint2 turned_words(uint2 words, float2 bias0, float2 bias1, float2 sine,
                                              float2 cosine) {
  float2 v0 = unpack_two<T>(words.x), v1 = unpack_two<T>(words.y);
  v0.x += bias0.x, v0.y += bias0.y, v1.x += bias1.x, v1.y += bias1.y;
  if constexpr (kHalf)
    return {pack_two<T>(fmaf(v0.x, cosine.x, -v1.x * sine.x), fmaf(v0.y, cosine.y, -v1.y * sine.y)),
            pack_two<T>(fmaf(v0.x, sine.x, v1.x * cosine.x), fmaf(v0.y, sine.y, v1.y * cosine.y))};
  else
    return {pack_two<T>(fmaf(v0.x, cosine.x, -v0.y * sine.x), fmaf(v0.x, sine.x, v0.y * cosine.x)),
            pack_two<T>(fmaf(v1.x, cosine.y, -v1.y * sine.y), fmaf(v1.x, sine.y, v1.y * cosine.y))};
}

// Tiles of keys and queries, by their shared addresses: as they came, and as products want them.
struct KeyTiles {
  uint32_t raw_keys, raw_queries, keys, queries;
  bool with_queries;
};

// A thread's two angles before its group: turns, and whether they are marked.
struct TurnBase {
  uint2 turns, bad;
};
// The last group's threads write what the next chunk begins with.
__device__ __forceinline__ TurnBase turn_base(const TurnCut &cut, int nangles,
                                              const uint32_t *totals, const uint32_t *carry,
                                              uint32_t *next_carry, int thread) {
  const int pair = thread & ((1 << cut.log_slots) - 1), group = thread >> cut.log_slots;
  if (2 * pair >= nangles || group >= cut.groups) return {};
  uint2 base = *reinterpret_cast<const uint2 *>(carry + 2 * pair);
  uint2 bad = base;
  base.x &= ~1u, base.y &= ~1u;
#pragma unroll 4
  for (int i = 0; i < group; ++i) {
    const uint2 v = *reinterpret_cast<const uint2 *>(totals + i * nangles + 2 * pair);
    base.x += v.x & ~1u, base.y += v.y & ~1u;
    bad.x |= v.x, bad.y |= v.y;
  }
  bad.x &= 1u, bad.y &= 1u;
  if (group == cut.groups - 1) {
    const uint2 v = *reinterpret_cast<const uint2 *>(totals + group * nangles + 2 * pair);
    *reinterpret_cast<uint2 *>(next_carry + 2 * pair) = {add_turns(base.x | bad.x, v.x),
                                                         add_turns(base.y | bad.y, v.y)};
  }
  return {base, bad};
}

template <class T, class Rows, bool kRanks, bool kHalf, int kBatch>
__device__ __forceinline__ void turn_keys(const TurnCut &cut, const KeyTiles &tiles, int dstate,
                                          int nangles, int log_rank, uint32_t turns,
                                          const TurnBase &before, const float *bias, int thread) {
  constexpr int kN = Rows::kN;
  const int pair = thread & ((1 << cut.log_slots) - 1), group = thread >> cut.log_slots;
  if (2 * pair >= nangles || group >= cut.groups) return;
  const uint2 base = before.turns, bad = before.bad;
  const int first = kHalf ? 2 * pair : 4 * pair, second = kHalf ? first + dstate / 2 : first + 2;
  const int mask = (1 << log_rank) - 1;
  const auto two = [&](const float *v, int row, int n) {
    return *reinterpret_cast<const float2 *>(v + (row & mask) * kN + n);
  };
  const float *const query_bias = bias + (kN << log_rank);
  // Without ranks the same for all rows.
  float2 biases[4];
  const auto take_biases = [&](int row) {
    biases[0] = two(bias, row, first), biases[1] = two(bias, row, second);
    biases[2] = two(query_bias, row, first), biases[3] = two(query_bias, row, second);
  };
  if (!kRanks) take_biases(0);
  const auto words_at = [&](uint32_t tile, const uint32_t (&at)[2]) {
    if (!kHalf) return load_two_words(tile + at[0]);
    return uint2{load_word(tile + at[0]), load_word(tile + at[1])};
  };
  const auto put = [&](uint32_t tile, const uint32_t (&at)[2], uint2 words) {
    if (!kHalf) return store_two_words(tile + at[0], words.x, words.y);
    store_word(tile + at[0], words.x);
    store_word(tile + at[1], words.y);
  };
  const int begin = (group * cut.each) << log_rank, end = begin + (cut.each << log_rank);
#pragma unroll 1
  for (int from = begin; from < end; from += kBatch) {
    uint2 own[kBatch], k[kBatch], q[kBatch];
    uint32_t at[kBatch][2], marks = bad.x | bad.y;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = min(from + i, end - 1);  // others' rows are written meanwhile
      at[i][0] = Rows::word(row, first);
      if (kHalf) at[i][1] = Rows::word(row, second);
      own[i] = load_two_words(turns + ((row >> log_rank) * nangles + 2 * pair) * 4);
      k[i] = words_at(tiles.raw_keys, at[i]);
      if (tiles.with_queries) q[i] = words_at(tiles.raw_queries, at[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) marks |= own[i].x | own[i].y;
    const bool marked = marks & 1u;
    float2 sine = {}, cosine = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!kRanks || i == 0 || ((from + i) & mask) == 0) {  // a token's first rank
        sine_cosine_of(base.x + own[i].x, &sine.x, &cosine.x);
        sine_cosine_of(base.y + own[i].y, &sine.y, &cosine.y);
        if (marked) {  // rarely
          if ((bad.x | own[i].x) & 1u) sine.x = cosine.x = __int_as_float(0x7fffffff);
          if ((bad.y | own[i].y) & 1u) sine.y = cosine.y = __int_as_float(0x7fffffff);
        }
      }
      if (kRanks) take_biases(from + i);
      k[i] = turned_words<T, kHalf>(k[i], biases[0], biases[1], sine, cosine);
      if (tiles.with_queries)
        q[i] = turned_words<T, kHalf>(q[i], biases[2], biases[3], sine, cosine);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from + i < end) {
        put(tiles.keys, at[i], k[i]);
        if (tiles.with_queries) put(tiles.queries, at[i], q[i]);
      }
  }
}

template <class T>
__device__ __forceinline__ uint4 plus(uint4 v, float4 low, float4 high) {
  const auto one = [](uint32_t w, float a, float b) {
    const float2 f = unpack_two<T>(w);
    return pack_two<T>(f.x + a, f.y + b);
  };
  return {one(v.x, low.x, low.y), one(v.y, low.z, low.w), one(v.z, high.x, high.y),
          one(v.w, high.z, high.w)};
}

// The pieces that are not turned: biases alone.  nangles is a multiple of 8.
template <class T, class Rows, bool kRanks, int kBatch>
__device__ __forceinline__ void copy_keys(const KeyTiles &tiles, int dstate, int nangles, bool half,
                                          int log_rank, const float *bias, int thread,
                                          int threads) {
  constexpr int kN = Rows::kN, kRows = Rows::kRows, kPieces = kN / 8;
  const int mask = (1 << log_rank) - 1;
  // Pieces of a row: [0, turned) are turned; in halves again from middle on.
  const int middle = half ? dstate / 16 : kPieces, turned = half ? nangles / 8 : nangles / 4;
  const int low = middle - turned;                     // of the first half
  const int left = half ? kPieces - 2 * turned : low;  // of a row
  if (left <= 0) return;
  int log_slots = 0;
  while (1 << log_slots < left) ++log_slots;
  const int i = thread & ((1 << log_slots) - 1), step = threads >> log_slots;
  if (i >= left) return;
  const int piece = i < low ? turned + i : i + 2 * turned;
  float4 biases[4];
  const auto take_biases = [&](int row) {
    const float *const of_key = bias + (row & mask) * kN + piece * 8;
    const float *const of_query = of_key + (kN << log_rank);
    biases[0] = *reinterpret_cast<const float4 *>(of_key);
    biases[1] = *reinterpret_cast<const float4 *>(of_key + 4);
    biases[2] = *reinterpret_cast<const float4 *>(of_query);
    biases[3] = *reinterpret_cast<const float4 *>(of_query + 4);
  };
  if (!kRanks) take_biases(0);
#pragma unroll 1
  for (int from = thread >> log_slots; from < kRows; from += kBatch * step) {
    uint4 k[kBatch], q[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = from + j * step;
      const uint32_t at = Rows::piece(row < kRows ? row : from, piece);
      k[j] = load_four_words(tiles.raw_keys + at);
      if (tiles.with_queries) q[j] = load_four_words(tiles.raw_queries + at);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (kRanks) take_biases(from + j * step);
      k[j] = plus<T>(k[j], biases[0], biases[1]);
      if (tiles.with_queries) q[j] = plus<T>(q[j], biases[2], biases[3]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = from + j * step;
      if (row >= kRows) continue;
      const uint32_t at = Rows::piece(row, piece);
      store_four_words(tiles.keys + at, k[j]);
      if (tiles.with_queries) store_four_words(tiles.queries + at, q[j]);
    }
  }
}

// ---- What else a head carries, at the end: written by some threads

// Copies the states where no token changed them.
__device__ __forceinline__ void pass_states(const SsdChunkProblem &p, bool has_initial,
                                            int64_t slot, const HeadSlice &s,
                                            const HeadStates &from, const HeadStates &to,
                                            int64_t entry, int thread, int threads) {
  const auto value = [&](const auto &v, auto... i) {
    return has_initial && v.given() ? load_at(v, i...) : 0.0f;
  };
  if (to.h.given())
#pragma unroll 1
    for (int i = thread; i < s.channels * int(p.dstate); i += threads) {
      const int c = s.channel + i / int(p.dstate), n = i % int(p.dstate);
      store_at(to.h, value(from.h, slot, s.head, c, n), entry, s.head, c, n);
    }
  if (to.v.given())
#pragma unroll 1
    for (int c = thread; c < s.channels; c += threads)
      store_at(to.v, value(from.v, slot, s.head, s.channel + c), entry, s.head, s.channel + c);
  if (s.slice > 0) return;
  if (to.angle.given())
#pragma unroll 1
    for (int i = thread; i < p.mamba3.nangles; i += threads)
      store_at(to.angle, value(from.angle, slot, s.head, i), entry, s.head, i);
  if (to.k.given())
#pragma unroll 1
    for (int r = 0; r < p.mamba3.rank; ++r)
#pragma unroll 1
      for (int i = thread; i < p.dstate; i += threads)
        store_at(to.k, value(from.k, slot, r, s.head, i), entry, r, s.head, i);
}

// The angle, k and v states after token `token`, whose angles are `turns`.
__device__ __forceinline__ void write_parts(const SsdChunkProblem &p, int64_t row, int64_t token,
                                            const HeadSlice &s, const HeadStates &to, int64_t entry,
                                            const uint32_t *turns, int thread, int threads) {
  const Mamba3 &m = p.mamba3;
  if (to.v.given())
#pragma unroll 1
    for (int c = thread; c < s.channels; c += threads)
      store_at(to.v, load_at(p.x, row, token, s.head, s.channel + c), entry, s.head, s.channel + c);
  if (s.slice > 0) return;
  if (to.angle.given())
#pragma unroll 1
    for (int i = thread; i < m.nangles; i += threads)
      store_at(to.angle, angle_of_turns(turns[i]), entry, s.head, i);
  if (!to.k.given()) return;
#pragma unroll 1
  for (int r = 0; r < m.rank; ++r)
#pragma unroll 1
    for (int i = thread; i < p.dstate; i += threads) {
      const int half = int(p.dstate) / 2;
      const int pair = m.rotary_half ? (i < half ? i : i - half) : i >> 1;
      const bool second = m.rotary_half ? i >= half : i & 1;
      const auto key = [&](int n) {
        const float k = load_at(p.B, row, token, r, s.group, n);
        return m.B_bias.given() ? k + load_at(m.B_bias, s.head, r, n) : k;
      };
      float k = key(i);
      if (pair < m.nangles) {
        const int other = m.rotary_half ? (second ? i - half : i + half) : i ^ 1;
        float sine, cosine;
        if (turns[pair] & 1u) {
          sine = cosine = __int_as_float(0x7fffffff);
        } else {
          sincospif(float(int32_t(turns[pair])) * 0x1p-31f, &sine, &cosine);
        }
        k = fmaf(k, cosine, (second ? sine : -sine) * key(other));
      }
      store_at(to.k, k, entry, r, s.head, i);
    }
}

}  // namespace ssmk::cuda
