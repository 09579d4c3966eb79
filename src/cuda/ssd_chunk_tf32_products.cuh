// SPDX-License-Identifier: MIT
// The products of a chunk of float32 inputs: see ssd_chunk_tf32.cuh.
//
// A product of two factors is three of TF32: what is left of a factor beyond its eleven bits is
// rounded to as many again.  Sums of tensor cores are cut off, not rounded: none is long, and the
// small products have sums of their own.
#pragma once

#include "cuda/ssd_chunk_mma_states.cuh"

namespace ssmk::cuda {

constexpr int kTokens = 32;                  // of a chunk of float32 inputs
constexpr int kWideSlice = kSlice * 4;       // bytes of a row of x, z or out
constexpr int kWeightBytes = kTokens * 4;    // of a row of M
constexpr int kJoinBytes = kTokens * kSlice * 4;

// Where a 16-byte piece of a row is: rows that are next to each other, and every second row of
// eight, have pairs of pieces in different banks.
struct WideMix {
  __device__ __forceinline__ static int of(int row) {
    return ((row ^ row >> 2) & 1) << 2 | (row & 2) | (row >> 2 & 1);
  }
};

// d += A B; A is 16 x 8, B 8 x 8.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifndef WROUND
#define WROUND 1
#define WCUT 0
#endif
// Factors of tensor cores that add up to values: eleven bits each, and of the second part the tensor
// cores take no more.  kRound: the first is rounded, not cut off, which takes an instruction more;
// if one of two factors is, what is left out has no bias.  A NaN stays in the second, and an
// infinity has one there.
template <int kValues, bool kRound_>
struct WideParts {
  uint32_t high[kValues], low[kValues];

  __device__ __forceinline__ void set(int i, uint32_t v) {
    constexpr int kRound = kRound_ ? WROUND : WCUT;
    if constexpr (kRound == 3) { high[i] = low[i] = v; return; }
    if constexpr (kRound == 2) { asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high[i]) : "f"(__uint_as_float(v))); }
    else
    high[i] = (kRound ? v + 0x1000u : v) & 0xffffe000u;
    low[i] = __float_as_uint(__uint_as_float(v) - __uint_as_float(high[i]));
  }
  __device__ __forceinline__ void set(int i, float v) { set(i, __float_as_uint(v)); }
};
template <int kValues>
using Rounded = WideParts<kValues, true>;
template <int kValues>
using Cut = WideParts<kValues, false>;

// Sums of a tile: of the large products, and of the small ones.
struct WideSums {
  float large[4], small[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < 4; ++k) large[k] = small[k] = 0.0f;
  }
  template <bool kRound>
  __device__ __forceinline__ void add(const WideParts<4, kRound> &a, uint32_t high0, uint32_t high1,
                                      uint32_t low0, uint32_t low1) {
    multiply_tf32(large, a.high, high0, high1);
#ifndef ONE_PRODUCT
    multiply_tf32(small, a.low, high0, high1);
    multiply_tf32(small, a.high, low0, low1);
#endif
  }
  __device__ __forceinline__ float all(int k) const { return large[k] + small[k]; }
};

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

