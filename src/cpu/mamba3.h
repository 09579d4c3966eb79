// SPDX-License-Identifier: MIT
// The parts of a Mamba-3 token that prefill and decode share: the rotation and the end of the
// output.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// Arrays below are padded to whole vectors.

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

// The nearest integer; from 2^23 on every float is one.
SSMK_INLINE vf nearest(vf x) {
  const vf magic = bitcast<vf>((bitcast<vu>(x) & 0x80000000u) | bitcast<vu>(splat(0x1p23f)));
  const vf rounded = (x + magic) - magic;
  return select(bitcast<vi>((x < splat(0x1p23f)) & (x > splat(-0x1p23f))), rounded, x);
}

constexpr float kTwoPi = 0x1.921fb6p+2f, kTwoPiLow = -0x1.777a5cp-23f;  // their sum is 2 pi

// theta is high + low: the rounding errors of all steps are carried along, so a long sequence is as
// exact as a short one.  low is 0 at the start.
struct Angle {
  vf high, low;
};

// theta + pi half_turns, less a whole turn where that leaves [0, 2 pi]: the short chain of
// operations from token to token.
SSMK_INLINE Angle turned(Angle a, vf half_turns) {
  const vf two_pi = splat(kTwoPi), pi = two_pi * 0.5f;
  // The step, less its whole turns (exactly): of a turn, then of an angle.
  const vf turn = half_turns - 2.f * nearest(half_turns * 0.5f), step = turn * pi;
  const vf step_low = product_error(turn, pi, step) + turn * (kTwoPiLow / 2);
  const vf sum = a.high + step;
  const vf whole = sum >= two_pi ? splat(-1.f) : sum < vf{} ? splat(1.f) : vf{};
  const vf shift = whole * two_pi, high = sum + shift;
  return {high, (a.low + step_low) + (sum_error(a.high, step, sum) + sum_error(sum, shift, high) +
                                      whole * kTwoPiLow)};
}

// In [0, 2 pi); only where theta is near 0 may high + low be just outside.
SSMK_INLINE Angle wrapped(Angle a) {
  const vf two_pi = splat(kTwoPi), zero{};
  vf whole = a.high * (1 / kTwoPi);
  const vf near = nearest(whole);
  whole = near - (near > whole ? splat(1.f) : zero);  // floor
  const vf turns = whole * two_pi, folded = a.high - turns;
  vf rest = a.low + (sum_error(a.high, -turns, folded) - product_error(whole, two_pi, turns));
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
  return {select(below, select(tiny, zero, up), select(above, high - two_pi, high)), rest};
}

SSMK_INLINE void sincos(Angle a, vf *sine, vf *cosine) {
  vf s, c;
  sincos(a.high, &s, &c);
  // sin(a + b) = sin a + b cos a for a tiny b
  *sine = s + a.low * c;
  *cosine = c - a.low * s;
}

// One token: theta <- (theta + pi tanh(angle) dt) mod 2 pi, in [0, 2 pi), and its sine and cosine.
// All arrays are padded; what stands in the padding is not used.
inline void advance_angles(float *theta, float *low, const float *angle, float dt, int64_t nangles,
                           float *sine, float *cosine) {
  for (int64_t i = 0; i < nangles; i += kLanes) {
    const Angle a = wrapped(turned({load(theta + i), load(low + i)}, tanh(load(angle + i)) * dt));
    store(theta + i, a.high);
    store(low + i, a.low);
    vf s, c;
    sincos(a, &s, &c);
    store(sine + i, s);
    store(cosine + i, c);
  }
}

// Lane L of v's half kHalf repeated: v[0] v[0] v[1] v[1] ..
template <int kHalf, int... L>
SSMK_INLINE vf twice(vf v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, (kHalf * kLanes / 2 + L / 2)...);
}

template <int... L>
SSMK_INLINE vf neighbours(vf v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, (L ^ 1)...);
}

// One vector of pairs (a, b) -> (a cos - b sin, a sin + b cos); cosine and sine come twice each.
SSMK_INLINE void rotate_pairs(float *row, vf cosine, vf sine) {
  const vu sign = bitcast<vu>((lane_numbers() & 1) - 1) & 0x80000000u;  // of the even lanes
  const vf signed_sine = bitcast<vf>(bitcast<vu>(sine) ^ sign), v = load(row);
  store(row, fused(v, cosine, neighbours(v, LaneSequence{}) * signed_sine));
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
      store(row + j, fused(a, c, -(b * s)));
      store(row + j + other, fused(a, s, b * c));
    } else {
      rotate_pairs(row + 2 * j, twice<0>(c, LaneSequence{}), twice<0>(s, LaneSequence{}));
      rotate_pairs(row + 2 * j + kLanes, twice<1>(c, LaneSequence{}), twice<1>(s, LaneSequence{}));
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
