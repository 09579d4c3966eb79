// SPDX-License-Identifier: MIT
// The decode step of the short causal convolution.
//
//   out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})        for every channel
//
// Memory bounds it: the last inputs are read, moved by the new ones and written back in place.
//   any_step       a thread a channel; every layout, dtype, width, state length, count and ring
//   channel_step   two channels a thread: the same for widths up to 4 and x and out of one dtype
//   packed_step    a thread several neighbouring channels, whose values lie side by side
// The sum runs from bias through the taps in order, one fma each, on all: bits depend neither on
// the layout nor on the rest of the batch, and are those of the CPU's but for silu.
#include "cuda/causal_conv1d_update_channel.cuh"
#include "cuda/causal_conv1d_update_packed.cuh"
#include "cuda/slots.cuh"

namespace ssmk::cuda {
namespace {

constexpr int kWidth = int(kMaxConvWidth);

// What a row does.
struct Step {
  int64_t tokens, read_slot, write_slot;
  bool pad;
};

__device__ __forceinline__ Step step_of(const CausalConv1dUpdateProblem &p, int64_t row) {
  const Slot in = slot_of(p.state_indices, p.pad, row);
  const Slot out = p.state_indices_out.given() ? slot_of(p.state_indices_out, p.pad, row) : in;
  return {count_of(p.num_tokens, row, p.ntokens), in.index, out.index, in.pad || out.pad};
}

// ---- Any call

// An element moves as it is.
__device__ __forceinline__ void move(char *to, const char *from, int64_t bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t *>(to) = *reinterpret_cast<const uint32_t *>(from);
  } else {
    *reinterpret_cast<uint16_t *>(to) = *reinterpret_cast<const uint16_t *>(from);
  }
}

// A token's input as the state keeps it.
__device__ __forceinline__ void take(char *to, const CausalConv1dUpdateProblem &p, int64_t row,
                                     int64_t c, int64_t t) {
  const char *const x = p.x.at(row, c, t);
  if (p.x.dtype == p.conv_state.dtype) {
    move(to, x, size_of(p.x.dtype));
  } else {
    store(to, p.conv_state.dtype, load(x, p.x.dtype));
  }
}

// The channel's inputs after the call: the last of those before and of the tokens.  In a ring each
// token goes to its own place, and in another slot the rest is copied.
__device__ void keep_inputs(const CausalConv1dUpdateProblem &p, const Step &s, int64_t row,
                            int64_t c, bool ring, int64_t start) {
  const View<3> &state = p.conv_state;
  const int64_t length = p.state_len, bytes = size_of(state.dtype);
  const bool moves = s.write_slot != s.read_slot;
  if (!ring) {
    if (s.tokens == 0 && !moves) return;
    for (int64_t i = 0; i < length; ++i) {
      char *to = state.at(s.write_slot, c, i);
      const int64_t from = i + s.tokens;
      if (from < length) {
        move(to, state.at(s.read_slot, c, from), bytes);
      } else {
        take(to, p, row, c, from - length);
      }
    }
    return;
  }
  if (moves)
    for (int64_t i = 0; i < length; ++i)
      move(state.at(s.write_slot, c, i), state.at(s.read_slot, c, i), bytes);
  int64_t t = s.tokens > length ? s.tokens - length : 0;
  int64_t at = (start + t) % length;
  for (; t < s.tokens; ++t) {
    take(state.at(s.write_slot, c, at), p, row, c, t);
    at = at + 1 == length ? 0 : at + 1;
  }
}

__device__ void step_channel(const CausalConv1dUpdateProblem &p, int64_t row, int64_t c) {
  const Step s = step_of(p, row);
  const int64_t tokens = s.pad ? 0 : s.tokens;
  for (int64_t t = tokens; t < p.ntokens; ++t) store_at(p.out, 0.0f, row, c, t);
  if (s.pad) return;

  // Taps and inputs fill the ends of their arrays, so that the newest input has a fixed place.
  const int width = int(p.width), unused = kWidth - width;
  const bool ring = p.cache_seqlens.given();
  int64_t start = 0;
  if (ring) {
    start = read_index(p.cache_seqlens, row) % p.state_len;
    if (start < 0) start += p.state_len;  // undefined, but inside the slot
  }
  if (tokens > 0) {
    float weight[kWidth], input[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (k < unused) continue;
      weight[k] = load_at(p.weight, c, k - unused);
      if (k == kWidth - 1) continue;
      int64_t at = p.state_len - (kWidth - 1) + k;
      if (ring) at = (start + at) % p.state_len;
      input[k] = load_at(p.conv_state, s.read_slot, c, at);
    }
    const float bias = p.bias.given() ? load_at(p.bias, c) : 0.0f;
    for (int64_t t = 0; t < tokens; ++t) {
      input[kWidth - 1] = load_at(p.x, row, c, t);
      float sum = bias;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (k >= unused) sum = fmaf(weight[k], input[k], sum);
      store_at(p.out, p.activation == Activation::kSilu ? conv_silu(sum) : sum, row, c, t);
#pragma unroll
      for (int k = 0; k + 1 < kWidth; ++k) input[k] = input[k + 1];
    }
  }
  keep_inputs(p, s, row, c, ring, start);
}

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 0x7fffffff;  // along a grid's x

__global__ void __launch_bounds__(kThreads, 6)
    any_step(const __grid_constant__ CausalConv1dUpdateProblem p, int64_t channel_blocks,
             int64_t blocks) {
  wait_for_previous();
  start_next();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t c = block % channel_blocks * kThreads + threadIdx.x;
    if (c < p.dim) step_channel(p, block / channel_blocks, c);
  }
}

