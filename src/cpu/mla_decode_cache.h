// SPDX-License-Identifier: MIT
// Tokens of a row's cache as a tile of float32, from any dtype, from 4-bit codes, dense or in
// pages.
#pragma once

#include "cpu/mla_decode_plan.h"
#include "cpu/rows.h"

namespace ssmk::cpu::SSMK_ISA {

// Channels of a tile; what is wider comes in several.  A multiple of every group.
constexpr int64_t kMlaChannels = 1024;

// Where a position of a row lies: the first two indices of the cache tensors.
struct CachePlace {
  int64_t entry, position;
};

SSMK_INLINE CachePlace cache_place(const MlaDecodeProblem &p, int64_t b, int64_t i) {
  if (p.page_size == 0) return {b, i};
  return {read_index(p.page_table, b, i / p.page_size), i & (p.page_size - 1)};
}

// kGroup 4-bit codes -> kGroup floats, code * scale + bias.
template <int kGroup>
SSMK_INLINE void decode_group(float *dst, const uint32_t *words, float scale, float bias) {
#if defined(__AVX512F__)
  // A code is a choice among 16 values: a shuffle, which looks at the lowest 4 bits only.
  const vf values = fused(splat(scale), __builtin_convertvector(lane_numbers(), vf), splat(bias));
  const vu shifts = bitcast<vu>(lane_numbers() & 7) * 4u;
  SSMK_UNROLL
  for (int k = 0; k < kGroup / 16; ++k) {
    // One word for each half of the lanes.  Both come by loads: the shuffle's unit is busy enough.
    const __m512i first = _mm512_set1_epi32(int(words[2 * k]));
    const __m512i pair =
        _mm512_mask_broadcastd_epi32(first, 0xff00, _mm_cvtsi32_si128(int(words[2 * k + 1])));
    const __m512i codes = _mm512_srlv_epi32(pair, (__m512i)shifts);
    store(dst + 16 * k, (vf)_mm512_permutexvar_ps(codes, (__m512)values));
  }
#elif defined(__AVX2__)
  const vf s = splat(scale), b = splat(bias);
  const vu shifts = bitcast<vu>(lane_numbers()) * 4u;
  SSMK_UNROLL
  for (int k = 0; k < kGroup / 8; ++k) {
    const vu codes = ((vu{} + words[k]) >> shifts) & 15u;
    store(dst + 8 * k, fused(s, __builtin_convertvector(bitcast<vi>(codes), vf), b));
  }
#else
  // Not every such level shifts lanes by different counts; the powers of two divide exactly.
  const vf s = splat(scale), b = splat(bias);
  const vu masks = {15u, 15u << 4, 15u << 8, 15u << 12};
  const vf inverse = {1.f, 0x1p-4f, 0x1p-8f, 0x1p-12f};
  for (int k = 0; k < kGroup / 4; ++k) {
    const vu codes = (vu{} + (words[k / 2] >> (k % 2 * 16))) & masks;
    const vf values = __builtin_convertvector(bitcast<vi>(codes), vf) * inverse;
    store(dst + 4 * k, fused(s, values, b));
  }
#endif
}

struct CacheScratch {
  alignas(64) float scales[kMlaTile * (kMlaChannels / 32)], biases[kMlaTile * (kMlaChannels / 32)];
  uint32_t words[kMlaChannels / 8];
};

struct Cache {
  const MlaDecodeProblem &p;
  CacheScratch &s;
  int64_t b;

