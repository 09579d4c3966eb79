// SPDX-License-Identifier: MIT
// The parts of a Mamba-3 token that prefill and decode share: the rotation and the end of the
// output.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// n rounded up to whole vectors: arrays below are padded to that.
SSMK_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// What rounding took from the product of a and b.
SSMK_INLINE vf product_error(vf a, vf b, vf product) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused(a, b, -product);
#else
  // Veltkamp's halves of 12 bits: their products are exact.
  const vf ca = a * 4097.f, cb = b * 4097.f;
  const vf a1 = ca - (ca - a), a2 = a - a1, b1 = cb - (cb - b), b2 = b - b1;
  return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

// What rounding took from the sum of a and b.
SSMK_INLINE vf sum_error(vf a, vf b, vf sum) {
  const vf part = sum - a;
  return (a - (sum - part)) + (b - part);
}

// The nearest integer.  From 2^22 on, where adding the magic number no longer rounds to one, x
// itself.
SSMK_INLINE vf nearest(vf x) {
  const vf magic = splat(12582912.f), rounded = (x + magic) - magic;
  return select(bitcast<vi>((x < splat(0x1p22f)) & (x > splat(-0x1p22f))), rounded, x);
}

// theta <- (theta + pi tanh(angle) dt) mod 2 pi, in [0, 2 pi), and its sine and cosine.  theta is
// theta[i] + low[i]: the rounding errors of all steps are carried along, so a long sequence is as
// exact as a short one.  low is 0 at the start, and only where theta is near 0 may their sum be
// just outside.  All arrays are padded; what stands in the padding is not used.
inline void advance_angles(float *theta, float *low, const float *angle, float dt, int64_t nangles,
                           float *sine, float *cosine) {
  constexpr float kTwoPi = 0x1.921fb6p+2f, kTwoPiLow = -0x1.777a5cp-23f;  // their sum is 2 pi
  const vf two_pi = splat(kTwoPi), zero{};
  for (int64_t i = 0; i < nangles; i += kLanes) {
    // The step, less its whole turns (exactly): of a turn, then of an angle.
    const vf half_turns = tanh(load(angle + i)) * dt, pi = two_pi * 0.5f;
    const vf turn = half_turns - 2.f * nearest(half_turns * 0.5f);
    const vf step = turn * pi;
    vf rest = load(low + i) + (product_error(turn, pi, step) + turn * (kTwoPiLow / 2));

    const vf was = load(theta + i), sum = was + step;
    rest += sum_error(was, step, sum);
    vf whole = sum * (1 / kTwoPi);
    const vf near = nearest(whole);
    whole = near - (near > whole ? splat(1.f) : zero);  // floor
    const vf turns = whole * two_pi, folded = sum - turns;
    rest += sum_error(sum, -turns, folded) - product_error(whole, two_pi, turns);
    rest -= whole * kTwoPiLow;
    vf high = folded + rest;
    rest -= high - folded;

    // Rounding may leave it just outside.  A negative angle too small for a turn to be added to it
    // is 0.
    const vf up = high + two_pi;
    const vi below = bitcast<vi>(high < zero), above = bitcast<vi>(high >= two_pi),
             tiny = below & bitcast<vi>(up >= two_pi);
    const vf up_rest = rest + (sum_error(two_pi, high, up) + kTwoPiLow);
    rest = select(below, select(tiny, rest + high, up_rest), select(above, rest - kTwoPiLow, rest));
    high = select(below, select(tiny, zero, up), select(above, high - two_pi, high));
    store(theta + i, high);
    store(low + i, rest);
    vf s, c;
    sincos(high, &s, &c);
    // sin(a + b) = sin a + b cos a for a tiny b
    store(sine + i, s + rest * c);
    store(cosine + i, c - rest * s);
  }
}

// Rot(theta) on one row of dstate elements, in place.
inline void rotate(float *row, const float *sine, const float *cosine, int64_t nangles,
                   int64_t dstate, bool half) {
  const int64_t other = half ? dstate / 2 : 1, step = half ? 1 : 2;
  int64_t j = 0;
  for (; j + kLanes <= nangles; j += kLanes) {
    const vf s = load(sine + j), c = load(cosine + j);
    if (half) {
      const vf a = load(row + j), b = load(row + j + other);
      store(row + j, a * c - b * s);
      store(row + j + other, a * s + b * c);
    } else {
      alignas(64) float pair[2 * kLanes];
      deinterleave(pair, row + 2 * j);
      const vf a = load(pair), b = load(pair + kLanes);
      store(pair, a * c - b * s);
      store(pair + kLanes, a * s + b * c);
      interleave(row + 2 * j, pair);
    }
  }
  for (; j < nangles; ++j) {
    float &x = row[j * step], &y = row[j * step + other];
    const float a = x, b = y;
    x = a * cosine[j] - b * sine[j];
    y = a * sine[j] + b * cosine[j];
  }
}

// The end of a rank's output, in place: y <- y weight / sqrt(mean y^2 + eps), if there is a weight,
// then y <- y silu(zeta z), if there is z.  `gate` is zeta z.  Arrays are padded.
inline void normalise_and_gate(float *y, const float *weight, float eps, const float *gate,
                               int64_t headdim) {
  if (weight) {
    vf sum{};
    int64_t i = 0;
    for (; i + kLanes <= headdim; i += kLanes) sum = fused(load(y + i), load(y + i), sum);
    float squares = 0;
    for (int lane = 0; lane < kLanes; ++lane) squares += sum[lane];
    for (; i < headdim; ++i) squares += y[i] * y[i];
    const vf scale = splat(1 / std::sqrt(squares / float(headdim) + eps));
    for (i = 0; i < headdim; i += kLanes) store(y + i, load(y + i) * scale * load(weight + i));
  }
  if (gate)
    for (int64_t i = 0; i < headdim; i += kLanes) store(y + i, load(y + i) * silu(load(gate + i)));
}

}  // namespace ssmk::cpu::SSMK_ISA
