// SPDX-License-Identifier: MIT
// The convolution's decode step with two channels a thread: whatever the strides, rings included.
//
// x and out have the dtype X, the state X or float32; widths up to 4.  The last four inputs are
// held in registers, where the tokens pass through them; a longer state is moved in memory before.
#pragma once

#include "cuda/causal_conv1d_update_call.cuh"

namespace ssmk::cuda {

constexpr int kChannelTaps = 4;  // the width that fits
constexpr int kChannelThreads = 128, kChannelsEach = 2;

// A thread takes kChannelsEach channels, kChannelThreads apart, that share what a row takes. kWide:
// width 4, and the weights of a channel are X side by side, aligned.  kTokens: how many are loaded
// at a time; 1: there is no more than one.
template <class X, class S, bool kRing, bool kWide, int kTokens>
__global__ void __launch_bounds__(kChannelThreads, kTokens == 1 ? 8
                                                   : kWide      ? 6
                                                                : 4)
    channel_step(const __grid_constant__ ConvUpdateCall p) {
  constexpr int kTaps = kChannelTaps, kEach = kChannelsEach;
  start_next();
  const int c0 = blockIdx.x * (kChannelThreads * kEach) + threadIdx.x;
  if (c0 >= p.dim) return;
  bool mine[kEach];
  int c[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    mine[j] = c0 + j * kChannelThreads < p.dim;
    c[j] = mine[j] ? c0 + j * kChannelThreads : c0;  // what is nobody's is read twice
  }
  // Taps and inputs fill the ends of their arrays, so that the newest input has a fixed place.
  const int unused = kWide ? 0 : kTaps - p.width, length = p.state_len;
  wait_for_previous();

  for (int row = blockIdx.y; row < p.batch; row += gridDim.y) {
    // Loads, the slots' first, and nothing that waits for one
    ConvRow indices;
    indices.read(p, row);
    Index position = {0, 0};
    if constexpr (kRing) position = index_at(p.lens, p.lens_step, p.lens_wide, row, 0);
    const char *xs[kEach];
    char *outs[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      xs[j] = p.x + row * p.x_row + int64_t(c[j]) * p.x_channel;
      outs[j] = p.out + row * p.out_row + int64_t(c[j]) * p.out_channel;
    }
    X x[kEach][kTokens];
    typename Word<kTokens *int(sizeof(X))>::type quad[kEach];  // in one piece until it is used
    const auto x_at = [&](int j, int t) {
      return reinterpret_cast<const X *>(xs[j] + int64_t(t) * p.x_token);
    };
    const auto load_tokens = [&](int t0) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (kTokens > 1 && p.quads) {
          quad[j] = __ldcs(
              reinterpret_cast<const typename Word<kTokens *int(sizeof(X))>::type *>(x_at(j, t0)));
          continue;
        }
#pragma unroll
        for (int u = 0; u < kTokens; ++u)
          if (kTokens == 1 || t0 + u < p.ntokens) x[j][u] = __ldcs(x_at(j, t0 + u));
      }
    };
    load_tokens(0);
    Pack<X, kTaps> packed_weight[kEach];
    uint32_t weight_bits[kEach][kTaps], bias_bits[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const char *const at = p.weight + int64_t(c[j]) * p.weight_channel;
      if constexpr (kWide) {
        packed_weight[j] = load_pack<X, kTaps>(reinterpret_cast<const X *>(at));
      } else {
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
          if (k >= unused)
            weight_bits[j][k] = load_bits(at + int64_t(k - unused) * p.weight_tap, p.weight_dtype);
      }
      if (p.bias) bias_bits[j] = load_bits(p.bias + int64_t(c[j]) * p.bias_channel, p.bias_dtype);
    }

