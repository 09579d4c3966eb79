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

// How many threads a multiprocessor holds: what they wait for is each other's time.
constexpr int channel_blocks(int tokens, int rows) {
  return tokens > 1 ? (rows > 1 ? 6 : 8) : rows > 1 ? 8 : 10;
}

// A channel of a row on its way.
template <class X, class S, int kTokens>
struct ChannelRow {
  ConvRow indices;
  Index position;
  const char *xs;
  char *outs;
  typename Word<kTokens *int(sizeof(X))>::type quad;  // a word until it is used
  X x[kTokens];
  S state[kChannelTaps];
  ConvStep step;
  int start;  // where the next token goes in a ring
};

// kWide: width 4, and the weights of a channel are X side by side, aligned.  kTokens: how many are
// loaded at a time; 1: there is no more than one.  kRows of the batch share the weights.
template <class X, class S, bool kRing, bool kWide, int kTokens, int kRows = 1>
__global__ void __launch_bounds__(kChannelThreads, channel_blocks(kTokens, kRows))
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

  for (int row0 = blockIdx.y * kRows; row0 < p.batch; row0 += gridDim.y * kRows) {
    ChannelRow<X, S, kTokens> rows[kRows];
    const auto load_tokens = [&](ChannelRow<X, S, kTokens> &r, int t0) {
      if (kTokens > 1 && p.quads) {
        r.quad = __ldcs(reinterpret_cast<const decltype(r.quad) *>(r.xs + t0 * int(sizeof(X))));
        return;
      }
#pragma unroll
      for (int u = 0; u < kTokens; ++u)
        if (kTokens == 1 || t0 + u < p.ntokens)
          r.x[u] = __ldcs(reinterpret_cast<const X *>(r.xs + int64_t(t0 + u) * p.x_token));
    };
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int row = kRows == 1 ? row0 : min(row0 + k, p.batch - 1);  // the last one again
      ChannelRow<X, S, kTokens> &r = rows[k];
      r.indices.read(p, row);
      if constexpr (kRing) r.position = index_at(p.lens, p.lens_step, p.lens_wide, row, 0);
      r.xs = p.x + int64_t(row) * p.x_row + x_at;
      r.outs = p.out + int64_t(row) * p.out_row + out_at;
      load_tokens(r, 0);
    }
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

#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      ChannelRow<X, S, kTokens> &r = rows[k];
      r.step = ConvStep(p, r.indices);
      if (r.step.pad) continue;
      // 32 bits divide faster, and mostly do.
      if (kRing) {
        const int64_t at = r.position.value(p.lens_wide);
        r.start = at == uint32_t(at) ? int(uint32_t(at) % uint32_t(length)) : int(at % length);
        if (r.start < 0) r.start += length;  // undefined, but inside the slot
      }
      const char *const from = p.state + r.step.in * p.slot + state_at;
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        int at = kRing ? r.start - kTaps + i : length - kTaps + i;
        if (kRing ? i <= unused : at < 0) continue;
        if (kRing && at < 0) at += length;
        r.state[i] = __ldcs(reinterpret_cast<const S *>(from + input_at(at)));
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

#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (kRows > 1 && row0 + k >= p.batch) break;
      ChannelRow<X, S, kTokens> &r = rows[k];
      const ConvStep &step = r.step;
      const char *const from = p.state + step.in * p.slot + state_at;
      char *const to = p.state + step.to * p.slot + state_at;
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
            value = kept<S>(*reinterpret_cast<const X *>(r.xs + int64_t(old - length) * p.x_token));
          }
          *reinterpret_cast<S *>(to + input_at(i)) = value;
        }
      }
      for (int t0 = 0; t0 < (kTokens == 1 ? 1 : p.ntokens); t0 += kTokens) {
        if (kTokens > 1 && t0 > 0) load_tokens(r, t0);
        if (kTokens > 1 && p.quads) memcpy(r.x, &r.quad, sizeof(r.x));
        float y[kTokens];
#pragma unroll
        for (int u = 0; u < kTokens; ++u) {
          const int t = t0 + u;
          if (kTokens > 1 && t >= p.ntokens) break;
          y[u] = 0.0f;
          if (t < step.tokens) {
            float sum = bias;
#pragma unroll
            for (int i = 0; i < kTaps; ++i) {
              if (i < unused) continue;
              const float input =
                  i + 1 < kTaps ? widen(r.state[i + 1 < kTaps ? i + 1 : 0]) : widen(r.x[u]);
              sum = fmaf(weight[i], input, sum);
            }
            y[u] = p.silu ? conv_silu(sum) : sum;
#pragma unroll
            for (int i = 0; i + 1 < kTaps; ++i) r.state[i] = r.state[i + 1];
            r.state[kTaps - 1] = kept<S>(r.x[u]);
            if (kRing) {
              *reinterpret_cast<S *>(to + input_at(r.start)) = r.state[kTaps - 1];
              r.start = r.start + 1 == length ? 0 : r.start + 1;
            }
          }
          if (kTokens == 1 || !p.quads)
            *reinterpret_cast<X *>(r.outs + int64_t(t) * p.out_token) = narrow<X>(y[u]);
        }
        if (kTokens > 1 && p.quads)
          store_pack(reinterpret_cast<X *>(r.outs) + t0, narrow_pack<X>(y));
      }
      if constexpr (!kRing) {
        if (!step.writes()) continue;
#pragma unroll
        for (int i = 0; i < kTaps; ++i)
          if (length - kTaps + i >= 0)
            __stcs(reinterpret_cast<S *>(to + input_at(length - kTaps + i)), r.state[i]);
      }
    }
  }
}

}  // namespace ssmk::cuda
