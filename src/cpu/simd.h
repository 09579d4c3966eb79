// SPDX-License-Identifier: MIT
// Vectors of float32 for one instruction-set level, and the functions that the kernels need of
// them.
//
// Every kernel source is compiled once per level with SSMK_ISA naming the level; all that it holds
// lives in namespace ssmk::cpu::SSMK_ISA, so the linker can never hand code of one level to
// another. Vectors are the compilers' own (GCC 12, clang): the code below is the portable floor as
// it stands, and intrinsics stand only where the language has no word for the instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SSMK_INLINE inline __attribute__((always_inline))

// Before a loop over an array that is meant to live in registers: it only does when the loop is
// gone.
#if defined(__clang__)
#define SSMK_UNROLL _Pragma("unroll")
#else
#define SSMK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ssmk::cpu::SSMK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using vf = float __attribute__((vector_size(4 * kLanes)));
using vi = int32_t __attribute__((vector_size(4 * kLanes)));
using vu = uint32_t __attribute__((vector_size(4 * kLanes)));
using vh = uint16_t __attribute__((vector_size(2 * kLanes)));
constexpr int kVectorBytes = 4 * kLanes;

// Storage types of the 16-bit floats.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class To, class From>
SSMK_INLINE To bitcast(From v) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

SSMK_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 is x for every x, x + 0 is not
SSMK_INLINE vf select(vi mask, vf yes, vf no) {
  return bitcast<vf>((bitcast<vi>(yes) & mask) | (bitcast<vi>(no) & ~mask));
}
SSMK_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
SSMK_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// a b + c with one rounding where the level has the instruction.  Plain a * b + c is contracted to
// it as well; this spelling is for the places where the single rounding is what matters.
SSMK_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// True if every lane of a comparison's result is.
SSMK_INLINE bool all(vi mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#else
  int32_t every = -1;
  for (int i = 0; i < kLanes; ++i) every &= mask[i];
  return every != 0;
#endif
}

SSMK_INLINE vi lane_numbers() {
  vi r{};
  for (int i = 0; i < kLanes; ++i) r[i] = i;
  return r;
}

// Loads and stores of kLanes elements at any alignment.

