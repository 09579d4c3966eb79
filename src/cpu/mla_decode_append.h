// SPDX-License-Identifier: MIT
// Writing new tokens into the cache, quantised as MLX quantises on the CPU, bit for bit.
#pragma once

#include "cpu/mla_decode_cache.h"

namespace ssmk::cpu::SSMK_ISA {

struct Affine {
  float scale, bias;
};

// Scale and bias of a group.  One end of the range is met exactly: the one that is farther from 0,
// or 0.  No product is added to anything here, so no level can contract what another rounds twice.
inline Affine affine_of(const float *w, int64_t n) {
  vf low = load(w), high = low;
  vi nan{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = load(w + i);
    low = vmin(v, low);
    high = vmax(v, high);
    nan |= bitcast<vi>(v != v);
  }
  float least = low[0], most = high[0];
  for (int k = 0; k < kLanes; ++k) {
    if (nan[k]) return {__builtin_nanf(""), __builtin_nanf("")};
    if (low[k] < least) least = low[k];
    if (high[k] > most) most = high[k];
  }
  float scale = (most - least) / 15.f;
  if (!(scale > 1e-7f)) scale = 1e-7f;
  const bool from_below = __builtin_fabsf(least) > __builtin_fabsf(most);
  if (!from_below) scale = -scale;
  const float edge = from_below ? least : most;
  const float steps = __builtin_rintf(edge / scale);
  if (steps == 0) return {scale, 0.f};
  return {edge / steps, edge};
}

// round((w - bias) / scale) within 0 .. 15, 8 to a word; NaN gives 0.
inline void encode_group(uint32_t *words, const float *w, int64_t n, Affine a) {
  uint32_t codes[128];
  const vf scale = splat(a.scale), bias = splat(a.bias);
  for (int64_t i = 0; i < n; i += kLanes) {
    vf q = (load(w + i) - bias) / scale;
    q = q > vf{} ? q : vf{};
    q = q < splat(15.f) ? q : splat(15.f);
    // From 2^23 on a float's unit is 1: the sum is rounded to an integer, half to even.
    const vu bits = bitcast<vu>(q + splat(8388608.f)) & 15u;
    std::memcpy(codes + i, &bits, sizeof bits);
  }
  for (int64_t k = 0; k < n / 8; ++k) {
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) word |= codes[8 * k + j] << 4 * j;
    words[k] = word;
  }
}

// Token t of row b to the end of its cache.
inline void append_token(const MlaDecodeProblem &p, int64_t b, int64_t t) {
  const CachePlace at = cache_place(p, b, read_index(p.seqlens, b) - p.ntokens + t);
  alignas(64) float w[kMlaChannels];
  const auto copy = [&](const View<3> &to, const View<3> &from, int64_t c0, int64_t n) {
    read_row(w, from.at(b, t, c0), from.dtype, from.stride[2], n);
    write_row(to.at(at.entry, at.position, c0), to.dtype, to.stride[2], w, n);
  };
  for (int64_t c0 = 0; c0 < p.rope; c0 += kMlaChannels)
    copy(p.k_rope, p.new_rope, c0, p.rope - c0 < kMlaChannels ? p.rope - c0 : kMlaChannels);
  for (int64_t c0 = 0; c0 < p.latent; c0 += kMlaChannels) {
    const int64_t n = p.latent - c0 < kMlaChannels ? p.latent - c0 : kMlaChannels;
    if (!p.group) {
      copy(p.values, p.new_latent, c0, n);
      continue;
    }
    read_row(w, p.new_latent.at(b, t, c0), p.new_latent.dtype, p.new_latent.stride[2], n);
    for (int64_t c = 0; c < n; c += p.group) {
      const Affine a = affine_of(w + c, p.group);
      uint32_t words[128 / 8];
      encode_group(words, w + c, p.group, a);  // with scale and bias as they are before rounding
      for (int64_t k = 0; k < p.group / 8; ++k)
        std::memcpy(p.codes.at(at.entry, at.position, (c0 + c) / 8 + k), &words[k], 4);
      const int64_t g = (c0 + c) / p.group;
      write_one(p.scales.at(at.entry, at.position, g), p.scales.dtype, a.scale);
      write_one(p.biases.at(at.entry, at.position, g), p.biases.dtype, a.bias);
    }
  }
}

}  // namespace ssmk::cpu::SSMK_ISA
