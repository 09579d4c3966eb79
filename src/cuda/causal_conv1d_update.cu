// SPDX-License-Identifier: MIT
// The decode step of the short causal convolution.
//
//   out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})        for every channel
//
// Memory bounds it: the last inputs are read, moved by the new ones and written back in place.
//   any_step      a thread a channel; every layout, dtype, width, state length, count and ring
//   packed_step   one token, width 4, a state of 3 or 4 inputs, 16 bytes an access: a thread takes
//                 as many channels as that holds.  A block holds several rows of the batch, which
//                 find the weights in L1.  Where a channel's inputs lie side by side, a warp reads
//                 its channels' as one run and sorts them out in shared memory.
// The sum runs from bias through the taps in order, one fma each, on both: bits depend neither on
// the layout nor on the rest of the batch, and are those of the CPU's but for silu.
#include "cuda/launch.cuh"
#include "cuda/slots.cuh"
#include "cuda/values.cuh"

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
        store(to, state.dtype, load_at(p.x, row, c, from - length));
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
    store_at(state, load_at(p.x, row, c, t), s.write_slot, c, at);
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
      store_at(p.out, p.activation == Activation::kSilu ? silu(sum) : sum, row, c, t);
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

// ---- One token of packed tensors

constexpr int kPackedWidth = 4;
constexpr int kRows = 8;  // of the batch, a warp each
constexpr int kLanes = 32;
constexpr int64_t kMostRowBlocks = 65535;  // along a grid's y

// Consecutive values of a dtype known when running; `p` is aligned to their bytes, up to 16.
template <int N>
__device__ __forceinline__ void load_run(const char *p, DType dtype, float (&to)[N]) {
  if (dtype == DType::kF32) {
    widen(load_pack<float, N>(reinterpret_cast<const float *>(p)), to);
  } else if (dtype == DType::kF16) {
    widen(load_pack<__half, N>(reinterpret_cast<const __half *>(p)), to);
  } else {
    widen(load_pack<__nv_bfloat16, N>(reinterpret_cast<const __nv_bfloat16 *>(p)), to);
  }
}

template <int N>
__device__ __forceinline__ void store_run(char *p, DType dtype, const float (&from)[N]) {
  if (dtype == DType::kF32) {
    store_pack_once(reinterpret_cast<float *>(p), narrow_pack<float>(from));
  } else if (dtype == DType::kF16) {
    store_pack_once(reinterpret_cast<__half *>(p), narrow_pack<__half>(from));
  } else {
    store_pack_once(reinterpret_cast<__nv_bfloat16 *>(p), narrow_pack<__nv_bfloat16>(from));
  }
}

// The bits of an element of a state, and what they mean.
template <class Bits>
__device__ __forceinline__ float widen_bits(Bits bits, DType dtype);
template <>
__device__ __forceinline__ float widen_bits(uint32_t bits, DType) {
  return __uint_as_float(bits);
}
template <>
__device__ __forceinline__ float widen_bits(uint16_t bits, DType dtype) {
  return dtype == DType::kF16 ? widen(__ushort_as_half(bits)) : widen(__ushort_as_bfloat16(bits));
}

template <class Bits>
__device__ __forceinline__ Bits narrow_bits(float v, DType dtype);
template <>
__device__ __forceinline__ uint32_t narrow_bits(float v, DType) {
  return __float_as_uint(v);
}
template <>
__device__ __forceinline__ uint16_t narrow_bits(float v, DType dtype) {
  return dtype == DType::kF16 ? __half_as_ushort(narrow<__half>(v))
                              : __bfloat16_as_ushort(narrow<__nv_bfloat16>(v));
}

// kLength inputs of kChannels channels, as they lie: channel by channel (kByChannel), or input by
// input.
template <class Bits, int kLength, bool kByChannel>
struct Inputs {
  static constexpr int kChannels = 16 / sizeof(Bits);
  Pack<Bits, kChannels> part[kLength];

  __device__ __forceinline__ Bits &at(int c, int i) {
    if (!kByChannel) return part[i].v[c];
    return part[(c * kLength + i) / kChannels].v[(c * kLength + i) % kChannels];
  }
};

