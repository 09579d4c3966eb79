// SPDX-License-Identifier: MIT
// Decode of Mamba-2 on tensor cores: up to four tokens of a bfloat16 model for the price of one.
//
// With h the states of a row, a_t the decay and v_t = dt'_t x_t of token t (ssmk.h, "state
// update"):
//
//     h_T = (a_0 ... a_T-1) h + sum_t v_t (a_t+1 ... a_T-1) B_t
//     C_t h_t = a_t (... a_1 (a_0 C_t h + v_0 C_t B_0) ...) + v_t C_t B_t
//
// so per state there is one multiply-add on the CUDA cores, whatever T is; the sum over tokens and
// the products C_t h and C_t B_j are matrix products.  B and C are bfloat16 as they come; a float32
// factor (v, and states kept in float32) enters as three bfloat16 values that add up to it exactly,
// so nothing is rounded that the other kernels do not round.  An infinite B gives NaN.
//
// A warp has 8 or 16 rows p.  Its lanes stand as the fragments of mma.m16n8k16 want them: lane
// 4 r + q holds a 16-byte pack in every quarter q of a group of states, of row r (or rows 2 r and
// 2 r + 1).  Matrix columns may stand for any states, as long as both factors agree; so the packs
// are fragments as they come from memory.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/state_update_tied.cuh"

