// SPDX-License-Identifier: MIT
// The parts of a Mamba-3 token that prefill and decode share: the rotation and the end of the
// output.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// n rounded up to whole vectors: arrays below are padded to that.
SSMK_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// theta <- (theta + pi tanh(angle) dt) mod 2 pi, and its sine and cosine.  theta is theta[i] +
// low[i]: the rounding errors of all steps are carried along, so a long sequence is as exact as a
// short one. low is 0 at the start.  All arrays are padded; what stands in the padding is not used.
inline void advance_angles(float *theta, float *low, const float *angle, float dt, int64_t nangles,
                           float *sine, float *cosine) {
  constexpr float kTwoPi = 0x1.921fb6p+2f, kTwoPiLow = -0x1.777a5cp-23f;  // their sum is 2 pi
  constexpr float kPi = kTwoPi / 2, kPiLow = kTwoPiLow / 2;
  for (int64_t i = 0; i < nangles; i += kLanes) {
    const vf turn = tanh(load(angle + i)) * dt;
    const vf step = turn * kPi, step_low = fused(turn, splat(kPi), -step) + turn * kPiLow;
    // sum + error = theta + step, exactly
    const vf was = load(theta + i), sum = was + step, part = sum - was;
    const vf error = (was - (sum - part)) + (step - part);
    vf whole = sum * (1 / kTwoPi);
    const vf magic = splat(12582912.f), near = (whole + magic) - magic;
    whole = near - (near > whole ? splat(1.f) : vf{});  // floor
    // Steps of more turns than the magic number can round are not reduced by it.
    vf high = fused(-whole, splat(kTwoPi), sum);
    vf rest = load(low + i) + error + step_low - whole * kTwoPiLow;
    const vf folded = high + rest;
    rest = rest - (folded - high);
    high = folded;
    // Rounding may leave it just outside of [0, 2 pi).
    const vf up = high < vf{} ? splat(1.f) : vf{}, down = high >= splat(kTwoPi) ? splat(1.f) : vf{};
    high = high + (up - down) * kTwoPi;
    rest = rest + (up - down) * kTwoPiLow;
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