// A warp's parts in shared memory: kLength neighbouring ones of each lane, at an odd distance, so
// that access both by lane and along the run meets no bank twice.
template <int kLength>
struct Sorted {
  static constexpr int kStride = kLength | 1;
  uint4 part[kLanes * kStride];

  __device__ __forceinline__ uint4 &at(int i) { return part[i / kLength * kStride + i % kLength]; }
};

template <class Bits, int kLength, bool kByChannel>
__global__ void __launch_bounds__(kRows *kLanes)
    packed_step(const __grid_constant__ CausalConv1dUpdateProblem p) {
  using State = Inputs<Bits, kLength, kByChannel>;
  constexpr int kChannels = State::kChannels, kBlock = kLanes * kChannels;
  __shared__ Sorted<kByChannel ? kLength : 1> sorted[kByChannel ? kRows : 1];
  const int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t c0 = int64_t(blockIdx.x) * kBlock, c = c0 + threadIdx.x * kChannels;
  const bool mine = c < p.dim;  // dim is a multiple of kChannels
  if (row >= p.batch) return;   // a whole warp
  wait_for_previous();
  const Step s = step_of(p, row);
  if (s.pad) {
    const float zeros[kChannels] = {};
    if (mine) store_run(p.out.at(row, c, 0), p.out.dtype, zeros);
    return;
  }

  // Loads, the state's first
  Bits *from = reinterpret_cast<Bits *>(p.conv_state.at(s.read_slot, kByChannel ? c0 : c, 0));
  Bits *to = reinterpret_cast<Bits *>(p.conv_state.at(s.write_slot, kByChannel ? c0 : c, 0));
  const int parts = int(min(int64_t(kLanes), (p.dim - c0) / kChannels)) * kLength;
  State state;
  if constexpr (kByChannel) {
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const int part = i * kLanes + threadIdx.x;
      if (part < parts) state.part[i] = load_pack_once<Bits, kChannels>(from + part * kChannels);
    }
  } else if (mine) {
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      state.part[i] = load_pack_once<Bits, kChannels>(from + i * p.conv_state.stride[2]);
  }
  float x[kChannels] = {}, weight[kChannels * kPackedWidth] = {}, sum[kChannels] = {};
  if (mine) {
    load_run(p.x.at(row, c, 0), p.x.dtype, x);
    load_run(p.weight.at(c, 0), p.weight.dtype, weight);
    if (p.bias.given()) load_run(p.bias.at(c), p.bias.dtype, sum);
  }
  start_next();
  if constexpr (kByChannel) {
    auto &shared = sorted[threadIdx.y];
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const int part = i * kLanes + threadIdx.x;
      if (part < parts) shared.at(part) = *reinterpret_cast<const uint4 *>(&state.part[i]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      if (mine) *reinterpret_cast<uint4 *>(&state.part[i]) = shared.at(threadIdx.x * kLength + i);
  }

  // The sum
#pragma unroll
  for (int k = 0; k < kPackedWidth; ++k)
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const bool newest = k == kPackedWidth - 1;
      const float input =
          newest ? x[j]
                 : widen_bits<Bits>(state.at(j, newest ? 0 : kLength - (kPackedWidth - 1) + k),
                                    p.conv_state.dtype);
      sum[j] = fmaf(weight[j * kPackedWidth + k], input, sum[j]);
    }
  if (p.activation == Activation::kSilu) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) sum[j] = silu(sum[j]);
  }
  if (s.tokens == 0) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) sum[j] = 0.0f;
  }
  if (mine) store_run(p.out.at(row, c, 0), p.out.dtype, sum);

  // The state, one input on
  if (s.tokens == 0 && s.write_slot == s.read_slot) return;
  if (s.tokens > 0) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
