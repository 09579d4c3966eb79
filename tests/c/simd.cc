// SPDX-License-Identifier: MIT
// The vector functions of one instruction-set level (src/cpu/simd.h, rows.h, mamba3.h) against the
// C library in double, and the 16-bit conversions against their definition, every value.  Built
// once per level by tests/test_simd.py.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cpu/mamba3.h"
#include "cpu/rows.h"

using namespace ssmk::cpu::SSMK_ISA;

namespace {

long failures = 0;

void check(bool good, const char *what, double at) {
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s at %.9g\n", what, at);
}

double ulps(double got, double want) {
  int exponent;
  std::frexp(std::max(std::fabs(want), 0x1p-126), &exponent);
  return std::fabs(got - want) / std::ldexp(1.0, exponent - 24);
}

template <class F, class G>
void within(double bound, const char *what, F vector, G exact, double lo, double hi) {
  double worst = 0, at = 0;
  for (double x = lo; x < hi; x += (hi - lo) / 500000) {
    const float f = static_cast<float>(x);
    const double error = ulps(vector(splat(f))[kLanes - 1], exact(double(f)));
    if (!(error <= worst)) worst = error, at = f;
  }
  std::printf("%-9s at most %.2f ulp\n", what, worst);
  check(worst <= bound, what, at);
}

void elementary() {
  const auto silu_exact = [](double x) { return x / (1 + std::exp(-x)); };
  const auto softplus_exact = [](double x) { return std::log1p(std::exp(x)); };
  within(2, "exp2", [](vf x) { return exp2(x); }, [](double x) { return std::exp2(x); }, -125, 127);
  within(2, "exp", [](vf x) { return exp(x); }, [](double x) { return std::exp(x); }, -87, 88);
  within(5, "softplus", [](vf x) { return softplus(x); }, softplus_exact, -80, 40);
  within(4, "silu", [](vf x) { return silu(x); }, silu_exact, -80, 40);
  check(exp2(splat(0.f))[0] == 1 && exp(splat(0.f))[0] == 1, "exp(0)", 0);
  check(std::isinf(exp(splat(INFINITY))[0]) && exp(splat(-INFINITY))[0] == 0, "exp(inf)", INFINITY);
  check(std::isnan(exp(splat(NAN))[0]) && std::isnan(softplus(splat(NAN))[0]), "NaN", NAN);

  for (double x = -3000; x < 2e6; x += std::max(0.003, std::fabs(x) * 1e-4)) {
    vf s, c;
    const float f = static_cast<float>(x);
    sincos(splat(f), &s, &c);
    check(std::fabs(s[0] - std::sin(double(f))) < 2e-7, "sin", f);
    check(std::fabs(c[0] - std::cos(double(f))) < 2e-7, "cos", f);
  }
}

double half_value(unsigned h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double m = exponent == 31 ? (mantissa ? NAN : INFINITY)
                   : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                  : std::ldexp(mantissa, -24);
  return h >> 15 ? -m : m;
}

// Every half, and around every midpoint between two: to nearest, ties to even.
void halves() {
  for (unsigned h = 0; h < 65536; ++h) {
    const float v = to_float(f16{uint16_t(h)});
    const double want = half_value(h);
    check(std::isnan(want) ? std::isnan(v) : v == want && std::signbit(v) == std::signbit(want),
          "f16 load", h);
    const float back = to_float(from_float<f16>(v));
    check(std::isnan(want) ? std::isnan(back) : back == v, "f16 round trip", h);
  }
  for (unsigned h = 0; h < 0x7bff; ++h) {
    const double a = half_value(h), b = half_value(h + 1);
    const float middle = static_cast<float>((a + b) / 2);
    check(from_float<f16>(middle).bits == h + (h & 1), "f16 tie", h);
    check(from_float<f16>(std::nextafterf(middle, INFINITY)).bits == h + 1, "f16 up", h);
    check(from_float<f16>(-std::nextafterf(middle, 0)).bits == (h | 0x8000), "f16 down", h);
  }
  check(from_float<f16>(65519.f).bits == 0x7bff && from_float<f16>(65520.f).bits == 0x7c00,
        "f16 overflow", 65520);
}

void bfloats() {
  for (uint32_t h = 0; h < 65536; ++h)
    for (int step : {-1, 0, 1}) {
      const float f = bitcast<float>((h << 16 | 0x8000) + step);
      const uint16_t want = step < 0 ? h : step > 0 ? h + 1 : h + (h & 1);
      const bf16 one = from_float<bf16>(f);
      bf16 pairs[2 * kLanes];
      store_pairs(pairs, splat(f), splat(-f));
      if (std::isnan(f)) {
        check(std::isnan(to_float(one)) && std::isnan(to_float(pairs[0])), "bf16 NaN", h);
      } else {
        check(one.bits == want && pairs[0].bits == want && pairs[1].bits == (want ^ 0x8000),
              "bf16 rounding", f);
      }
      vf even, odd;
      load_pairs(pairs, &even, &odd);
      check(std::isnan(f) || (even[0] == to_float(pairs[0]) && odd[0] == to_float(pairs[1])),
            "bf16 pairs", f);
    }
}

void shuffles() {
  float square[kLanes * kLanes], whole[2 * kLanes], split[2 * kLanes];
  for (int i = 0; i < kLanes * kLanes; ++i) square[i] = float(i);
  vf r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = load(square + i * kLanes);
  transpose(r);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) check(r[i][j] == j * kLanes + i, "transpose", i * kLanes + j);
  const vf sums = sum_each(r);
  for (int i = 0; i < kLanes; ++i)
    check(sums[i] == kLanes * (kLanes * (kLanes - 1) / 2 + i), "sum_each", i);
  deinterleave(split, square);
  interleave(whole, split);
  for (int i = 0; i < 2 * kLanes; ++i) {
    check(split[i] == (i < kLanes ? 2 * i : 2 * (i - kLanes) + 1), "deinterleave", i);
    check(whole[i] == i, "interleave", i);
  }
}

