// SPDX-License-Identifier: MIT
// The products of a chunk of float32 inputs: see ssd_chunk_tf32.cuh.
//
// A product of two factors is three of TF32: each factor is two values of eleven bits.  Sums of
// tensor cores are cut off, not rounded: none is long, and the small products come first or have
// sums of their own.
#pragma once

#include "cuda/ssd_chunk_mma_states.cuh"

namespace ssmk::cuda {

constexpr int kTokens = 32;             // of a chunk
constexpr int kWideBytes = kSlice * 4;  // of a row of x, z or out
constexpr int kPartBytes = 128;         // of a row of a tile of 32 states, or of M
constexpr int kPartTile = kTokens * kPartBytes;
template <int kN>
constexpr int kWideTile = kTokens * kN * 4;  // of B or C: tiles of 32 states, one after the other
constexpr int kJoinBytes = kTokens * kSlice * 4;

// ---- Factors in two parts

// The first 32-bit word that a tensor core takes eleven bits of, and what is left.  Of that, too,
// it takes eleven bits: if one of two factors is rounded, what is left out has no bias.  A NaN
// stays in the second part; an infinity has one there.
__device__ __forceinline__ uint32_t rounded_part(uint32_t v) { return (v + 0x1000u) & 0xffffe000u; }
__device__ __forceinline__ uint32_t cut_part(uint32_t v) { return v & 0xffffe000u; }
__device__ __forceinline__ uint32_t rest_of(uint32_t v, uint32_t part) {
  return __float_as_uint(__uint_as_float(v) - __uint_as_float(part));
}

template <int kValues, bool kRound>
struct WideParts {
  uint32_t first[kValues], rest[kValues];

  __device__ __forceinline__ void set(int i, uint32_t v) {
    first[i] = kRound ? rounded_part(v) : cut_part(v);
    rest[i] = rest_of(v, first[i]);
  }
  __device__ __forceinline__ void set(int i, float v) { set(i, __float_as_uint(v)); }
};
template <int kValues>
using Rounded = WideParts<kValues, true>;
template <int kValues>
using Cut = WideParts<kValues, false>;

// Four matrices of 8 rows by 4 columns, as load_matrices(): lane 4 g + q gets row g, column q.
template <class Parts>
__device__ __forceinline__ Parts load_parts(uint32_t at) {
  uint32_t m[4];
  load_matrices(m, at);
  Parts p;
#pragma unroll
  for (int i = 0; i < 4; ++i) p.set(i, m[i]);
  return p;
}

// d += A B; A is 16 x 8, B 8 x 8.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums of a tile: of the large products, and of the small ones.
struct WideSums {
  float large[4], small[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < 4; ++k) large[k] = small[k] = 0.0f;
  }
  // The second factor: values i and i + 1 of b.
  template <bool kRoundA, int kValues, bool kRoundB>
  __device__ __forceinline__ void add(const WideParts<4, kRoundA> &a,
                                      const WideParts<kValues, kRoundB> &b, int i = 0) {
    multiply_tf32(large, a.first, b.first[i], b.first[i + 1]);
    multiply_tf32(small, a.rest, b.first[i], b.first[i + 1]);
    multiply_tf32(small, a.first, b.rest[i], b.rest[i + 1]);
  }
  __device__ __forceinline__ float all(int k) const { return large[k] + small[k]; }
};

// ---- Products within a chunk

// What is known of the tokens of a chunk.
struct WideRows {
  // Sums of the log2 decays, up to and with the token, to twice the bits of float32: they may be
  // large where their differences count.
  float sum[kTokens], rest[kTokens];
  float later[kTokens];   // its weight, for itself and later ones
  float decay[kTokens];   // exp2(sum)
  float ending[kTokens];  // its weight in the state after the chunk
  double all;             // of the log2 decays
  float last;             // exp2 of that
};

// Byte of columns `column` and the next of a row of M: a half of its rows, or of four of them,
// meets all banks.
__device__ __forceinline__ uint32_t weight_at(int row, int column) {
  const int mix = (row & 3) << 1 | (row >> 2 & 1);
  return row * kPartBytes + (((column >> 2) ^ mix) << 4) + (column & 2) * 4;
}

