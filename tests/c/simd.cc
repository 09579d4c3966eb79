// SPDX-License-Identifier: MIT
// The vector functions of one instruction-set level (src/cpu/simd.h, rows.h) against the C library
// in double, and the 16-bit conversions against their definition, every value.  Built once per
// level by tests/test_simd.py.
#include <algorithm>
#include <cmath>
#include <cstdio>

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

}  // namespace

int main() {
  elementary();
  halves();
  bfloats();
  shuffles();
  std::printf("%d lanes, %ld failures\n", kLanes, failures);
  return failures != 0;
}