// The rotation and the gate of Mamba-3 (cpu/mamba3.h).

constexpr long double kTurn = 6.283185307179586476925286766559L;

double around(long double a) {  // the distance to a whole number of turns
  return std::fabs(double(std::remainder(a, kTurn)));
}

// Many steps, errors carried along: the angles are as exact as after one; each angle is in range.
void long_rotation() {
  constexpr int n = 2 * kLanes;
  alignas(64) float theta[n], low[n] = {}, angle[n], sine[n], cosine[n];
  long double exact[n];
  for (int i = 0; i < n; ++i) exact[i] = theta[i] = 0.19f * float(i);
  unsigned seed = 1;
  const auto uniform = [&] {
    return float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-24f;
  };
  double worst = 0, worst_sine = 0;
  for (int t = 0; t < 100000; ++t) {
    for (float &a : angle) a = 6 * uniform() - 3;
    // Steps of all sizes, many turns and less than an ulp among them.
    const float dt = std::exp2(20 * uniform() - 14);
    advance_angles(theta, low, angle, dt, n, sine, cosine);
    for (int i = 0; i < n; ++i) {
      // From the tanh that the kernel has: its own accuracy is tested above.
      const float half_turns = tanh(splat(angle[i]))[0] * dt;
      exact[i] = std::remainder(exact[i] + kTurn / 2 * half_turns, kTurn);
      check(theta[i] >= 0 && double(theta[i]) < double(kTurn), "angle out of range", theta[i]);
      const double error = around((long double)theta[i] + low[i] - exact[i]);
      const double off = std::max(std::fabs(double(sine[i] - std::sin(exact[i]))),
                                  std::fabs(double(cosine[i] - std::cos(exact[i]))));
      worst = std::max(worst, error);
      worst_sine = std::max(worst_sine, off);
    }
  }
  std::printf("angles    off by %.3g after 1e5 steps, their sines by %.3g\n", worst, worst_sine);
  check(worst < 2e-8, "long rotation", worst);
  check(worst_sine < 2e-7, "sine of a long rotation", worst_sine);
}

