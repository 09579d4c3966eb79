// SPDX-License-Identifier: MIT
// Decode of Mamba-3: the cut of a row, and the formulas that its two kernels share.  Both must give
// the same bits, so every product that is added to something is written as fmaf() or __fmul_rn().
//
// A sum over the states of a row goes, whatever their dtype: in fours of neighbours, one after the
// other, over the chunks of a lane; then fours with their neighbours, pairs with theirs and so on.
#pragma once

#include <type_traits>

#include "cuda/state_update_lanes.cuh"

namespace ssmk::cuda {

constexpr int kMamba3Threads = 256;
constexpr int kMamba3Chunks = 4;  // packs of a row in one thread, at most
constexpr int kEight = 8;         // states of a pack, if not packed in memory otherwise

// In packs of eight states.
inline Cut mamba3_cut(int64_t dstate) { return cut_of(dstate, kEight, 16, kMamba3Chunks); }

// Sums over the lanes of a row, neighbours first, for R rows at a time, R <= lanes <= 32.  y[0] is
// then the sum of row `returned` of the R; lanes that differ from R on upwards have the same.
template <int R, int kOff = 1, int N>
__device__ __forceinline__ int sum_neighbours(float (&y)[N], int lane, int lanes) {
  if constexpr (R > 1) {
    constexpr int kHalf = R / 2;
    const bool upper = lane & kOff;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? y[i] : y[i + kHalf], kept = upper ? y[i + kHalf] : y[i];
      y[i] = kept + __shfl_xor_sync(~0u, sent, kOff);
    }
    return (upper ? kHalf : 0) + sum_neighbours<kHalf, kOff * 2>(y, lane, lanes);
  } else {
    for (int off = kOff; off < lanes; off <<= 1) y[0] += __shfl_xor_sync(~0u, y[0], off);
    return 0;
  }
}

constexpr float kTwoPi = 0x1.921fb6p+2f, kTwoPiLow = -0x1.777a5cp-23f;  // their sum is 2 pi

// (theta + pi half_turns) mod 2 pi, in [0, 2 pi).
__device__ __forceinline__ float turned(float theta, float half_turns) {
  // The step, less its whole turns (exactly), and what rounding takes from it.
  const float turn = fmaf(-2.0f, rintf(half_turns * 0.5f), half_turns);
  const float pi = kTwoPi / 2, step = __fmul_rn(turn, pi);
  const float step_low = fmaf(turn, kTwoPiLow / 2, fmaf(turn, pi, -step));
  const float sum = theta + step, part = sum - theta;
  const float low = ((theta - (sum - part)) + (step - part)) + step_low;
  const float whole = floorf(sum * (1 / kTwoPi));
  float at = fmaf(-whole, kTwoPi, sum) + fmaf(-whole, kTwoPiLow, low);
  if (at < 0) at += kTwoPi;
  if (at >= kTwoPi) at -= kTwoPi;
  return at;
}

__device__ __forceinline__ void sine_cosine(float theta, float *sine, float *cosine) {
  sincospif(theta * 0.318309886f, sine, cosine);
}

// How much of the new and of the old product a token adds, before dt' and the decay.
struct Trapezoid {
  float now = 1.0f, then = 0.0f;
};
__device__ __forceinline__ Trapezoid trapezoid(bool is_sigmoid, float value) {
  if (is_sigmoid) return {value, 1.0f - value};
  return {sigmoid(value), sigmoid(-value)};
}
__device__ __forceinline__ float new_coefficient(Trapezoid f, float dt, float psi_x) {
  return f.now * dt * psi_x;
}
__device__ __forceinline__ float old_coefficient(Trapezoid f, float dt, float decay, float psi_v) {
  return f.then * dt * decay * psi_v;
}

// A pair of elements turned by an angle.
__device__ __forceinline__ void turn_pair(float *a, float *b, float sine, float cosine) {
  const float x = *a, y = *b;
  *a = fmaf(x, cosine, -__fmul_rn(y, sine));
  *b = fmaf(x, sine, __fmul_rn(y, cosine));
}

// Pairs number `pair` and the next, in two neighbours and two more.
__device__ __forceinline__ void turn_quad(float2 *one, float2 *two, bool half, int pair,
                                          int nangles, const float2 *turns) {
  const float2 a = half ? float2{one->x, two->x} : *one, c = half ? float2{one->y, two->y} : *two;
  float2 first = a, second = c;
  if (pair < nangles) turn_pair(&first.x, &first.y, turns[pair].x, turns[pair].y);
  if (pair + 1 < nangles) turn_pair(&second.x, &second.y, turns[pair + 1].x, turns[pair + 1].y);
  *one = half ? float2{first.x, second.x} : first;
  *two = half ? float2{first.y, second.y} : second;
}

// 16 bytes of states to float32.
template <class S>
__device__ __forceinline__ void widen_pack(const uint4 &words, float (&to)[kPack<S>]) {
  if constexpr (sizeof(S) == 4) {
    to[0] = __uint_as_float(words.x), to[1] = __uint_as_float(words.y);
    to[2] = __uint_as_float(words.z), to[3] = __uint_as_float(words.w);
  } else {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<S, __nv_bfloat16>) {
        to[2 * i] = __uint_as_float(pairs[i] << 16);
        to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
      } else {
        to[2 * i] = __half2float(__ushort_as_half(uint16_t(pairs[i])));
        to[2 * i + 1] = __half2float(__ushort_as_half(uint16_t(pairs[i] >> 16)));
      }
    }
  }
}

// By a warp: what y of a rank is multiplied with, 1 / sqrt(mean(y^2) + eps).
__device__ __forceinline__ float norm_scale(const float *y, int headdim, float eps) {
  float squares = 0.0f;
  for (int i = threadIdx.x % 32; i < headdim; i += 32) squares = fmaf(y[i], y[i], squares);
  for (int off = 16; off; off >>= 1) squares += __shfl_xor_sync(~0u, squares, off);
  return 1.0f / sqrtf(squares / float(headdim) + eps);
}

}  // namespace ssmk::cuda