#pragma unroll
      for (int i = 0; i + 1 < kLength; ++i) state.at(j, i) = state.at(j, i + 1);
      state.at(j, kLength - 1) = narrow_bits<Bits>(x[j], p.conv_state.dtype);
    }
  }
  if constexpr (kByChannel) {
    auto &shared = sorted[threadIdx.y];
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      if (mine)
        shared.at(threadIdx.x * kLength + i) = *reinterpret_cast<const uint4 *>(&state.part[i]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const int part = i * kLanes + threadIdx.x;
      if (part < parts) __stcs(reinterpret_cast<uint4 *>(to + part * kChannels), shared.at(part));
    }
  } else if (mine) {
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      store_pack_once(to + i * p.conv_state.stride[2], state.part[i]);
  }
}

// Values of `channels` neighbouring channels lie side by side and aligned, in x, out or bias.
template <int Rank>
bool runs_along(const View<Rank> &v, int axis, int64_t channels) {
  const int64_t bytes = channels * size_of(v.dtype);
  return packs_along(v, axis, bytes < 16 ? bytes : 16);
}

// The state lies input by input (by_channel = false) or channel by channel, packed and aligned.
bool packed(const CausalConv1dUpdateProblem &p, int64_t channels, bool *by_channel) {
  const View<3> &s = p.conv_state;
  if (p.ntokens != 1 || p.width != kPackedWidth || p.state_len > 4) return false;
  if (p.cache_seqlens.given() || p.dim % channels) return false;
  if (p.dim > kMostBlocks || p.batch > int64_t(kRows) * kMostRowBlocks) return false;
  // Axis 2 of x and out has one element and counts for nothing.
  View<3> x = p.x, out = p.out;
  x.stride[2] = out.stride[2] = 0;
  if (!runs_along(x, 1, channels) || !runs_along(out, 1, channels)) return false;
  if (p.bias.given() && !runs_along(p.bias, 0, channels)) return false;
  if (p.weight.stride[1] != 1 || p.weight.stride[0] != kPackedWidth ||
      reinterpret_cast<uintptr_t>(p.weight.data) % 16)
    return false;
  const int64_t item = size_of(s.dtype);
  if (reinterpret_cast<uintptr_t>(s.data) % 16 || s.stride[0] * item % 16) return false;
  *by_channel = s.stride[2] == 1 && s.stride[1] == p.state_len;
  return *by_channel || (s.stride[1] == 1 && s.stride[2] * item % 16 == 0);
}

template <class Bits, int kLength, bool kByChannel>
ssmk_status launch_packed(const CausalConv1dUpdateProblem &p, const Call &call) {
  constexpr int64_t kBlock = kLanes * 16 / sizeof(Bits);
  const int64_t channel_blocks = (p.dim + kBlock - 1) / kBlock;
  const int64_t rows = p.batch < kRows ? p.batch : kRows;
  const int64_t row_blocks = (p.batch + rows - 1) / rows;
  return launch(call, packed_step<Bits, kLength, kByChannel>,
                dim3(unsigned(channel_blocks), unsigned(row_blocks)), dim3(kLanes, unsigned(rows)),
                0, p);
}

template <class Bits>
ssmk_status launch_packed(const CausalConv1dUpdateProblem &p, bool by_channel, const Call &call) {
  if (p.state_len == 3)
    return by_channel ? launch_packed<Bits, 3, true>(p, call)
                      : launch_packed<Bits, 3, false>(p, call);
  return by_channel ? launch_packed<Bits, 4, true>(p, call)
                    : launch_packed<Bits, 4, false>(p, call);
}

}  // namespace

ssmk_status causal_conv1d_update(const CausalConv1dUpdateProblem &p, const Call &call) {
  if (p.batch == 0 || p.dim == 0) return SSMK_OK;
  const bool wide = size_of(p.conv_state.dtype) == 4;
  bool by_channel;
  if (packed(p, wide ? 4 : 8, &by_channel))
    return wide ? launch_packed<uint32_t>(p, by_channel, call)
                : launch_packed<uint16_t>(p, by_channel, call);
  const int64_t channel_blocks = (p.dim + kThreads - 1) / kThreads;
  const int64_t blocks = p.batch * channel_blocks;
  const int64_t grid = blocks < kMostBlocks ? blocks : kMostBlocks;
  return launch(call, any_step, dim3(unsigned(grid)), dim3(kThreads), 0, p, channel_blocks, blocks);
}

}  // namespace ssmk::cuda
