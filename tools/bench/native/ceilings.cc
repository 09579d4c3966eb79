// SPDX-License-Identifier: MIT
// The loops of ceilings.h, compiled once per instruction-set level with the vectors of the library
// itself.
#include "ceilings.h"

#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

constexpr int kUnroll = 4;

// Memory

template <class T>
void update(void *data, int64_t n, float a, float b) {
  T *p = static_cast<T *>(data);
  const vf va = splat(a), vb = splat(b);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    vf v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = load(p + i + k * kLanes);
    for (int k = 0; k < kUnroll; ++k) store(p + i + k * kLanes, v[k] * va + vb);
  }
  T tail[kUnroll * kLanes] = {};
  std::memcpy(tail, p + i, sizeof(T) * size_t(n - i));
  for (int k = 0; k < kUnroll; ++k) store(tail + k * kLanes, load(tail + k * kLanes) * va + vb);
  std::memcpy(p + i, tail, sizeof(T) * size_t(n - i));
}

void update_bits(void *data, int64_t n, uint32_t mask) {
  uint32_t *p = static_cast<uint32_t *>(data);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    vu v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = load_bits<uint32_t, vu>(p + i + k * kLanes);
    for (int k = 0; k < kUnroll; ++k) {
      v[k] ^= mask;
      std::memcpy(p + i + k * kLanes, &v[k], sizeof v[k]);
    }
  }
  for (; i < n; ++i) p[i] ^= mask;
}

float read(const void *data, int64_t bytes) {
  const float *p = static_cast<const float *>(data);
  const int64_t n = bytes / 4;
  vf sum[kUnroll] = {};
  for (int64_t i = 0; i + kUnroll * kLanes <= n; i += kUnroll * kLanes)
    for (int k = 0; k < kUnroll; ++k) sum[k] += load(p + i + k * kLanes);
  const vf total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return total[0];
}

template <bool kStreaming>
void copy(void *to, const void *from, int64_t bytes) {
  float *dst = static_cast<float *>(to);
  const float *src = static_cast<const float *>(from);
  const int64_t n = bytes / 4;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    vf v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = load(src + i + k * kLanes);
    for (int k = 0; k < kUnroll; ++k) {
      if constexpr (kStreaming) {
        stream(dst + i + k * kLanes, v[k]);
      } else {
        store(dst + i + k * kLanes, v[k]);
      }
    }
  }
  std::memcpy(dst + i, src + i, size_t(bytes - 4 * i));
  if constexpr (kStreaming) stream_fence();
}

// Arithmetic

// Enough chains to hide the latency of two units, few enough for the 16 registers of the lower
// levels.
constexpr int kChains = 12;

int64_t multiply_add(int64_t rounds, float *sink) {
  vf acc[kChains];
  const vf a = splat(0.999f), b = splat(0.001f);
#pragma GCC unroll 12
  for (int k = 0; k < kChains; ++k) acc[k] = splat(float(k));
  for (int64_t i = 0; i < rounds; ++i) {
    // Unrolled early: else GCC leaves the accumulators in memory.
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) acc[k] = fused(acc[k], a, b);
  }
  vf sum{};
#pragma GCC unroll 12
  for (int k = 0; k < kChains; ++k) sum += acc[k];
  *sink = sum[0];
  return rounds * kChains * kLanes;
}

// exp2 with the library's polynomial and what the level is best at around it, for arguments that
// need no clamping: the ceiling must not sink with a poor choice in the library.
SSMK_INLINE vf bare_exp2(vf x) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.f + 127.f);  // rounds; leaves the exponent's bits lowest
  const vf biased = x + magic, n = biased - magic;
#endif
  const vf f = x - n;
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

// Independent exponentials from L1 to L1: the processor overlaps as many as it has room for.
template <vf (*kFunction)(vf)>
int64_t exponential(int64_t rounds, float *sink) {
  constexpr int kBuffer = 1024;
  alignas(64) float x[kBuffer], y[kBuffer];
  for (int i = 0; i < kBuffer; ++i) x[i] = -float(i) / 128.f;  // decays: 2^-8 to 1
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kBuffer; i += kUnroll * kLanes)
      for (int k = 0; k < kUnroll; ++k) {
        const int at = i + k * kLanes;
        store(y + at, kFunction(load(x + at)));
      }
    asm volatile("" : : "r"(x), "r"(y) : "memory");
  }
  *sink = y[kBuffer / 2];
  return rounds * kBuffer;
}

}  // namespace

extern const bench::Loops loops;
const bench::Loops loops = {
    SSMK_ISA_NAME, update<float>, update<bf16>, update_bits,       read,
    copy<false>,   copy<true>,    multiply_add, exponential<exp2>, exponential<bare_exp2>};

}  // namespace ssmk::cpu::SSMK_ISA
