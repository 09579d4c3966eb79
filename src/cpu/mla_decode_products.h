// SPDX-License-Identifier: MIT
// The two products of attention over a tile of cache tokens: queries by tokens, then weights by
// values.  Every sum runs in an order of its own that no block size changes.
#pragma once

#include "cpu/mla_decode_plan.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// Blocks whose sums fill the registers: 32 of them, 16 with sums of products in one step, 16.
constexpr int kQueryBlock = int(kMlaQueryBlock);
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTokenBlock = 4, kVectorBlock = 4;
#elif defined(__FMA__)
constexpr int kTokenBlock = 3, kVectorBlock = 2;
#else
constexpr int kTokenBlock = 2, kVectorBlock = 2;
#endif

// Between the scores of two queries: room for the last block of tokens, and for whole vectors.
constexpr int64_t kScorePitch = kMlaTile + 16;

// scores[r][t] = (kAdd: +=) sum_c q[r][c] tile[t][c] for one block of queries and tokens; width is
// a multiple of kLanes.
template <bool kAdd>
SSMK_INLINE void score_block(float *scores, const float *q, int64_t q_pitch, const float *tile,
                             int64_t pitch, int64_t width) {
  constexpr int kSums = kQueryBlock * kTokenBlock;
  vf acc[kSums];
  SSMK_UNROLL
  for (int i = 0; i < kSums; ++i) acc[i] = vf{};
  for (int64_t c = 0; c < width; c += kLanes) {
    vf k[kTokenBlock];
    SSMK_UNROLL
    for (int t = 0; t < kTokenBlock; ++t) k[t] = load(tile + t * pitch + c);
    SSMK_UNROLL
    for (int r = 0; r < kQueryBlock; ++r) {
      const vf x = load(q + r * q_pitch + c);
      SSMK_UNROLL
      for (int t = 0; t < kTokenBlock; ++t)
        acc[r * kTokenBlock + t] = fused(x, k[t], acc[r * kTokenBlock + t]);
    }
  }
  alignas(64) float sums[kSums + kLanes];
  SSMK_UNROLL
  for (int i = 0; i < kSums; i += kLanes) {
    vf lanes[kLanes];  // a copy: what a function takes by address would not stay in registers
    SSMK_UNROLL
    for (int k = 0; k < kLanes; ++k) lanes[k] = i + k < kSums ? acc[i + k] : vf{};
    store(sums + i, sum_each(lanes));
  }
  SSMK_UNROLL
  for (int r = 0; r < kQueryBlock; ++r) {
    SSMK_UNROLL
    for (int t = 0; t < kTokenBlock; ++t) {
      const float sum = sums[r * kTokenBlock + t];
      scores[r * kScorePitch + t] = kAdd ? scores[r * kScorePitch + t] + sum : sum;
    }
  }
}

// out[r][c] = rescale[r] out[r][c] + sum_{t < n} weights[r][t] tile[t][c] for kVectors vectors of
// kRows queries; without `rescale` what out held is not looked at.
template <int kRows, int kVectors>
SSMK_INLINE void value_block(float *out, int64_t out_pitch, const float *rescale,
                             const float *weights, const float *tile, int64_t pitch, int64_t n) {
  vf acc[kRows][kVectors];
  SSMK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SSMK_UNROLL
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = rescale ? load(out + r * out_pitch + v * kLanes) * splat(rescale[r]) : vf{};
  }
  for (int64_t t = 0; t < n; ++t) {
    vf x[kVectors];
    SSMK_UNROLL
    for (int v = 0; v < kVectors; ++v) x[v] = load(tile + t * pitch + v * kLanes);
    SSMK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const vf w = splat(weights[r * kScorePitch + t]);
      SSMK_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fused(w, x[v], acc[r][v]);
    }
  }
  SSMK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SSMK_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + r * out_pitch + v * kLanes, acc[r][v]);
  }
}

// The same for any number of queries, and all vectors of `width` channels.
inline void add_values(float *out, int64_t out_pitch, const float *rescale, const float *weights,
                       int64_t queries, const float *tile, int64_t pitch, int64_t n,
                       int64_t width) {
  const auto column = [&](auto vectors, int64_t c) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t r = 0;
    for (; r + kQueryBlock <= queries; r += kQueryBlock)
      value_block<kQueryBlock, kVectors>(out + r * out_pitch + c, out_pitch,
                                         rescale ? rescale + r : nullptr, weights + r * kScorePitch,
                                         tile + c, pitch, n);
    for (; r < queries; ++r)
      value_block<1, kVectors>(out + r * out_pitch + c, out_pitch, rescale ? rescale + r : nullptr,
                               weights + r * kScorePitch, tile + c, pitch, n);
  };
  int64_t c = 0;
  for (; c + kVectorBlock * kLanes <= width; c += kVectorBlock * kLanes)
    column(std::integral_constant<int, kVectorBlock>{}, c);
  for (; c < width; c += kLanes) column(std::integral_constant<int, 1>{}, c);
}

}  // namespace ssmk::cpu::SSMK_ISA