// ---- Two channels a thread

constexpr int kMostRowBlocks = 65535;  // along a grid's y

inline unsigned row_blocks(int batch, int rows) {
  const int64_t blocks = (int64_t(batch) + rows - 1) / rows;
  return unsigned(blocks < kMostRowBlocks ? blocks : kMostRowBlocks);
}

template <class X, class S, bool kRing, bool kWide>
ssmk_status launch_channels(const ConvUpdateCall &c, const Call &call) {
  constexpr int kBlock = kChannelThreads * kChannelsEach;
  const dim3 grid(unsigned((int64_t(c.dim) + kBlock - 1) / kBlock), row_blocks(c.batch, 1));
  const dim3 block(kChannelThreads);
  if constexpr (kWide)
    if (c.ntokens == 1) return launch(call, channel_step<X, S, kRing, kWide, 1>, grid, block, 0, c);
  return launch(call, channel_step<X, S, kRing, kWide, 4>, grid, block, 0, c);
}

template <class X, class S>
ssmk_status launch_channels(const ConvUpdateCall &c, bool ring, const Call &call) {
  const int64_t run = kChannelTaps * int64_t(sizeof(X));  // of a channel's weights
  const bool wide = c.width == kChannelTaps && c.weight_dtype == dtype_for<X> &&
                    c.weight_tap == int64_t(sizeof(X)) && c.weight_channel % run == 0 &&
                    reinterpret_cast<uintptr_t>(c.weight) % uintptr_t(run) == 0;
  if (ring)
    return wide ? launch_channels<X, S, true, true>(c, call)
                : launch_channels<X, S, true, false>(c, call);
  return wide ? launch_channels<X, S, false, true>(c, call)
              : launch_channels<X, S, false, false>(c, call);
}

// ---- Several channels a thread

constexpr int kSome = 4, kMany = 8;  // channels
// Values of a token: up to the first the memory has time to fetch ahead, from the second on it is
// what is waited for.
constexpr int64_t kFewValues = 1 << 17, kManyValues = 1 << 19;

// How a problem is packed, if it is.
struct Packing {
  bool some = false, many = false;  // as many channels lie side by side, aligned
  bool by_channel = false;
};

// Beside tensors of one dtype, bfloat16 has kernels of width 4 for a float32 state, weights or
// both.
template <class X, class S, class W>
constexpr bool kOneDtype = std::is_same_v<X, S> && std::is_same_v<X, W>;

// Runs of `count` values of v along `axis` are aligned to their bytes, up to 16.
template <int Rank>
bool runs_along(const View<Rank> &v, int axis, int64_t count) {
  const int64_t bytes = count * size_of(v.dtype);
  return packs_along(v, axis, bytes < 16 ? bytes : 16);
}

Packing packing_of(const CausalConv1dUpdateProblem &p, ConvUpdateCall *c) {
  Packing packing;
  const View<3> &s = p.conv_state;
  if (p.batch > kMostRowBlocks) return packing;
  if (p.cache_seqlens.given() || p.pad.entries == 0 || p.width < 2 || p.width > 4) return packing;
  if (p.state_len != p.width - 1 && (p.width != 4 || p.state_len != 4)) return packing;
  // Weights and bias
  if (p.weight.dtype != p.x.dtype && p.weight.dtype != DType::kF32) return packing;
  if (p.weight.stride[1] != 1 || p.weight.stride[0] != p.width) return packing;
  if (reinterpret_cast<uintptr_t>(p.weight.data) % 16) return packing;
  if (p.bias.given() && (p.bias.dtype != p.weight.dtype || p.bias.stride[0] != 1 ||
                         reinterpret_cast<uintptr_t>(p.bias.data) % 16))
    return packing;
  // The state
  const int64_t item = size_of(s.dtype);
  packing.by_channel = s.stride[2] == 1 && s.stride[1] == p.state_len;
  if (!packing.by_channel && (s.stride[1] != 1 || s.stride[2] < 0)) return packing;
  const int64_t apart = packing.by_channel ? p.dim : s.stride[2];
  if (((p.state_len - 1) * apart + p.dim) * item > INT32_MAX) return packing;  // inside a slot
  const auto state_aligned = [&](int64_t channels) {
    const int64_t bytes = channels * item < 16 ? channels * item : 16;
    return reinterpret_cast<uintptr_t>(s.data) % uintptr_t(bytes) == 0 &&
           s.stride[0] * item % bytes == 0 &&
           (packing.by_channel || s.stride[2] * item % bytes == 0);
  };
  // x and out: channel beside channel, or four tokens of a channel
  View<3> x = p.x, out = p.out;
  if (p.ntokens == 1) x.stride[2] = out.stride[2] = 0;  // counts for nothing
  c->quads = p.ntokens % 4 == 0 && runs_along(x, 2, 4) && runs_along(out, 2, 4);
  packing.some = p.dim % kSome == 0 && state_aligned(kSome) &&
                 (c->quads || (runs_along(x, 1, kSome) && runs_along(out, 1, kSome)));
  packing.many = p.dim % kMany == 0 && p.dim * p.batch >= kManyValues && state_aligned(kMany) &&
                 runs_along(x, 1, kMany) && runs_along(out, 1, kMany);
  return packing;
}