namespace ssmk::cuda {

constexpr int kMmaTokens = 4;

// S: the states' type.  A lane's packs are kWords words, of kGroups groups; dstate is kGroups packs
// of a quad of lanes.  kRows: rows of a lane, of which headdim is a multiple.
template <class S, int kWords, int kGroups, int kRows, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_mma(const __grid_constant__ TiedProblem p) {
  using X = __nv_bfloat16;
  using Word = uint32_t;
  constexpr bool kWide = sizeof(S) == 4;
  constexpr int kTokens = kMmaTokens;
  constexpr int K = kWords * 4 / int(sizeof(S));  // states of a pack
  constexpr int kTiles = K / 2;                   // of 8 states, in a group
  constexpr int kGroupWords = 4 * kWords, kRowWords = kGroups * kGroupWords;
  constexpr int kGroupInputs = 4 * K / 2;  // words of B or C
  using Words = Pack<Word, kWords>;
  using Inputs = Pack<Word, K / 2>;  // of B or C, beside a pack of states
  begin();

  const uint32_t flags = p.flags;
  const int lane = threadIdx.x & 31, r = lane >> 2, q = lane & 3;
  const int tile = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const int row = (tile * 8 + r) * kRows;
  const int head = p.first_head + blockIdx.y, b = p.first_batch + blockIdx.z;
  const bool here = row < p.headdim;
  // Rows past the end read the first ones, and are not stored.
  const int safe = here ? row : 0, group = group_of(p, head);
  const char *const slot_at = p.in.data + int64_t(b) * p.in.batch;
  const char *const dt_at = at(p.dt, b, head), *const bias_at = at(p.dt_bias, head);
  const char *const A_at = at(p.A, head), *const D_at = at(p.D, head);
  const char *const x_at = at(p.x, b, head) + safe * int(sizeof(X));
  const char *const z_at = at(p.z, b, head) + safe * int(sizeof(X));
  const char *const B_at = at(p.B, b, group), *const C_at = at(p.C, b, group);
  const char *from =
      p.state + int64_t(head) * p.state_head + (safe * kRowWords + q * kWords) * int(sizeof(Word));

  const int tokens = int(count_of(p.num_tokens, b, p.ntokens));
  const auto store_out = [&](int t, const float (&y)[kRows]) {
    char *const at_token = const_cast<char *>(at(p.out, b, head)) + int64_t(t) * p.out.token;
    *reinterpret_cast<Pack<X, kRows> *>(at_token + row * int(sizeof(X))) = narrow_pack<X>(y);
  };
  const TiedSlots slots = tied_slots(p, b, slot_at);
  from += int64_t(slots.in) * p.state_slot;
  Word *const keep_at = reinterpret_cast<Word *>(const_cast<char *>(from) +
                                                 int64_t(slots.out - slots.in) * p.state_slot);
  Words h[kRows][kGroups];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      h[i][g] = load_pack_once<Word, kWords>(reinterpret_cast<const Word *>(from) + i * kRowWords +
                                             g * kGroupWords);
  // Without tokens a state that stays where it is is left alone.
  const bool keeps = here && !slots.pad && (tokens > 0 || slots.in != slots.out);
  const auto keep = [&](int i, int g, const Words &words) {
    store_pack_once_if(keeps, keep_at + i * kRowWords + g * kGroupWords, words);
  };

  // What is per head: lane q prepares token q.  Indices of tokens that there are not become those
  // of the last one; what it gives is dropped.
  const int last = tokens == 0 ? 0 : tokens - 1;
  const uint32_t dt_bits = load_either(dt_at + min(q, last) * p.dt.token, flags & kWideDt);
  const uint32_t A_bits = load_either(A_at, flags & kWideA);
  const uint32_t bias_bits = load_either(bias_at, flags & kWideBias);
  const uint32_t D_bits = load_either(D_at, flags & kWideD);
  Pack<X, kRows> x[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    x[t] = load_pack<X, kRows>(reinterpret_cast<const X *>(x_at + min(t, last) * p.x.token));
  // Token r's B as a row of states; and what columns r of C want: for bfloat16 states the even
  // words of token r's C, or the odd ones of token r - 4's.
  const Word *const C =
      reinterpret_cast<const Word *>(C_at + min(kWide ? r : r & 3, last) * p.C.token) + q * (K / 2);
  const Word *const B =
      reinterpret_cast<const Word *>(B_at + min(r, last) * p.B.token) + q * (K / 2);
  Inputs Cs[kGroups], Bs[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    Cs[g] = load_pack<Word, K / 2>(C + g * kGroupInputs);
    Bs[g] = load_pack<Word, K / 2>(B + g * kGroupInputs);
  }
  // The tokens 2 q and 2 q + 1, whose outputs this lane stores.
  const bool stores = here && q < kTokens / 2;
  Pack<X, kRows> z[2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
    z[t] =
        load_pack<X, kRows>(reinterpret_cast<const X *>(z_at + min(q * 2 + t, last) * p.z.token));

  const TiedStep own_step = tied_step<X>(p, dt_bits, bias_bits, A_bits);
  float decay[kTokens], v[kTokens][kRows];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float step = __shfl_sync(~0u, own_step.dt, t, 4);
    decay[t] = __shfl_sync(~0u, own_step.decay, t, 4);
    if (t >= tokens) decay[t] = 1.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) v[t][i] = t < tokens ? step * widen(x[t].v[i]) : 0.0f;
  }

  // C_t h and C_t B_j.  The words of a bfloat16 pack are a fragment as they stand if the even ones
  // count as row r and the odd ones as row r + 8, each with columns of its own: t and t + 4.  Of
  // float32 states two parts are such rows, with the same columns.
  float sums[kRows][4] = {}, third[4] = {}, cb[4] = {};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if constexpr (kWide) {
      const uint32_t b0 = Cs[g].v[0], b1 = Cs[g].v[1];
      uint32_t rest[2][2] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float w[4], mid[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          w[k] = __uint_as_float(h[i][g].v[k]);
          mid[k] = below_upper_half(w[k]);
        }
        const auto pair = [](const float (&v)[4], int k) {
          return upper_halves(__float_as_uint(v[k]), __float_as_uint(v[k + 1]));
        };
        mma_16(sums[i], pair(w, 0), pair(mid, 0), pair(w, 2), pair(mid, 2), b0, b1);
#pragma unroll
        for (int k = 0; k < 4; ++k) mid[k] = below_upper_half(mid[k]);
        rest[i][0] = pair(mid, 0), rest[i][1] = pair(mid, 2);
      }
      mma_16(third, rest[0][0], rest[1][0], rest[0][1], rest[1][1], b0, b1);
      mma_16(cb, Bs[g].v[0], 0, Bs[g].v[1], 0, b0, b1);
    } else {
      const bool odd = r >= 4;
      if constexpr (kWords == 4) {
        const uint32_t b0 = odd ? Cs[g].v[1] : Cs[g].v[0], b1 = odd ? Cs[g].v[3] : Cs[g].v[2];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          mma_16(sums[i], h[i][g].v[0], h[i][g].v[1], h[i][g].v[2], h[i][g].v[3], b0, b1);
        mma_16(cb, Bs[g].v[0], Bs[g].v[1], Bs[g].v[2], Bs[g].v[3], b0, b1);
      } else {
        const uint32_t b0 = odd ? Cs[g].v[1] : Cs[g].v[0];
#pragma unroll
        for (int i = 0; i < kRows; ++i) mma_8(sums[i], h[i][g].v[0], h[i][g].v[1], b0);
        mma_8(cb, Bs[g].v[0], Bs[g].v[1], b0);
      }
    }
  }
  float y[kRows][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      y[i][t] = kWide ? sums[i][t] + sums[i][2 + t] + third[2 * i + t]
                      : sums[i][t] + __shfl_xor_sync(~0u, sums[i][2 + t], 2);
    if (!kWide) cb[t] += __shfl_xor_sync(~0u, cb[2 + t], 2);
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float both = __shfl_sync(~0u, cb[t], j * 4 + q);
      const bool before = j <= (q & 1) * 2 + t;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (before) y[i][t] = fmaf(decay[j], y[i][t], both * v[j][i]);
    }

