// SPDX-License-Identifier: MIT
// The convolution's decode step with a thread a channel: whatever the strides, rings included.
//
// x and out have the dtype X, the state X or float32; widths up to 4.  The last four inputs are
// held in registers, where the tokens pass through them; a longer state is moved in memory before.
#pragma once

#include "cuda/causal_conv1d_update_call.cuh"

namespace ssmk::cuda {

constexpr int kChannelTaps = 4;  // the width that fits
constexpr int kChannelThreads = 128;

// kWide: width 4, and the weights of a channel are X side by side, aligned.  kTokens: how many are
// loaded at a time; 1: there is no more than one.
template <class X, class S, bool kRing, bool kWide, int kTokens>
__global__ void __launch_bounds__(kChannelThreads, kTokens == 1 ? 10 : 8)
    channel_step(const __grid_constant__ ConvUpdateCall p) {
  constexpr int kTaps = kChannelTaps;
  start_next();
  const int c = blockIdx.x * kChannelThreads + threadIdx.x;
  if (c >= p.dim) return;
  const char *const weights = p.weight + int64_t(c) * p.weight_channel;
  const char *const bias_at = p.bias + int64_t(c) * p.bias_channel;
  const int64_t x_at = int64_t(c) * p.x_channel, out_at = int64_t(c) * p.out_channel;
  const int64_t state_at = int64_t(c) * p.state_channel;
  // Taps and inputs fill the ends of their arrays, so that the newest input has a fixed place.
  const int unused = kWide ? 0 : kTaps - p.width, length = p.state_len;
  const auto input_at = [&](int i) { return int64_t(i) * p.state_input; };
  wait_for_previous();

  for (int row = blockIdx.y; row < p.batch; row += gridDim.y) {
    // Loads, the slots' first, and nothing that waits for one
    ConvRow indices;
    indices.read(p, row);
    Index position = {0, 0};
    if constexpr (kRing) position = index_at(p.lens, p.lens_step, p.lens_wide, row, 0);
    const char *const xs = p.x + int64_t(row) * p.x_row + x_at;
    char *const outs = p.out + int64_t(row) * p.out_row + out_at;
    X x[kTokens];
    typename Word<kTokens *int(sizeof(X))>::type quad = {};  // in one piece until it is used
    const auto load_tokens = [&](int t0) {
      if (kTokens > 1 && p.quads) {
        quad = __ldcs(reinterpret_cast<const decltype(quad) *>(xs + t0 * int(sizeof(X))));
        return;
      }
#pragma unroll
      for (int u = 0; u < kTokens; ++u)
        if (kTokens == 1 || t0 + u < p.ntokens)
          x[u] = __ldcs(reinterpret_cast<const X *>(xs + int64_t(t0 + u) * p.x_token));
    };
    load_tokens(0);
    Pack<X, kTaps> packed_weight;
    uint32_t weight_bits[kTaps], bias_bits = 0;
    if constexpr (kWide) {
      packed_weight = load_pack<X, kTaps>(reinterpret_cast<const X *>(weights));
    } else {
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (k >= unused)
          weight_bits[k] = load_bits(weights + int64_t(k - unused) * p.weight_tap, p.weight_dtype);
    }
    if (p.bias) bias_bits = load_bits(bias_at, p.bias_dtype);

    const ConvStep step(p, indices);
    const char *const from = p.state + step.in * p.slot + state_at;
    char *const to = p.state + step.to * p.slot + state_at;
    int start = 0;  // where the next token goes in a ring
    if constexpr (kRing) {
      // 32 bits divide faster, and mostly do.
      const int64_t at = position.value(p.lens_wide);
      start = at == uint32_t(at) ? int(uint32_t(at) % uint32_t(length)) : int(at % length);
      if (start < 0) start += length;  // undefined, but inside the slot
    }
    S state[kTaps];
    if (!step.pad) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        int at = kRing ? start - kTaps + i : length - kTaps + i;
        if (kRing ? i <= unused : at < 0) continue;
        if (kRing && at < 0) at += length;
        state[i] = __ldcs(reinterpret_cast<const S *>(from + input_at(at)));
      }
    }
    float weight[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      if constexpr (kWide) {
        weight[k] = widen(packed_weight.v[k]);
      } else {
        weight[k] = value_of(weight_bits[k], p.weight_dtype);
      }
    }
    const float bias = p.bias ? value_of(bias_bits, p.bias_dtype) : 0.0f;

    // What the registers do not hold: the oldest inputs, or a ring that goes to another slot.
    if (step.writes() && (kRing ? step.to != step.in : length > kTaps)) {
      const int gone = kRing ? 0 : step.tokens, end = kRing ? length : length - kTaps;
#pragma unroll 1
      for (int i = 0; i < end; ++i) {
        const int old = i + gone;
        S value;
        if (old < length) {
          value = *reinterpret_cast<const S *>(from + input_at(old));
        } else {
          value = kept<S>(*reinterpret_cast<const X *>(xs + int64_t(old - length) * p.x_token));
        }
        *reinterpret_cast<S *>(to + input_at(i)) = value;
      }
    }

    for (int t0 = 0; t0 < (kTokens == 1 ? 1 : p.ntokens); t0 += kTokens) {
      if (kTokens > 1 && t0 > 0) load_tokens(t0);
      if (kTokens > 1 && p.quads) memcpy(x, &quad, sizeof(x));
      float y[kTokens] = {};
#pragma unroll
      for (int u = 0; u < kTokens; ++u) {
        if (t0 + u >= step.tokens) break;
        float sum = bias;
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          if (k < unused) continue;
          const float input = k + 1 < kTaps ? widen(state[k + 1 < kTaps ? k + 1 : 0]) : widen(x[u]);
          sum = fmaf(weight[k], input, sum);
        }
        y[u] = p.silu ? conv_silu(sum) : sum;
#pragma unroll
        for (int i = 0; i + 1 < kTaps; ++i) state[i] = state[i + 1];
        state[kTaps - 1] = kept<S>(x[u]);
        if constexpr (kRing) {
          *reinterpret_cast<S *>(to + input_at(start)) = state[kTaps - 1];
          start = start + 1 == length ? 0 : start + 1;
        }
      }
      if (kTokens > 1 && p.quads) {
        store_pack_once(reinterpret_cast<X *>(outs) + t0, narrow_pack<X>(y));
        continue;
      }
#pragma unroll
      for (int u = 0; u < kTokens; ++u)
        if (kTokens == 1 || t0 + u < p.ntokens)
          *reinterpret_cast<X *>(outs + int64_t(t0 + u) * p.out_token) = narrow<X>(y[u]);
    }

    if constexpr (!kRing) {
      if (!step.writes()) continue;
#pragma unroll
      for (int i = 0; i < kTaps; ++i)
        if (length - kTaps + i >= 0)
          __stcs(reinterpret_cast<S *>(to + input_at(length - kTaps + i)), state[i]);
    }
  }
}

}  // namespace ssmk::cuda