// kLength inputs a channel are kept.
template <class X, class S, class W, int kWidth, int kLength, bool kByChannel>
ssmk_status launch_packed(const ConvUpdateCall &c, bool many, const Call &call) {
  const auto go = [&](auto kernel, int channels) {
    const int most = c.ahead ? 2 : kPackedRows, rows = c.batch < most ? c.batch : most;
    const dim3 grid(unsigned((c.dim + kLanes * channels - 1) / (kLanes * channels)),
                    unsigned((c.batch + rows - 1) / rows));
    return launch(call, kernel, grid, dim3(kLanes, unsigned(rows)), 0, c);
  };
  // Threads with many channels keep more of the memory busy; in a small call more threads end
  // sooner.
  if constexpr (std::is_same_v<X, W> && sizeof(S) == 2 && kWidth == 4)
    if (many && c.ntokens == 1)
      return go(packed_step<X, S, W, kWidth, kLength, kByChannel, kMany, 1>, kMany);
  if constexpr (kWidth == 4)
    if (c.ntokens == 1)
      return go(packed_step<X, S, W, kWidth, kLength, kByChannel, kSome, 1>, kSome);
  return go(packed_step<X, S, W, kWidth, kLength, kByChannel, kSome, 4>, kSome);
}

template <class X, class S, class W, bool kByChannel>
ssmk_status launch_width(const ConvUpdateCall &c, bool many, const Call &call) {
  if constexpr (kOneDtype<X, S, W>) {
    if (c.width == 3) return launch_packed<X, S, W, 3, 2, kByChannel>(c, many, call);
    if (c.width == 2) return launch_packed<X, S, W, 2, 1, kByChannel>(c, many, call);
  }
  return c.state_len == 3 ? launch_packed<X, S, W, 4, 3, kByChannel>(c, many, call)
                          : launch_packed<X, S, W, 4, 4, kByChannel>(c, many, call);
}

template <class X, class S, class W>
ssmk_status launch_layout(const ConvUpdateCall &c, const Packing &packing, const Call &call) {
  return packing.by_channel ? launch_width<X, S, W, true>(c, packing.many, call)
                            : launch_width<X, S, W, false>(c, packing.many, call);
}

// x and out have the dtype X, the state S.
template <class X, class S>
ssmk_status launch_typed(const CausalConv1dUpdateProblem &p, ConvUpdateCall *c, const Call &call) {
  const Packing packing = packing_of(p, c);
  c->ahead = p.dim * p.batch <= kFewValues;
  const bool same_weights = p.weight.dtype == p.x.dtype;
  if constexpr (std::is_same_v<X, S>)
    if (packing.some && same_weights) return launch_layout<X, S, X>(*c, packing, call);
  if constexpr (std::is_same_v<X, __nv_bfloat16>)
    if (packing.some && p.width == 4)
      return same_weights ? launch_layout<X, S, X>(*c, packing, call)
                          : launch_layout<X, S, float>(*c, packing, call);
  return launch_channels<X, S>(*c, p.cache_seqlens.given(), call);
}

ssmk_status launch_any(const CausalConv1dUpdateProblem &p, const Call &call) {
  const int64_t channel_blocks = (p.dim + kThreads - 1) / kThreads;
  const int64_t blocks = p.batch * channel_blocks;
  const int64_t grid = blocks < kMostBlocks ? blocks : kMostBlocks;
  return launch(call, any_step, dim3(unsigned(grid)), dim3(kThreads), 0, p, channel_blocks, blocks);
}

}  // namespace

ssmk_status causal_conv1d_update(const CausalConv1dUpdateProblem &p, const Call &call) {
  if (p.batch == 0 || p.dim == 0) return SSMK_OK;
  ConvUpdateCall c;
  const DType x = p.x.dtype, state = p.conv_state.dtype;
  if (p.width > kChannelTaps || p.out.dtype != x || (state != x && state != DType::kF32) ||
      !make_call(p, &c))
    return launch_any(p, call);
  if (x == DType::kF32) return launch_typed<float, float>(p, &c, call);
  if (x == DType::kF16)
    return state == x ? launch_typed<__half, __half>(p, &c, call)
                      : launch_typed<__half, float>(p, &c, call);
  return state == x ? launch_typed<__nv_bfloat16, __nv_bfloat16>(p, &c, call)
                    : launch_typed<__nv_bfloat16, float>(p, &c, call);
}

}  // namespace ssmk::cuda
