// SPDX-License-Identifier: MIT
// One row of states of a Mamba-3 head, one token: the loop that all else is made for.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// Two vectors of a row: even and odd elements where that is the cheaper order.
template <class T>
SSMK_INLINE void load_two(const T *p, vf *a, vf *b) {
  if constexpr (std::is_same_v<T, bf16>) {
    load_pairs(p, a, b);
  } else {
    *a = load(p);
    *b = load(p + kLanes);
  }
}
template <class T>
SSMK_INLINE void store_two(T *p, vf a, vf b) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_pairs(p, a, b);
  } else {
    store(p, a);
    store(p + kLanes, b);
  }
}

// States are asked for that long before they are read, so that memory works while keys are made and
// sums added up; into the second level, as the first has no room for them that long.
constexpr int64_t kAheadBytes = 8192;

// One row of n states.  keys: for every vector of states R keys, R old ones if kTrap, R queries.
// coefs: u of the row, then w if kTrap, `ld` apart.  Lane sums of h q_r go to
// sums[r * kLanes * kLanes].
template <int R, bool kTrap, class T>
SSMK_INLINE void update_heads_row(const T *from, T *to, const float *keys, int64_t n, float decay,
                                  const float *coefs, int64_t ld, float *sums) {
  constexpr int kKeys = kTrap ? 2 * R : R, kStep = (kKeys + R) * kLanes;
  constexpr int kSums = R <= 2 ? 2 : 1;  // enough to hide the latency of an addition
  vf coef[kKeys], sum[kSums * R] = {};
  SSMK_UNROLL
  for (int r = 0; r < kKeys; ++r) coef[r] = splat(coefs[r * ld]);
  const vf a = splat(decay);
  const auto step = [&](vf h, const float *k) {
    vf change = coef[0] * load(k);
    SSMK_UNROLL
    for (int r = 1; r < kKeys; ++r) change = fused(coef[r], load(k + r * kLanes), change);
    return fused(a, h, change);
  };
  const auto add = [&](vf h, const float *k, vf *into) {
    SSMK_UNROLL
    for (int r = 0; r < R; ++r) into[r] = fused(h, load(k + (kKeys + r) * kLanes), into[r]);
  };
  vf *const second = sum + (kSums - 1) * R;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes, keys += 2 * kStep) {
    vf h0, h1;
    load_two(from + i, &h0, &h1);
    h0 = step(h0, keys);
    h1 = step(h1, keys + kStep);
    store_two(to + i, h0, h1);
    add(h0, keys, sum);
    add(h1, keys + kStep, second);
  }
  if constexpr (!std::is_same_v<T, bf16>) {
    for (; i < n; i += kLanes, keys += kStep) {
      const vf h = step(load(from + i), keys);
      store(to + i, h);
      if (i + kLanes <= n) {
        add(h, keys, sum);
        continue;
      }
      // Lanes past the end are dropped, not multiplied by a padded 0: 0 * inf would be NaN.
      const vi inside = bitcast<vi>(lane_numbers() < vi{} + int32_t(n - i));
      SSMK_UNROLL
      for (int r = 0; r < R; ++r)
        sum[r] = select(inside, fused(h, load(keys + (kKeys + r) * kLanes), sum[r]), sum[r]);
    }
  }
  SSMK_UNROLL
  for (int r = 0; r < R; ++r)
    store(sums + r * kLanes * kLanes, kSums == 2 ? sum[r] + second[r] : sum[r]);
}

}  // namespace ssmk::cpu::SSMK_ISA
