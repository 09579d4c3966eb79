// SPDX-License-Identifier: MIT
// What a chunk needs before its products: the weights of its rows; for Mamba-3 the angles and from
// B and C the keys and queries.
#pragma once

#include "cuda/ssd_chunk_mma_states.cuh"

namespace ssmk::cuda {

// Log decays below are 0 in float32, and cut off there, so that sums stay finite.
constexpr double kLogDecayLimit = 200.0;

// The inputs of a token, as bits.
struct TokenBits {
  uint32_t dt, adt, trap;
};

__device__ __forceinline__ TokenBits read_token(const SsdChunkProblem &p, int64_t row, int token,
                                                int64_t head) {
  TokenBits b = {};
  b.dt = load_bits(p.dt.at(row, token, head), p.dt.dtype);
  if (p.adt.given()) b.adt = load_bits(p.adt.at(row, token, head), p.adt.dtype);
  if (p.trap.given()) b.trap = load_bits(p.trap.at(row, token, head), p.trap.dtype);
  return b;
}

__device__ __forceinline__ float transformed(const DtTransform &f, float dt) {
  if (f.softplus) dt = dt > 20.0f ? dt : softplus(dt);
  if (f.clamp) dt = dt < f.lo ? f.lo : dt > f.hi ? f.hi : dt;
  return dt;
}

__device__ __forceinline__ double log2_decay(double decay) {
  return (decay < -kLogDecayLimit  ? -kLogDecayLimit
          : decay > kLogDecayLimit ? kLogDecayLimit
                                   : decay) *
         1.4426950408889634074;
}

// The share that the first token of a sequence adds to what came before it.
__device__ __forceinline__ float first_share(const SsdChunkProblem &p, int64_t row, int64_t token,
                                             int64_t head) {
  const float bias = p.dt_bias.given() ? load_at(p.dt_bias, head) : 0.0f;
  const float dt = transformed(p.dt_transform, load_at(p.dt, row, token, head) + bias);
  const float trap = load_at(p.trap, row, token, head);
  return (p.mamba3.trap_sigmoid ? 1.0f - trap : sigmoid(-trap)) * dt;
}

// A chunk's rows are prepared in three steps, while the chunk before is computed.  First thread i
// of some: token i of the `tokens` of the chunk, or the one after them if the sequence goes on.
__device__ __forceinline__ void prepare_token(TokenTerms &to, float *dts, const TokenBits &b,
                                              const SsdChunkProblem &p, const BlockFacts &head,
                                              int i, int tokens, bool follows, int chunk_tokens) {
  const bool own = i < tokens, there = i < tokens + (follows ? 1 : 0);
  const float dt =
      there ? transformed(p.dt_transform, value_of(b.dt, p.dt.dtype) + head.bias) : 0.0f;
  float now = dt, share = 0.0f;
  if (p.trap.given() && there) {
    const float trap = value_of(b.trap, p.trap.dtype);
    now *= p.mamba3.trap_sigmoid ? trap : sigmoid(trap);
    share = dt * (p.mamba3.trap_sigmoid ? 1.0f - trap : sigmoid(-trap));
  }
  to.share[i] = share;
  if (i >= chunk_tokens) return;
  const double decay = p.adt.given() ? double(value_of(b.adt, p.adt.dtype)) : double(dt) * head.A;
  to.decay[i] = own ? log2_decay(decay) : 0.0;
  to.now[i] = own ? now : 0.0f;
  dts[i] = own ? dt : 0.0f;
}

// Then one warp: the sums of the log2 decays.
__device__ __forceinline__ void sum_decays(TokenTerms &to, int chunk_tokens, int lane) {
  const bool there = 2 * lane < chunk_tokens;
  const double a = there ? to.decay[2 * lane] : 0.0, b = there ? to.decay[2 * lane + 1] : 0.0;
  double sum = a + b;
#pragma unroll
  for (int off = 1; off < 32; off *= 2) {
    const double below = __shfl_up_sync(~0u, sum, off);
    if (lane >= off) sum += below;
  }
  double before = __shfl_up_sync(~0u, sum, 1);
  if (lane == 0) before = 0;
  if (there) {
    to.sum[2 * lane] = before + a;
    to.sum[2 * lane + 1] = sum;
  }
  if (lane == 31) to.all = sum;
}

// Then a thread for each row.  `carried`: what follows adds its share to the last token's weight,
// else that is left apart.
__device__ __forceinline__ void prepare_row(RowArrays &to, const TokenTerms &terms, int row,
                                            int tokens, bool carried, int log_rank) {
  const int i = row >> log_rank;
  const bool own = i < tokens;
  const double sum = own ? terms.sum[i] : 0.0;
  const float now = own ? terms.now[i] : 0.0f;
  const float later = own ? now + (i < tokens - 1 || carried ? terms.share[i + 1] : 0.0f) : 0.0f;
  to.sum[row] = float(sum);
  to.later[row] = later;
  to.same[row] = now;
  to.decay[row] = exp2_fast(float(sum));
  to.ending[row] = own ? exp2_fast(float(terms.all - sum)) * later : 0.0f;
  if (row == 0) {
    to.last[0] = exp2_fast(float(terms.all));
    to.last[1] = terms.share[tokens];
  }
}

// ---- Mamba-3

// The turns of each token within its group, and those of the groups.
__device__ __forceinline__ void sum_turns(const TurnCut &cut, uint32_t angles, DType dtype,
                                          int nangles, const float *dt, uint32_t turns,
                                          uint32_t *totals, int thread) {
  const int pair = thread & ((1 << cut.log_slots) - 1), group = thread >> cut.log_slots;
  if (2 * pair >= nangles || group >= cut.groups) return;
  uint32_t a = 0, b = 0, bad_a = 0, bad_b = 0;
  // Several at a time: what is under way is not waited for.  Tokens beyond a group's are read, for
  // nothing.
  constexpr int kBatch = 4;
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

template <class T, int kN, bool kRanks, bool kHalf>
__device__ __forceinline__ void turn_keys(const TurnCut &cut, const KeyTiles &tiles, int dstate,
                                          int nangles, int log_rank, uint32_t turns,
                                          const uint32_t *totals, const uint32_t *carry,
                                          uint32_t *next_carry, const float *bias, int thread) {
  constexpr int kBytes = kN * 2;
  const int pair = thread & ((1 << cut.log_slots) - 1), group = thread >> cut.log_slots;
  if (2 * pair >= nangles || group >= cut.groups) return;
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
  constexpr int kBatch = 4;
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
      at[i][0] = word_at(row, first, kBytes);
      if (kHalf) at[i][1] = word_at(row, second, kBytes);
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
template <class T, int kN, bool kRanks>
__device__ __forceinline__ void copy_keys(const KeyTiles &tiles, int dstate, int nangles, bool half,
                                          int log_rank, const float *bias, int thread) {
  constexpr int kPieces = kN / 8;
  const int mask = (1 << log_rank) - 1;
  // Pieces of a row: [0, turned) are turned; in halves again from middle on.
  const int middle = half ? dstate / 16 : kPieces, turned = half ? nangles / 8 : nangles / 4;
  const int low = middle - turned;                     // of the first half
  const int left = half ? kPieces - 2 * turned : low;  // of a row
  if (left <= 0) return;
  int log_slots = 0;
  while (1 << log_slots < left) ++log_slots;
  const int i = thread & ((1 << log_slots) - 1), step = kTeam >> log_slots;
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
  constexpr int kBatch = 2;
#pragma unroll 1
  for (int from = thread >> log_slots; from < kRows; from += kBatch * step) {
    uint4 k[kBatch], q[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = from + j * step;
      const uint32_t at = piece_at(row < kRows ? row : from, piece, kN * 2);
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
      const uint32_t at = piece_at(row, piece, kN * 2);
      store_four_words(tiles.keys + at, k[j]);
      if (tiles.with_queries) store_four_words(tiles.queries + at, q[j]);
    }
  }
}

// Rows of u from those of x: u^r = psi^r x.
template <class T>
__device__ __forceinline__ void spread_values(uint32_t x, uint32_t u, const float *psi,
                                              int log_rank, int thread) {
  const int piece = thread & 7, mask = (1 << log_rank) - 1;
#pragma unroll
  for (int row = thread >> 3; row < kRows; row += kTeam / 8) {
    uint4 v = load_four_words(x + piece_at(row >> log_rank, piece, kSliceBytes));
    const float *const by = psi + (row & mask) * kSlice + piece * 8;
    const float4 low = *reinterpret_cast<const float4 *>(by);
    const float4 high = *reinterpret_cast<const float4 *>(by + 4);
    const auto one = [](uint32_t w, float a, float b) {
      const float2 f = unpack_two<T>(w);
      return pack_two<T>(f.x * a, f.y * b);
    };
    v = {one(v.x, low.x, low.y), one(v.y, low.z, low.w), one(v.z, high.x, high.y),
         one(v.w, high.z, high.w)};
    store_four_words(u + piece_at(row, piece, kSliceBytes), v);
  }
}

}  // namespace ssmk::cuda