    const ConvStep step(p, indices);
    const char *from[kEach];
    char *to[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = int64_t(c[j]) * p.state_channel;
      from[j] = p.state + step.in * p.slot + at, to[j] = p.state + step.to * p.slot + at;
    }
    const auto input_at = [&](int i) { return int64_t(i) * p.state_input; };
    int start = 0;  // where the next token goes in a ring
    if constexpr (kRing) {
      // 32 bits divide faster, and mostly do.
      const int64_t at = position.value(p.lens_wide);
      start = at == uint32_t(at) ? int(uint32_t(at) % uint32_t(length)) : int(at % length);
      if (start < 0) start += length;  // undefined, but inside the slot
    }
    S state[kEach][kTaps];
    if (!step.pad) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        int at = kRing ? start - kTaps + i : length - kTaps + i;
        if (kRing ? i <= unused : at < 0) continue;
        if (kRing && at < 0) at += length;
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          state[j][i] = __ldcs(reinterpret_cast<const S *>(from[j] + input_at(at)));
      }
    }
    float weight[kEach][kTaps], bias[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        if constexpr (kWide) {
          weight[j][k] = widen(packed_weight[j].v[k]);
        } else {
          weight[j][k] = value_of(weight_bits[j][k], p.weight_dtype);
        }
      }
      bias[j] = p.bias ? value_of(bias_bits[j], p.bias_dtype) : 0.0f;
    }

    // What the registers do not hold: the oldest inputs, or a ring that goes to another slot.
    if (step.writes() && (kRing ? step.to != step.in : length > kTaps)) {
      const int gone = kRing ? 0 : step.tokens, end = kRing ? length : length - kTaps;
#pragma unroll 1
      for (int i = 0; i < end; ++i) {
        const int old = i + gone;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (!mine[j]) continue;
          S value;
          if (old < length) {
            value = *reinterpret_cast<const S *>(from[j] + input_at(old));
          } else {
            value = kept<S>(*x_at(j, old - length));
          }
          *reinterpret_cast<S *>(to[j] + input_at(i)) = value;
        }
      }
    }

    for (int t0 = 0; t0 < (kTokens == 1 ? 1 : p.ntokens); t0 += kTokens) {
      if (kTokens > 1 && t0 > 0) load_tokens(t0);
      if (kTokens > 1 && p.quads) memcpy(x, quad, sizeof(x));
      float y[kEach][kTokens] = {};
#pragma unroll
      for (int u = 0; u < kTokens; ++u) {
        if (t0 + u >= step.tokens) break;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          float sum = bias[j];
#pragma unroll
          for (int k = 0; k < kTaps; ++k) {
            if (k < unused) continue;
            const float input =
                k + 1 < kTaps ? widen(state[j][k + 1 < kTaps ? k + 1 : 0]) : widen(x[j][u]);
            sum = fmaf(weight[j][k], input, sum);
          }
          y[j][u] = p.silu ? conv_silu(sum) : sum;
#pragma unroll
          for (int i = 0; i + 1 < kTaps; ++i) state[j][i] = state[j][i + 1];
          state[j][kTaps - 1] = kept<S>(x[j][u]);
          if constexpr (kRing)
            if (mine[j]) *reinterpret_cast<S *>(to[j] + input_at(start)) = state[j][kTaps - 1];
        }
        if constexpr (kRing) start = start + 1 == length ? 0 : start + 1;
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!mine[j]) continue;
        const auto y_at = [&](int t) {
          return reinterpret_cast<X *>(outs[j] + int64_t(t) * p.out_token);
        };
        if (kTokens > 1 && p.quads) {
          store_pack_once(y_at(t0), narrow_pack<X>(y[j]));
          continue;
        }
#pragma unroll
        for (int u = 0; u < kTokens; ++u)
          if (kTokens == 1 || t0 + u < p.ntokens) __stcs(y_at(t0 + u), narrow<X>(y[j][u]));
      }
    }

    if constexpr (!kRing) {
      if (!step.writes()) continue;
#pragma unroll
      for (int i = 0; i < kTaps; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (mine[j] && length - kTaps + i >= 0)
            __stcs(reinterpret_cast<S *>(to[j] + input_at(length - kTaps + i)), state[j][i]);
    }
  }
}

}  // namespace ssmk::cuda