  // Channels c0 .. c0 + n of the row's tokens i .. i + count, the rope behind the latent, `pitch`
  // apart, and zeros up to a whole vector.
  void read(float *tile, int64_t pitch, int64_t i, int64_t count, int64_t c0, int64_t n) const {
    const int64_t latent = c0 < p.latent ? (p.latent - c0 < n ? p.latent - c0 : n) : 0;
    const int64_t rope = n - latent, rope0 = c0 + latent - p.latent;
    for (int64_t done = 0; done < count;) {
      const CachePlace at = cache_place(p, b, i + done);
      int64_t run = count - done;
      if (p.page_size && p.page_size - at.position < run) run = p.page_size - at.position;
      float *rows = tile + done * pitch;
      if (latent > 0) {
        if (p.group) {
          read_codes(rows, pitch, at, run, c0, latent);
        } else {
          for (int64_t t = 0; t < run; ++t)
            read_row(rows + t * pitch, p.values.at(at.entry, at.position + t, c0), p.values.dtype,
                     p.values.stride[2], latent);
        }
      }
      for (int64_t t = 0; t < run; ++t) {
        if (rope > 0)
          read_row(rows + t * pitch + latent, p.k_rope.at(at.entry, at.position + t, rope0),
                   p.k_rope.dtype, p.k_rope.stride[2], rope);
        for (int64_t c = n; c % kLanes; ++c) rows[t * pitch + c] = 0;
      }
      done += run;
    }
  }

  // Asks for the tokens i .. i + count, which are read soon.
  SSMK_INLINE void prefetch(int64_t i, int64_t count) const {
    for (int64_t t = i; t < i + count; ++t) {
      const CachePlace at = cache_place(p, b, t);
      if (p.group) {
        prefetch_row(p.codes, at, p.latent / 8);
        prefetch_row(p.scales, at, 1);
        prefetch_row(p.biases, at, 1);
      } else {
        prefetch_row(p.values, at, p.latent);
      }
      if (p.rope) prefetch_row(p.k_rope, at, p.rope);
    }
  }

 private:
  // Lines that are not packed are left to the processor.
  SSMK_INLINE static void prefetch_row(const View<3> &v, CachePlace at, int64_t n) {
    if (v.stride[2] == 1) fetch(v.at(at.entry, at.position), n * size_of(v.dtype));
  }

  // Scales or biases of `run` tokens -> groups of them, packed.
  static void read_groups(float *dst, const View<3> &v, CachePlace at, int64_t run, int64_t first,
                          int64_t groups) {
    const char *src = v.at(at.entry, at.position, first);
    if (v.stride[2] == 1 && v.stride[1] == groups)
      return read_row(dst, src, v.dtype, 1, run * groups);
    for (int64_t t = 0; t < run; ++t)
      read_row(dst + t * groups, v.at(at.entry, at.position + t, first), v.dtype, v.stride[2],
               groups);
  }

  void read_codes(float *rows, int64_t pitch, CachePlace at, int64_t run, int64_t c0,
                  int64_t n) const {
    switch (p.group) {
      case 32: return decode<32>(rows, pitch, at, run, c0, n);
      case 64: return decode<64>(rows, pitch, at, run, c0, n);
      default: return decode<128>(rows, pitch, at, run, c0, n);
    }
  }

  template <int kGroup>
  void decode(float *rows, int64_t pitch, CachePlace at, int64_t run, int64_t c0, int64_t n) const {
    const int64_t groups = n / kGroup;
    read_groups(s.scales, p.scales, at, run, c0 / kGroup, groups);
    read_groups(s.biases, p.biases, at, run, c0 / kGroup, groups);
    for (int64_t t = 0; t < run; ++t) {
      const char *codes = p.codes.at(at.entry, at.position + t, c0 / 8);
      const uint32_t *words = reinterpret_cast<const uint32_t *>(codes);
      if (p.codes.stride[2] != 1) {
        for (int64_t k = 0; k < n / 8; ++k)
          std::memcpy(&s.words[k], codes + k * p.codes.stride[2] * 4, 4);
        words = s.words;
      }
      const float *scales = s.scales + t * groups, *biases = s.biases + t * groups;
      for (int64_t g = 0; g < groups; ++g)
        decode_group<kGroup>(rows + t * pitch + g * kGroup, words + g * (kGroup / 8), scales[g],
                             biases[g]);
    }
  }
};

}  // namespace ssmk::cpu::SSMK_ISA
