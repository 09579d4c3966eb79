// SPDX-License-Identifier: MIT
// The convolution of whole vectors: taps, sum, activation, store.
// Included by causal_conv1d.cc alone.
#pragma once

#include "core/problem.h"
#include "cpu/rows.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

constexpr int kWidth = int(kMaxConvWidth);
constexpr int kPair = 2 * kLanes;           // stored at once: a vector of 16-bit elements
constexpr int kGroup = 4;                   // over channels: tokens computed side by side
constexpr int kPairs = 4;                   // over time: pairs of vectors computed side by side
constexpr int64_t kChannels = 512;          // channels of a block, at most
constexpr int64_t kRows = 8;                // over channels: tokens staged at once
constexpr int64_t kChunk = 1024;            // over time: tokens staged at once
constexpr int64_t kAhead = 8192;            // over time: bytes between a read and its prefetch
constexpr int64_t kBlockTokens = 4096;      // tokens of a block, at most
constexpr int64_t kBlockElements = 65536;   // elements of a block, about: some 10 us of work
constexpr int64_t kFewTokens = 8;           // decode: tokens that fit in scratch, at most
constexpr int64_t kDecodeRows = 8;          // decode: batch rows that share staged weights
constexpr int64_t kStreamBytes = 16 << 20;  // an output larger than this leaves nothing in cache

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_pairs(int64_t n) { return ceil_div(n, kPair) * kPair; }

// How many elements of T, or of `size` bytes, p is past a vector's boundary.
int64_t past_boundary(const void *p, int64_t size) {
  return int64_t(reinterpret_cast<uintptr_t>(p) % kVectorBytes) / size;
}

// ---- The formula