// Of S = Q K^T the 16 rows of block `block` by the 8 columns of block `tile`; weighed, 0 for later
// tokens; to shared memory as M.
template <int kN>
__device__ __forceinline__ void multiply_keys_wide(uint32_t queries, uint32_t keys,
                                                   const WideRows &w, uint32_t weights, int block,
                                                   int tile, int lane) {
  constexpr int kBytes = kN * 4;
  const LaneRows a_lane = LaneRows::down_first(lane);
  const uint32_t q_row = queries + (block * 16 + a_lane.row) * kBytes;
  const uint32_t k_row = keys + (tile * 8 + (lane & 7)) * kBytes;
  const int q_mix = (WideMix::of(lane) ^ a_lane.piece) << 4;
  const int k_mix = (WideMix::of(lane) ^ lane >> 3) << 4;
  WideSums s[2];
  s[0].clear(), s[1].clear();
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) {
    const auto k = load_parts<Rounded<4>>(mixed(k_row, k_mix, 4 * n));
#pragma unroll
    for (int j = 0; j < 2; ++j)
      s[j].add(load_parts<Cut<4>>(mixed(q_row, q_mix, 4 * n + 2 * j)), k.high[2 * j],
               k.high[2 * j + 1], k.low[2 * j], k.low[2 * j + 1]);
  }
  const int g = lane >> 2, q = lane & 3;
  const int i[2] = {block * 16 + g, block * 16 + g + 8}, j = tile * 8 + 2 * q;
  const float2 sum = *reinterpret_cast<const float2 *>(w.sum + j);
  const float2 rest = *reinterpret_cast<const float2 *>(w.rest + j);
  const float2 later = *reinterpret_cast<const float2 *>(w.later + j);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float own = w.sum[i[r]], own_rest = w.rest[i[r]];
    const auto weighed = [&](int k, float before, float before_rest, float by) {
      const float product = (s[0].large[k] + s[1].large[k]) + (s[0].small[k] + s[1].small[k]);
      const float decay = exp2_fast((own - before) + (own_rest - before_rest));
      return j + (k & 1) <= i[r] ? product * (decay * by) : 0.0f;
    };
    const float a = weighed(2 * r, sum.x, rest.x, later.x);
    const float b = weighed(2 * r + 1, sum.y, rest.y, later.y);
    store_two_words(weights + mixed(i[r] * kWeightBytes, (WideMix::of(g) ^ q >> 1) << 4, 2 * tile) +
                        (q & 1) * 8,
                    __float_as_uint(a), __float_as_uint(b));
  }
}

// Y^T = h Q^T over the warp's half of the states.
template <int kN>
__device__ __forceinline__ void multiply_state_wide(MmaTile<kTokens> &y,
                                                    const MmaState<kN, true> &h, uint32_t queries,
                                                    int half, int lane) {
  constexpr int kBytes = kN * 4;
  const uint32_t row = queries + (lane & 7) * kBytes + half * (kBytes / 2);
  const int mix = (WideMix::of(lane) ^ lane >> 3) << 4;
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
      const auto b = load_parts<Cut<4>>(mixed(row + i * 8 * kBytes, mix, 4 * n));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        s[i].add(a[j], b.high[2 * j], b.high[2 * j + 1], b.low[2 * j], b.low[2 * j + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] = s[i].all(k);
}

// The sums over half of the states of the other warp's half of the tokens go to `sums`; then its
// sums for the own half come from there, and all are times exp(cs) of the tokens.
using WideHalf = MmaTile<kTokens / 2>;
__device__ __forceinline__ void send_half(const MmaTile<kTokens> &y, WideHalf &own, uint32_t sums,
                                          int pair, int half, int lane) {
  const uint32_t at = sums + pair * 2048 + half * 1024 + lane * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sent[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sent[k] = half ? y.v[i][k] : y.v[2 + i][k];
      own.v[i][k] = half ? y.v[2 + i][k] : y.v[i][k];
    }
    store_four_words(at + i * 512, {__float_as_uint(sent[0]), __float_as_uint(sent[1]),
                                    __float_as_uint(sent[2]), __float_as_uint(sent[3])});
  }
}
__device__ __forceinline__ void join_half(WideHalf &y, uint32_t sums, const float *decay, int pair,
                                          int half, int lane) {
  const uint32_t at = sums + pair * 2048 + (half ^ 1) * 1024 + lane * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 v = load_four_words(at + i * 512);
    const float2 e = *reinterpret_cast<const float2 *>(decay + half * 16 + i * 8 + 2 * (lane & 3));
    y.v[i][0] = (y.v[i][0] + __uint_as_float(v.x)) * e.x;
    y.v[i][1] = (y.v[i][1] + __uint_as_float(v.y)) * e.y;
    y.v[i][2] = (y.v[i][2] + __uint_as_float(v.z)) * e.x;
    y.v[i][3] = (y.v[i][3] + __uint_as_float(v.w)) * e.y;
  }
}