// One step from anywhere, also from angles that others have not wrapped.
void one_rotation() {
  const float starts[] = {0,     1e-30f, -1e-30f, 1e-10f,         -1e-10f,
                          1e-7f, -1e-7f, 3.14f,   0x1.921fb4p+2f, -0.1f,
                          7,     1000,   -1000,   -3.5f,          1e-4f};
  const float steps[] = {0,      1e-12f, -1e-12f, 1e-8f, -1e-8f, 1e-4f, -1e-4f, 0.3f,    -0.3f,
                         0.999f, 2,      -2,      7.5f,  -7.5f,  300,   -300,   40000.f, 1e9f};
  alignas(64) float theta[kLanes], low[kLanes], angle[kLanes], sine[kLanes], cosine[kLanes];
  for (float start : starts)
    for (float step : steps) {
      for (int i = 0; i < kLanes; ++i) theta[i] = start, low[i] = 0, angle[i] = 30;  // tanh is 1
      advance_angles(theta, low, angle, step, 1, sine, cosine);
      check(theta[0] >= 0 && double(theta[0]) < double(kTurn), "angle out of range", theta[0]);
      const long double exact = (long double)start + kTurn / 2 * step;
      const double bound = 1e-8 + 1e-7 * std::fabs(double(start));
      check(around(theta[0] + (long double)low[0] - exact) < bound, "one rotation", start + step);
      check(around(theta[0] - exact) < bound + 2.5e-7, "one rotation, rounded", start + step);
    }
  for (int i = 0; i < kLanes; ++i) theta[i] = 1, low[i] = 0, angle[i] = 1;
  advance_angles(theta, low, angle, NAN, 1, sine, cosine);
  check(std::isnan(theta[0]) && std::isnan(sine[0]), "NaN in a rotation", NAN);
}

void rotated_rows() {
  constexpr int dstate = 4 * kLanes + 6;
  for (int half = 0; half < 2; ++half)
    for (int nangles = 0; nangles <= dstate / 2; ++nangles) {
      alignas(64) float row[5 * kLanes + 8], sine[3 * kLanes + 8], cosine[3 * kLanes + 8];
      double want[dstate];
      for (int i = 0; i < dstate; ++i) want[i] = row[i] = float(i) - 7.25f;
      for (int j = 0; j < nangles; ++j) {
        sine[j] = float(std::sin(0.7 * j));
        cosine[j] = float(std::cos(0.7 * j));
        double &a = want[half ? j : 2 * j], &b = want[half ? j + dstate / 2 : 2 * j + 1];
        const double was = a;
        a = was * cosine[j] - b * sine[j];
        b = was * sine[j] + b * cosine[j];
      }
      rotate(row, sine, cosine, nangles, dstate, half);
      for (int i = 0; i < dstate; ++i) check(std::fabs(row[i] - want[i]) < 1e-5, "rotate", nangles);
    }
}

void gates() {
  for (int n = 1; n <= 3 * kLanes + 1; ++n) {
    alignas(64) float y[4 * kLanes], weight[4 * kLanes], gate[4 * kLanes], out[4 * kLanes];
    double squares = 0;
    for (int i = 0; i < 4 * kLanes; ++i) {  // noise in the padding must not count
      y[i] = i < n ? float(std::sin(3.0 * i + 1)) : 1e30f;
      weight[i] = 1 + 0.1f * float(i % 5);
      gate[i] = 0.3f * float(i % 7) - 1;
      squares += i < n ? double(y[i]) * y[i] : 0;
    }
    for (int parts = 0; parts < 4; ++parts) {
      std::memcpy(out, y, sizeof out);
      normalise_and_gate(out, parts & 1 ? weight : nullptr, 0.25f, parts & 2 ? gate : nullptr, n);
      for (int i = 0; i < n; ++i) {
        double want = y[i];
        if (parts & 1) want *= weight[i] / std::sqrt(squares / n + 0.25);
        if (parts & 2) want *= gate[i] / (1 + std::exp(-double(gate[i])));
        check(std::fabs(out[i] - want) < 1e-6, "normalise_and_gate", n);
      }
    }
  }
}

}  // namespace

int main() {
  elementary();
  halves();
  bfloats();
  shuffles();
  long_rotation();
  one_rotation();
  rotated_rows();
  gates();
  std::printf("%d lanes, %ld failures\n", kLanes, failures);
  return failures != 0;
}