// z / (1 + e^-z).
SSMK_INLINE vf activate(vf z) {
#if defined(__AVX512F__)
  // exp2() takes longer than memory does for 16-bit tensors.  Here 2^(b/32 + f) comes from a table
  // of 2^(j/32) in two registers and a polynomial of degree 2 (relative error 5e-8) for
  // |f| <= 1/64.  Entry j has j << 18 taken off its bits, so that adding b << 18 puts the integer
  // part of b / 32 into the exponent.
  alignas(64) static constexpr uint32_t kRoots[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
      0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
      0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
      0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  const vf magic = splat(12582912.f);  // adding it rounds to an integer, left in the low bits
  const vf low = splat(-88.73f);       // where b = 128 * 32 gives the bits of infinity
  const vf x = (vf)_mm512_min_ps(_mm512_max_ps((__m512)z, (__m512)low), (__m512)splat(80.f));
  const vf b = fused(x, splat(-32 * kLog2e), magic);
  const vf f = fused(x, splat(-32 * kLog2e), magic - b);
  const vf root =
      (vf)_mm512_permutex2var_ps(_mm512_load_ps(kRoots), (__m512i)b, _mm512_load_ps(kRoots + 16));
  const vf power = bitcast<vf>(bitcast<vu>(root) + (bitcast<vu>(b) << 18));
  const vf p = fused(fused(f, splat(0x1.ebfbdep-13f), splat(0x1.62e584p-6f)), f, splat(1.f));
  return z / fused(p, power, splat(1.f));
#else
  // One product will do for the exponent: it puts e^-z off by |z| ulp, 1 + e^-z by less than one.
  return z / (exp2(z * -kLog2e) + 1.f);
#endif
}

// How a kernel stores, and what will be read after what it reads.  Arithmetic takes about as long
// as memory, so prefetches keep the latter busy meanwhile.
struct Way {
  bool silu, streamed;
  const char *next;           // for the first vector of the call,
  int64_t step = 0, row = 0;  // so many bytes further for each vector, and for each row of channels
};

template <class T>
SSMK_INLINE void put(T *dst, vf whole, bool streamed) {
  if (streamed) {
    stream(reinterpret_cast<float *>(dst), whole);
  } else {
    std::memcpy(dst, &whole, sizeof whole);
  }
}

// kPair elements of T.
template <class T>
SSMK_INLINE void put_pair(T *dst, vf a, vf b, bool streamed) {
  if constexpr (sizeof(T) == 4) {
    put(dst, a, streamed);
    put(dst + kLanes, b, streamed);
  } else {
    put(dst, paired<T>(a, b, std::make_integer_sequence<int, kPair>{}), streamed);
  }
}

// U pairs of vectors of tokens; src[0] is the oldest tap of the first.
template <int W, int U, class T>
SSMK_INLINE void convolve_pairs(T *dst, const float *src, const vf *tap, vf bias, bool silu,
                                bool streamed) {
  vf sum[2 * U];
  SSMK_UNROLL for (int u = 0; u < 2 * U; ++u) sum[u] = bias;
  SSMK_UNROLL for (int w = 0; w < W; ++w) {
    SSMK_UNROLL for (int u = 0; u < 2 * U; ++u) sum[u] =
        fused(tap[w], load(src + u * kLanes + w), sum[u]);
  }
  if (silu) {
    SSMK_UNROLL for (int u = 0; u < 2 * U; ++u) sum[u] = activate(sum[u]);
  }
  SSMK_UNROLL for (int u = 0; u < U; ++u)
      put_pair(dst + u * kPair, sum[2 * u], sum[2 * u + 1], streamed);
}

// The same without any shuffle: even and odd tokens in vectors of their own, and so the inputs: at
// an odd lag an even token sees odd ones.  Reads from src[-1] on if W is even.
template <int W, int U>
SSMK_INLINE void convolve_pairs(bf16 *dst, const bf16 *src, const vf *tap, vf bias, bool silu,
                                bool streamed) {
  vf even[U], odd[U];
  SSMK_UNROLL for (int u = 0; u < U; ++u) {
    vf x[W / 2 + 1][2];  // [m]: 2 m tokens before the even and the odd ones
    SSMK_UNROLL for (int m = 0; m <= W / 2; ++m)
        load_pairs(src + W - 1 + u * kPair - 2 * m, &x[m][0], &x[m][1]);
    even[u] = odd[u] = bias;
    SSMK_UNROLL for (int w = 0; w < W; ++w) {
      const int lag = W - 1 - w;
      even[u] = fused(tap[w], x[(lag + 1) / 2][lag % 2], even[u]);
      odd[u] = fused(tap[w], x[lag / 2][(lag + 1) % 2], odd[u]);
    }
  }
  if (silu) {
    SSMK_UNROLL for (int u = 0; u < U; ++u) even[u] = activate(even[u]);
    SSMK_UNROLL for (int u = 0; u < U; ++u) odd[u] = activate(odd[u]);
  }
  SSMK_UNROLL for (int u = 0; u < U; ++u) {
    bf16 whole[kPair];
    store_pairs(whole, even[u], odd[u]);
    put(dst + u * kPair, load_bits<bf16, vf>(whole), streamed);
  }
}

// n tokens of one channel, n a multiple of kPair.
template <int W, class T, class X>
void convolve_time(T *dst, const X *src, const float *weight, float bias, int64_t n, Way way) {
  vf tap[W];
  SSMK_UNROLL for (int w = 0; w < W; ++w) tap[w] = splat(weight[w]);
  int64_t i = 0;
  for (; i + kPairs * kPair <= n; i += kPairs * kPair) {
    SSMK_UNROLL for (int u = 0; u < 2 * kPairs; ++u) __builtin_prefetch(way.next + u * way.step);
    way.next += 2 * kPairs * way.step;
    convolve_pairs<W, kPairs>(dst + i, src + i, tap, splat(bias), way.silu, way.streamed);
  }
  for (; i < n; i += kPair)
    convolve_pairs<W, 1>(dst + i, src + i, tap, splat(bias), way.silu, way.streamed);
}

// G tokens of n channels, n a multiple of kPair; rows are dst_row and src_row elements apart, and
// src is the oldest tap of the first token.
template <int W, int G, class T>
SSMK_INLINE void convolve_rows(T *dst, int64_t dst_row, const T *src, int64_t src_row,
                               const float *weight, const float *bias, int64_t n, Way way) {
  const T *rows[W - 1 + G];
  SSMK_UNROLL for (int k = 0; k < W - 1 + G; ++k) rows[k] = src + k * src_row;
  for (int64_t i = 0; i < n; i += kPair) {
    vf sum[2][G];
    SSMK_UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t c = i + h * kLanes;
      vf x[W - 1 + G];
      SSMK_UNROLL for (int g = 0; g < G; ++g) __builtin_prefetch(way.next + g * way.row);
      way.next += way.step;
      SSMK_UNROLL for (int k = 0; k < W - 1 + G; ++k) x[k] = load(rows[k] + c);
      SSMK_UNROLL for (int g = 0; g < G; ++g) sum[h][g] = load(bias + c);
      SSMK_UNROLL for (int w = 0; w < W; ++w) {
        const vf tap = load(weight + w * kChannels + c);
        SSMK_UNROLL for (int g = 0; g < G; ++g) sum[h][g] = fused(tap, x[w + g], sum[h][g]);
      }
    }
    if (way.silu) {
      SSMK_UNROLL for (int g = 0; g < 2 * G; ++g) sum[g / G][g % G] = activate(sum[g / G][g % G]);
    }
    SSMK_UNROLL for (int g = 0; g < G; ++g)
        put_pair(dst + g * dst_row + i, sum[0][g], sum[1][g], way.streamed);
  }
}

template <int W, class T>
void convolve_channels(T *dst, int64_t dst_row, const T *src, int64_t src_row, const float *weight,
                       const float *bias, int64_t channels, int64_t tokens, Way way) {
  int64_t t = 0;
  for (; t + kGroup <= tokens; t += kGroup, way.next += kGroup * way.row)
    convolve_rows<W, kGroup>(dst + t * dst_row, dst_row, src + t * src_row, src_row, weight, bias,
                             channels, way);
  for (; t < tokens; ++t, way.next += way.row)
    convolve_rows<W, 1>(dst + t * dst_row, dst_row, src + t * src_row, src_row, weight, bias,
                        channels, way);
}

// f(width as a constant).
template <class F>
SSMK_INLINE void with_width(int64_t width, F &&f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace
}  // namespace ssmk::cpu::SSMK_ISA