template <class T, class V>
SSMK_INLINE V load_bits(const T *p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

SSMK_INLINE vf load(const float *p) { return load_bits<float, vf>(p); }

// The compilers' own conversions between 16 and 32 bits go through half vectors.
SSMK_INLINE vu widen(const void *p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
#endif
}

SSMK_INLINE void narrow(void *p, vu v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtepi32_epi16((__m512i)v));
#else
  const vh h = __builtin_convertvector(v, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

SSMK_INLINE vf load(const bf16 *p) { return bitcast<vf>(widen(p) << 16); }

SSMK_INLINE vf load(const f16 *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  // Shift exponent and mantissa into place and rebias; a subnormal half then lacks its leading bit,
  // which a float subtraction of 2^-14 puts right; infinities and NaN get the top exponent.
  const vu h = widen(p);
  const vu sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const vu exponent = magnitude & 0x0f800000u;
  const vu normal = magnitude + ((127u - 15u) << 23);
  const vu special = magnitude + ((255u - 31u) << 23);
  const vf tiny = bitcast<vf>(magnitude + ((127u - 14u) << 23)) - splat(0x1p-14f);
  vf r = select(bitcast<vi>(exponent == 0u), tiny, bitcast<vf>(normal));
  r = select(bitcast<vi>(exponent == 0x0f800000u), bitcast<vf>(special), r);
  return bitcast<vf>(bitcast<vu>(r) | sign);
#endif
}

// Round to nearest even; NaN keeps its sign and stays NaN.
SSMK_INLINE vu bf16_bits(vf v) {
  const vu u = bitcast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  return v == v ? rounded : quiet;
}

SSMK_INLINE void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }

SSMK_INLINE void store(bf16 *p, vf v) { narrow(p, bf16_bits(v)); }

SSMK_INLINE void store(f16 *p, vf v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const uint16x4_t h = vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#else
  // Large: anything from 65520 becomes infinity by the carry of the rounding.  Small: adding 2^-1 *
  // 2^-13 * 2^... = 0.5 makes the float unit itself round the subnormal half into the low mantissa
  // bits.
  const vu u = bitcast<vu>(v);
  const vu sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const vu normal = (a - ((127u - 15u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const vu tiny = bitcast<vu>(bitcast<vf>(a) + splat(0.5f)) - bitcast<uint32_t>(0.5f);
  vu r = a < ((127u - 14u) << 23) ? tiny : normal;
  r = a >= ((127u + 16u) << 23) ? vu{} + 0x7c00u : r;
  r = a > 0x7f800000u ? vu{} + 0x7e00u : r;
  const vh h = __builtin_convertvector(r | sign, vh);
#endif
  std::memcpy(p, &h, sizeof h);
}

// Two vectors of bfloat16 at once, the even elements in one and the odd ones in the other: a shift
// and a mask instead of widening, and one store.  What is combined with them must be in that order
// too: deinterleave().
SSMK_INLINE void load_pairs(const bf16 *p, vf *even, vf *odd) {
  const vu u = load_bits<bf16, vu>(p);
  *even = bitcast<vf>(u << 16);
  *odd = bitcast<vf>(u & 0xffff0000u);
}

SSMK_INLINE vu rounded_up_half(vf v) {
  const vu u = bitcast<vu>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

SSMK_INLINE void store_pairs(bf16 *p, vf even, vf odd) {
#if defined(__AVX512F__)
  // One comparison finds a NaN on either side; rounding as integers is right for everything else.
  const bool nan = _mm512_cmp_ps_mask((__m512)even, (__m512)odd, _CMP_UNORD_Q) != 0;
#else
  const bool nan = false;
#endif
  vu e = rounded_up_half(even) >> 16, o = rounded_up_half(odd) & 0xffff0000u;
#if !defined(__AVX512F__)
  e = even == even ? e : (bitcast<vu>(even) >> 16) | 0x40u;
  o = odd == odd ? o : (bitcast<vu>(odd) & 0xffff0000u) | 0x400000u;
#endif
  if (__builtin_expect(nan, 0)) {
    e = bf16_bits(even);
    o = bf16_bits(odd) << 16;
  }
  const vu both = e | o;
  std::memcpy(p, &both, sizeof both);
}

// Brings the lines of some bytes into the second-level cache: rows at a large power of two from
// each other would drive each other out of the first.  GCC takes a function that only prefetches
// for one without effects and drops its calls; the empty asm is an effect.
SSMK_INLINE void fetch(const void *from, int64_t bytes) {
  const char *const p = static_cast<const char *>(from);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p + i, 0, 2);
    asm volatile("" ::"r"(p + i));
  }
  if (bytes > 0) __builtin_prefetch(p + bytes - 1, 0, 2);  // they may begin inside of a line
}

// A store that does not read the line first: for outputs larger than the caches.  p is
// kVectorBytes-aligned.
SSMK_INLINE void stream(float *p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

// Streamed stores become visible to other threads only after this.
SSMK_INLINE void stream_fence() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// n rounded up to whole vectors.
SSMK_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

using LaneSequence = std::make_integer_sequence<int, kLanes>;

// Lane shuffles: S is a power of two below kLanes, blocks are runs of S lanes.

template <int S, int... L>
SSMK_INLINE vf even_blocks(vf a, vf b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? kLanes + L - S : L)...);
}
template <int S, int... L>
SSMK_INLINE vf odd_blocks(vf a, vf b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? kLanes + L : L + S)...);
}
template <int kFirst, int... L>
SSMK_INLINE vf every_second(vf a, vf b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (2 * L + kFirst)...);
}