// U^T of the warp's channels: fragments of 8 tokens each, where column q stands for token 2 q, and
// q + 4 for the next.
struct WideValues {
  float v[kTokens / 8][4];
};
__device__ __forceinline__ void load_values(WideValues &u, uint32_t tile, int pair, int lane) {
  const int g = lane >> 2, q = lane & 3;
  const uint32_t at =
      tile + 2 * q * kWideSlice + ((4 * pair + (g >> 2)) ^ WideMix::of(2 * q)) * 16 + (g & 3) * 4;
#pragma unroll
  for (int s = 0; s < kTokens / 8; ++s)
#pragma unroll
    for (int k = 0; k < 4; ++k)  // the next token: another row, eight channels on: two pieces
      u.v[s][k] = __uint_as_float(load_word(((at ^ (k & 1 ? 32 : 0)) ^ (k >> 1 ? 64 : 0)) +
                                            (8 * s + (k >> 1)) * kWideSlice));
}

// Y^T += U^T M^T, for half kHalf of the tokens.
template <int kHalf>
__device__ __forceinline__ void multiply_half_wide(WideHalf &y, const WideValues &u,
                                                   uint32_t weights, int lane) {
  const int g = lane >> 2, q = lane & 3, mix = (WideMix::of(g) ^ q >> 1) << 4;
  const uint32_t row = weights + (kHalf * 16 + g) * kWeightBytes + (q & 1) * 8;
  WideSums s[2];
  s[0].clear(), s[1].clear();
#pragma unroll
  for (int j = 0; j < 2 * kHalf + 2; ++j) {
    Cut<4> a;
#pragma unroll
    for (int k = 0; k < 4; ++k) a.set(k, u.v[j][k]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (j <= kHalf * 2 + i) {
        const uint2 m = load_two_words(mixed(row + i * 8 * kWeightBytes, mix, 2 * j));
        Rounded<2> b;
        b.set(0, m.x), b.set(1, m.y);
        s[i].add(a, b.high[0], b.high[1], b.low[0], b.low[1]);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] += s[i].all(k);
}

// decay h + (w U)^T K; take(t, v) gets tile t of it.  `weight`: of tokens 8 s + 2 q and the next.
// Tokens from `end` on may be anything, if kEnds.
template <int kN, bool kEnds, class Weight, class Take>
__device__ __forceinline__ void multiply_values_keys(const MmaState<kN, true> &h,
                                                     const WideValues &u, uint32_t keys,
                                                     const Weight &weight, float decay, int end,
                                                     int half, int lane, const Take &take) {
  constexpr int kBytes = kN * 4;
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
  const uint32_t row = keys + 2 * q * kBytes + half * (kBytes / 2) + (g >> 1) * 4;
  const int mix = (WideMix::of(2 * q) ^ (g & 1)) << 4;
#pragma unroll
  for (int n = 0; n < kN / 32; ++n) {
    WideSums sums[2];
    sums[0].clear(), sums[1].clear();
#pragma unroll
    for (int s = 0; s < kTokens / 8; ++s) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Cut<2> b;  // of two tokens
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t at = mixed(row + (8 * s + k) * kBytes, mix ^ (k ? 64 : 0), 4 * n + 2 * j);
          b.set(k, kEnds && s * 8 + 2 * q + k >= end ? 0u : load_word(at));
        }
        sums[j].add(a[s], b.high[0], b.high[1], b.low[0], b.low[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = fmaf(h.v[2 * n + j][k], decay, sums[j].all(k));
      take(2 * n + j, v);
    }
  }
}

// The state after the chunk.
template <int kN>
__device__ __forceinline__ void add_to_state_wide(MmaState<kN, true> &h, const WideValues &u,
                                                  uint32_t keys, const WideRows &w, int half,
                                                  int lane) {
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
  multiply_values_keys<kN, true>(
      h, u, keys, weight, exp2_fast(sum), token + 1, t.half, t.lane,
      [&](int tile, const float (&v)[4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int n = t.half * (kN / 2) + tile / 2 * 16 + h.column(tile & 1, q, k & 1);
          if (t.has(k) && n < dstate) store_at(to, v[k], entry, t.head, t.p(k), n);
        }
      });
}

}  // namespace ssmk::cuda