#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int token = q * 2 + t;
    float result[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float own = widen((q & 1) ? x[2 + t].v[i] : x[t].v[i]);
      // Without D not 0 x: x may be infinite.
      const float skip = __fmul_rn(either_value<X>(D_bits, flags & kWideD), own);
      if (flags & kHasD) y[i][t] += skip;
      const float gate = silu(widen(z[t].v[i]));
      if (flags & kHasZ) y[i][t] *= gate;
      result[i] = token < tokens && !slots.pad ? y[i][t] : 0.0f;
    }
    if (stores && token < p.ntokens) store_out(token, result);
  }
  if (tokens == 0) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int i = 0; i < kRows; ++i) keep(i, g, h[i][g]);
    return;
  }

  // The left factor of the sum over tokens: column 4 part + t is a part of token t's.
  float all = 1.0f;
#pragma unroll
  for (int t = kTokens - 1; t >= 0; --t) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) v[t][i] *= all;
    all *= decay[t];
  }
  uint32_t a[kRows][2] = {};
  const int t0 = (q & 1) * 2;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Split s0 = split(t0 ? v[2][i] : v[0][i]), s1 = split(t0 ? v[3][i] : v[1][i]);
    a[i][0] = q < 2 ? upper_halves(s0.part[0], s1.part[0]) : upper_halves(s0.part[1], s1.part[1]);
    a[i][1] = q < 2 ? upper_halves(s0.part[2], s1.part[2]) : 0;
  }
  // Column r of a tile is state (r & 1) + 2 tile of the pack of lane r / 2.
  const uint32_t half = (r & 1) ? 0x7632 : 0x5410;
  const auto B_of = [&](int t) {
    return reinterpret_cast<const Word *>(B_at + min(t, last) * p.B.token) + (r >> 1) * (K / 2);
  };
  const Word *const first_B = B_of(t0), *const second_B = B_of(t0 + 1);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const Inputs B0 = load_pack<Word, K / 2>(first_B + g * kGroupInputs);
    const Inputs B1 = load_pack<Word, K / 2>(second_B + g * kGroupInputs);
    float d[kTiles][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      d[k][0] = d[k][1] = d[k][2] = d[k][3] = 0.0f;
      const uint32_t b0 = __byte_perm(B0.v[k], B1.v[k], half);
      mma_16(d[k], a[0][0], kRows == 2 ? a[kRows - 1][0] : 0, a[0][1],
             kRows == 2 ? a[kRows - 1][1] : 0, b0, b0);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Words words;
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const float d0 = d[k][2 * i], d1 = d[k][2 * i + 1];
        if constexpr (kWide) {
          words.v[2 * k] = __float_as_uint(fmaf(all, __uint_as_float(h[i][g].v[2 * k]), d0));
          words.v[2 * k + 1] =
              __float_as_uint(fmaf(all, __uint_as_float(h[i][g].v[2 * k + 1]), d1));
        } else {
          const uint32_t w = h[i][g].v[k];
          const float low = fmaf(all, __uint_as_float(w << 16), d0);
          const float high = fmaf(all, __uint_as_float(w & 0xffff0000u), d1);
          const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
          words.v[k] = *reinterpret_cast<const uint32_t *>(&both);
        }
      }
      keep(i, g, words);
    }
  }
}

}  // namespace ssmk::cuda