// 2 kLanes consecutive floats -> the even ones, then the odd ones; and back.
SSMK_INLINE void deinterleave(float *to, const float *from) {
  const vf a = load(from), b = load(from + kLanes);
  store(to, every_second<0>(a, b, LaneSequence{}));
  store(to + kLanes, every_second<1>(a, b, LaneSequence{}));
}

template <int kHalf, int... L>
SSMK_INLINE vf alternate(vf a, vf b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & 1) ? kLanes + kHalf + L / 2 : kHalf + L / 2)...);
}

SSMK_INLINE void interleave(float *to, const float *from) {
  const vf even = load(from), odd = load(from + kLanes);
  store(to, alternate<0>(even, odd, LaneSequence{}));
  store(to + kLanes, alternate<kLanes / 2>(even, odd, LaneSequence{}));
}

// r[i][j] <- r[j][i] for kLanes vectors.
template <int S = kLanes / 2>
SSMK_INLINE void transpose(vf *r) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & S)) {
      const vf a = r[i], b = r[i + S];
      r[i] = even_blocks<S>(a, b, LaneSequence{});
      r[i + S] = odd_blocks<S>(a, b, LaneSequence{});
    }
  if constexpr (S > 1) transpose<S / 2>(r);
}

// Lane i of the result is the sum over the lanes of r[i]; destroys r.
template <int S = kLanes / 2>
SSMK_INLINE vf sum_each(vf *r) {
  for (int i = 0; i < S; ++i)
    r[i] = even_blocks<S>(r[i], r[i + S], LaneSequence{}) +
           odd_blocks<S>(r[i], r[i + S], LaneSequence{});
  if constexpr (S > 1) return sum_each<S / 2>(r);
  return r[0];
}

// Elementary functions.

// 2^x.  x = n + f with n an integer and |f| <= 1/2; 2^f by a minimax polynomial of degree 6 that is
// exact at 0 (relative error 2e-9 before rounding), so decays near 1 keep their last bit.  Below
// 2^-127 the result is 0, above 2^127.5 infinity; NaN stays NaN.
template <bool kFinite = false>
SSMK_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  // max and min return their second operand where one is NaN.  With n infinite f would be NaN.
  x = (vf)_mm512_max_ps(_mm512_set1_ps(-150.f), (__m512)x);
  if constexpr (!kFinite) x = (vf)_mm512_min_ps(_mm512_set1_ps(150.f), (__m512)x);
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf f = x - n;
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits; the 127 is the
  // exponent's bias.
  const vf magic = splat(12582912.f + 127.f);
  x = x < splat(-127.f) ? splat(-127.f) : x;
  x = x > splat(128.f) ? splat(128.f) : x;
  const vf biased = x + magic;
  const vf f = x - (biased - magic);
#endif
  vf p = splat(0x1.41fbbcp-13f);
  p = p * f + 0x1.5f3e52p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * bitcast<vf>(bitcast<vu>(biased) << 23);
#endif
}

constexpr float kLog2e = 1.44269504088896340736f;

// e^x to 2 ulp (2^x of a rounded product x log2(e) alone would be |x| ulp off).
SSMK_INLINE vf exp(vf x) {
  const vf hi = x * kLog2e;
#if defined(__FMA__) || defined(__aarch64__)
  // The rounding errors of the product and of the constant, put back to first order.
  vf lo = fused(x, splat(kLog2e), -hi) + x * 1.925963033500e-8f;
  lo = lo == lo ? lo : vf{};  // infinite x
  return exp2(hi) * (lo * 0.693147180559945f + 1.f);
#else
  // x = n ln 2 + r with exact products n * 0x1.62ep-1.
  vf n = hi < splat(-130.f) ? splat(-130.f) : hi;
  n = n > splat(130.f) ? splat(130.f) : n;
  n = (n + 12582912.f) - 12582912.f;
  vf r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  r = r < splat(-60.f) ? splat(-60.f) : r;
  r = r > splat(60.f) ? splat(60.f) : r;
  return exp2(n) * exp2(r * kLog2e);
#endif
}