// A tile of S: weighed, 0 for later tokens; to shared memory as M.
__device__ __forceinline__ void weigh_products(const float (&s)[4], const WideRows &w,
                                               uint32_t weights, int block, int tile, int lane) {
  const int j = tile * 8 + 2 * (lane & 3);
  const float2 sum = *reinterpret_cast<const float2 *>(w.sum + j);
  const float2 rest = *reinterpret_cast<const float2 *>(w.rest + j);
  const float2 later = *reinterpret_cast<const float2 *>(w.later + j);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = block * 16 + r * 8 + (lane >> 2);
    const float own = w.sum[i], own_rest = w.rest[i];
    const auto weighed = [&](int k, float before, float before_rest, float by) {
      const float decay = exp2_fast((own - before) + (own_rest - before_rest));
      return j + (k & 1) <= i ? s[k] * (decay * by) : 0.0f;
    };
    store_two_words(weights + weight_at(i, j),
                    __float_as_uint(weighed(2 * r, sum.x, rest.x, later.x)),
                    __float_as_uint(weighed(2 * r + 1, sum.y, rest.y, later.y)));
  }
}

// Of S = Q K^T the 16 rows of block `block` by the 8 columns of block `tile`, to M.  kSplit: the
// rests of the queries follow their first parts, and two blocks of columns share what is loaded.
template <int kN, bool kSplit>
__device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys, const WideRows &w,
                                              uint32_t weights, int block, int tile, int lane) {
  const LaneRows a_lane = LaneRows::down_first(lane);
  // Of keys four matrices are eight rows by sixteen states, or sixteen by eight.
  const LaneRows b_lane = kSplit ? LaneRows::across_first(lane) : LaneRows{lane & 7, lane >> 3};
  const uint32_t q_row = queries + (block * 16 + a_lane.row) * kPartBytes;
  const uint32_t k_row = keys + (tile * 8 + b_lane.row) * kPartBytes;
  const int q_mix = (a_lane.piece ^ (lane & 7)) << 4, k_mix = (b_lane.piece ^ (lane & 7)) << 4;
  WideSums s[2];  // of two tiles, or of every second eight states
  s[0].clear(), s[1].clear();
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) {
    const int part = n / 2 * kPartTile, piece = n % 2 * 4;
    Rounded<4> k;
    if (!kSplit) k = load_parts<Rounded<4>>(mixed(k_row + part, k_mix, piece));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t at = mixed(q_row + part, q_mix, piece + 2 * j);
      if constexpr (kSplit) {
        k = load_parts<Rounded<4>>(mixed(k_row + part, k_mix, piece + 2 * j));
        Rounded<4> q;
        load_matrices(q.first, at);
        load_matrices(q.rest, at + kWideTile<kN>);
        s[0].add(q, k, 0);
        s[1].add(q, k, 2);
      } else {
        s[j].add(load_parts<Cut<4>>(at), k, 2 * j);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < (kSplit ? 2 : 1); ++i) {
    float product[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      product[k] =
          kSplit ? s[i].all(k) : (s[0].large[k] + s[1].large[k]) + (s[0].small[k] + s[1].small[k]);
    weigh_products(product, w, weights, block, tile + i, lane);
  }
}

// U^T of the warp's channels: fragments of 8 tokens each, where column q stands for token 2 q, and
// q + 4 for the next.
struct WideValues {
  float v[kTokens / 8][4];
};
__device__ __forceinline__ void load_values(WideValues &u, uint32_t tile, int pair, int lane) {
  const int g = lane >> 2, q = lane & 3;
  const uint32_t at = tile + piece_at(2 * q, 4 * pair + (g >> 2), kWideBytes) + (g & 3) * 4;
#pragma unroll
  for (int s = 0; s < kTokens / 8; ++s)
#pragma unroll
    for (int k = 0; k < 4; ++k)  // eight channels on: two pieces; the next token: another row
      u.v[s][k] = __uint_as_float(
          load_word((at ^ (k & 1) << 5 ^ (k >> 1) << 4) + (8 * s + (k >> 1)) * kWideBytes));
}

// Y^T += U^T M^T, for half kHalf of the tokens.
using WideHalf = MmaTile<kTokens / 2>;
template <int kHalf, bool kRound>
__device__ __forceinline__ void multiply_half(WideHalf &y, const WideValues &u, uint32_t weights,
                                              int lane) {
  const uint32_t at = weights + weight_at(lane >> 2, 2 * (lane & 3));
  WideSums s[2];
  s[0].clear(), s[1].clear();
#pragma unroll
  for (int j = 0; j < 2 * kHalf + 2; ++j) {
    WideParts<4, kRound> a;
#pragma unroll
    for (int k = 0; k < 4; ++k) a.set(k, u.v[j][k]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (j <= kHalf * 2 + i) {
        const uint2 m = load_two_words((at ^ j << 5) + (kHalf * 16 + i * 8) * kPartBytes);
        Rounded<2> b;
        b.set(0, m.x), b.set(1, m.y);
        s[i].add(a, b);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] += s[i].all(k);
}

// ---- Products with the state, by warps

// Y^T = h Q^T over the warp's half of the states.
template <int kN>
__device__ __forceinline__ void multiply_state(MmaTile<kTokens> &y, const MmaState<kN, true> &h,
                                               uint32_t queries, int half, int lane) {
  const uint32_t row = queries + half * (kWideTile<kN> / 2) + (lane & 7) * kPartBytes;
  const int mix = (lane >> 3 ^ (lane & 7)) << 4;
  WideSums s[kTokens / 8];
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) s[i].clear();
#pragma unroll
  for (int n = 0; n < kN / 32; ++n) {
    Rounded<4> a[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float (&v)[4] = h.v[2 * n + j];
      a[j].set(0, v[0]), a[j].set(1, v[2]), a[j].set(2, v[1]), a[j].set(3, v[3]);
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      const auto q =
          load_parts<Cut<4>>(mixed(row + n / 2 * kPartTile + i * 8 * kPartBytes, mix, n % 2 * 4));
#pragma unroll
      for (int j = 0; j < 2; ++j) s[i].add(a[j], q, 2 * j);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] = s[i].all(k);
}

// decay h + (w U)^T K; take(t, v) gets tile t of it.  `weight`: of tokens 8 s + 2 q and the next.
// Tokens from `end` on may be anything, if kEnds.
template <int kN, bool kEnds, class Weight, class Take>
__device__ __forceinline__ void multiply_values_keys(const MmaState<kN, true> &h,
                                                     const WideValues &u, uint32_t keys,
                                                     const Weight &weight, float decay, int end,
                                                     int half, int lane, const Take &take) {
  const int g = lane >> 2, q = lane & 3;
  Rounded<4> a[kTokens / 8];
#pragma unroll
  for (int s = 0; s < kTokens / 8; ++s) {
    const float2 w = weight(s);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      a[s].set(k, kEnds && s * 8 + 2 * q + k / 2 >= end ? 0.0f : u.v[s][k] * (k < 2 ? w.x : w.y));
  }
  // Column g of a tile of sums is state 4 (g % 2) + g / 2 of its eight.
  const uint32_t row = keys + half * (kWideTile<kN> / 2) + 2 * q * kPartBytes + (g >> 1) * 4;
  const int mix = ((g & 1) ^ 2 * q) << 4;
#pragma unroll
  for (int tile = 0; tile < kN / 16; ++tile) {
    WideSums sums;
    sums.clear();
#pragma unroll
    for (int s = 0; s < kTokens / 8; ++s) {
      Cut<2> b;  // of two tokens
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t at = mixed(row + tile / 4 * kPartTile + (8 * s + k) * kPartBytes,
                                  mix ^ k << 4, tile % 4 * 2);
        b.set(k, kEnds && s * 8 + 2 * q + k >= end ? 0u : load_word(at));
      }
      sums.add(a[s], b);
    }
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = fmaf(h.v[tile][k], decay, sums.all(k));
    take(tile, v);
  }
}

// h becomes the state after the chunk.
template <int kN>
__device__ __forceinline__ void add_to_state(MmaState<kN, true> &h, const WideValues &u,
                                             uint32_t keys, const WideRows &w, int half, int lane) {
  const auto weight = [&](int s) {
    return *reinterpret_cast<const float2 *>(w.ending + s * 8 + 2 * (lane & 3));
  };
  multiply_values_keys<kN, false>(h, u, keys, weight, w.last, kTokens, half, lane,
                                  [&](int tile, const float (&v)[4]) {
#pragma unroll
                                    for (int k = 0; k < 4; ++k) h.v[tile][k] = v[k];
                                  });
}

// The state after token `token` of the chunk, to a tensor.
template <int kN>
__device__ __forceinline__ void write_state_after(const MmaState<kN, true> &h, const WideValues &u,
                                                  uint32_t keys, const WideRows &w, int token,
                                                  const View<4> &to, int64_t entry,
                                                  const MmaThread &t, int dstate) {
  const int q = t.lane & 3;
  const float sum = w.sum[token], rest = w.rest[token];
  const auto weight = [&](int s) {
    float by[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = s * 8 + 2 * q + k;
      by[k] = exp2_fast((sum - w.sum[i]) + (rest - w.rest[i])) * w.later[i];
    }
    return float2{by[0], by[1]};
  };
  multiply_values_keys<kN, true>(h, u, keys, weight, exp2_fast(sum), token + 1, t.half, t.lane,
                                 [&](int tile, const float (&v)[4]) {
#pragma unroll
                                   for (int k = 0; k < 4; ++k) {
                                     const int n = t.half * (kN / 2) + tile / 2 * 16 +
                                                   h.column(tile & 1, q, k & 1);
                                     if (t.has(k) && n < dstate)
                                       store_at(to, v[k], entry, t.head, t.p(k), n);
                                   }
                                 });
}

}  // namespace ssmk::cuda