SSMK_INLINE vf silu(vf z) { return z / (exp(-z) + 1.f); }

// max(x, 0) + log1p(e^-|x|).  log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, by a minimax
// polynomial in s^2; small e keeps its relative accuracy, and above 20 the second term is below
// half an ulp of x.
SSMK_INLINE vf softplus(vf x) {
  const vf e = exp(x < vf{} ? x : -x);
  const vf s = e / (e + 2.f), t = s * s;
  vf p = splat(0x1.be4ee8p-3f);
  p = p * t + 0x1.5f3020p-3f;
  p = p * t + 0x1.c8bc16p-3f;
  p = p * t + 0x1.248a56p-2f;
  p = p * t + 0x1.9999bep-2f;
  p = p * t + 0x1.555556p-1f;
  p = p * t + 2.f;
  return (x > vf{} ? x : vf{}) + s * p;
}

// x P(x^2) near 0 (relative error 5e-9 before rounding), 1 - 2 / (e^2x + 1) beyond, where e^2x may
// be infinite.
SSMK_INLINE vf tanh(vf x) {
  const vf t = x * x;
  vf p = splat(-0x1.7f870ep-8f);
  p = p * t + 0x1.540706p-6f;
  p = p * t - 0x1.b87926p-5f;
  p = p * t + 0x1.110872p-3f;
  p = p * t - 0x1.555534p-2f;
  const vf near = x + x * (p * t), far = 1.f - 2.f / (exp(x + x) + 1.f);
  return select(bitcast<vi>((x <= splat(0.6f)) & (x >= splat(-0.6f))), near, far);
}

SSMK_INLINE vf sigmoid(vf x) { return 1.f / (exp(-x) + 1.f); }

// Sine and cosine.  x = n pi/2 + r in three steps, |r| <= pi/4; beyond the range in which those
// steps are exact the C library does the work lane by lane.
SSMK_INLINE void sincos(vf x, vf *sine, vf *cosine) {
#if defined(__FMA__) || defined(__aarch64__)
  constexpr float kExact = 65536.f;
#else
  constexpr float kExact = 400.f;  // the products below are exact for |n| <= 256
#endif
  const vf magic = splat(12582912.f);
  const vf biased = x * 0.636619772367581343f + magic;
  const vf n = biased - magic;
  vf r = x - n * 0x1.921ep+0f;
  r = r - n * 0x1.b544p-16f;
  r = r - n * 0x1.0b4612p-34f;
  const vf t = r * r;
  vf s = splat(0x1.6ca4e2p-19f);
  s = s * t - 0x1.a00ec4p-13f;
  s = s * t + 0x1.111108p-7f;
  s = s * t - 0x1.555556p-3f;
  s = s * t * r + r;
  vf c = splat(-0x1.2404a0p-22f);
  c = c * t + 0x1.a01066p-16f;
  c = c * t - 0x1.6c16b8p-10f;
  c = c * t + 0x1.555556p-5f;
  c = c * t * t + (t * -0.5f + 1.f);
  const vu quadrant = bitcast<vu>(biased);
  const vi swap = bitcast<vi>((quadrant & 1u) != 0u);
  const vf a = select(swap, c, s), b = select(swap, s, c);
  *sine = bitcast<vf>(bitcast<vu>(a) ^ ((quadrant & 2u) << 30));
  *cosine = bitcast<vf>(bitcast<vu>(b) ^ (((quadrant + 1u) & 2u) << 30));
  const vi exact = bitcast<vi>((x <= splat(kExact)) & (x >= splat(-kExact)));
  if (__builtin_expect(all(exact), 1)) return;
  for (int i = 0; i < kLanes; ++i)
    if (!exact[i]) {
      (*sine)[i] = std::sin(x[i]);
      (*cosine)[i] = std::cos(x[i]);
    }
}

}  // namespace ssmk::cpu::SSMK_ISA
