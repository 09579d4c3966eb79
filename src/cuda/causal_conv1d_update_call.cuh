// SPDX-License-Identifier: MIT
// What the kernels of the convolution's decode step are given, and how they read a row's slots.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/values.cuh"

namespace ssmk::cuda {

// Strides are in bytes; those that fit 32 bits cost one instruction.  An array of indices that the
// caller did not give is NULL.
struct ConvUpdateCall {
  const char *x, *weight, *bias;
  char *out, *state;
  const char *in, *to, *counts, *lens;  // slots, counts of tokens, positions in a ring
  int64_t x_row, out_row, slot, entries, pad_slot;
  int32_t x_channel, x_token, out_channel, out_token, state_channel, state_input;
  int32_t weight_channel, weight_tap, bias_channel;
  int32_t in_step, to_step, counts_step, lens_step;
  int32_t dim, batch, ntokens, width, state_len;
  DType weight_dtype, bias_dtype;
  bool in_wide, to_wide, counts_wide, lens_wide;  // int64
  bool silu;
  bool quads;  // channel_step: four tokens lie side by side, aligned, in x and out
  bool ahead;  // packed_step: fetch before the wait
  bool plain;  // neither slots to write nor counts
};

// False where something does not fit.
inline bool make_call(const CausalConv1dUpdateProblem &p, ConvUpdateCall *call) {
  bool fits = true;
  const auto small = [&](int64_t v) {
    fits = fits && v == int32_t(v);
    return int32_t(v);
  };
  const auto indices = [&](const View<1> &v, const char **data, int32_t *step, bool *wide) {
    *data = v.given() ? v.data : nullptr;
    *step = v.given() ? small(v.stride[0] * size_of(v.dtype)) : 0;
    *wide = v.dtype == DType::kI64;
  };
  ConvUpdateCall &c = *call;
  const int64_t io = size_of(p.x.dtype), state = size_of(p.conv_state.dtype);
  c.x = p.x.data, c.out = p.out.data, c.state = p.conv_state.data;
  c.x_row = p.x.stride[0] * io, c.out_row = p.out.stride[0] * io;
  c.x_channel = small(p.x.stride[1] * io), c.out_channel = small(p.out.stride[1] * io);
  c.x_token = small(p.x.stride[2] * io), c.out_token = small(p.out.stride[2] * io);
  c.slot = p.conv_state.stride[0] * state;
  c.state_channel = small(p.conv_state.stride[1] * state);
  c.state_input = small(p.conv_state.stride[2] * state);
  c.weight = p.weight.data, c.weight_dtype = p.weight.dtype;
  c.weight_channel = small(p.weight.stride[0] * size_of(p.weight.dtype));
  c.weight_tap = small(p.weight.stride[1] * size_of(p.weight.dtype));
  c.bias = p.bias.given() ? p.bias.data : nullptr, c.bias_dtype = p.bias.dtype;
  c.bias_channel = p.bias.given() ? small(p.bias.stride[0] * size_of(p.bias.dtype)) : 0;
  indices(p.state_indices, &c.in, &c.in_step, &c.in_wide);
  indices(p.state_indices_out, &c.to, &c.to_step, &c.to_wide);
  indices(p.num_tokens, &c.counts, &c.counts_step, &c.counts_wide);
  indices(p.cache_seqlens, &c.lens, &c.lens_step, &c.lens_wide);
  c.entries = p.pad.entries, c.pad_slot = p.pad.has_pad_slot ? p.pad.pad_slot : -1;
  c.dim = small(p.dim), c.batch = small(p.batch), c.ntokens = small(p.ntokens);
  c.width = small(p.width), c.state_len = small(p.state_len);
  c.silu = p.activation == Activation::kSilu;
  c.plain = !c.to && !c.counts;
  c.quads = c.ahead = false;
  return fits;
}

// An index as it lies in memory: nothing waits for it before value() is asked for.  It is read past
// the first-level cache, which may hold what was there before the kernels that came before ended.
struct Index {
  uint32_t lo, hi;

  __device__ __forceinline__ int64_t value(bool wide) const {
    const uint32_t sign = uint32_t(int32_t(lo) >> 31);
    return int64_t(uint64_t(wide ? hi : sign) << 32 | lo);
  }
};

// `otherwise`, at least 0, where there are no indices.  Predicates and not branches, so that what
// follows need not wait.
__device__ __forceinline__ Index index_at(const char *data, int32_t step, bool wide, int row,
                                          int otherwise) {
  Index v = {uint32_t(otherwise), 0};
  asm volatile(
      "{\n.reg .pred given, wide;\n"
      "setp.ne.u32 given, %3, 0;\nsetp.ne.u32 wide, %4, 0;\n"
      "@given ld.relaxed.gpu.global.u32 %0, [%2];\n"
      "@wide ld.relaxed.gpu.global.u32 %1, [%2 + 4];\n}"
      : "+r"(v.lo), "+r"(v.hi)
      : "l"(data + int64_t(row) * step), "r"(uint32_t(data != nullptr)), "r"(uint32_t(wide))
      : "memory");
  return v;
}

// The slots and counts of a row, on their way.
struct ConvRow {
  Index in, to, count;

  __device__ __forceinline__ void read(const ConvUpdateCall &p, int row) {
    in = index_at(p.in, p.in_step, p.in_wide, row, row);
    if (p.plain) return;
    to = index_at(p.to, p.to_step, p.to_wide, row, 0);
    count = index_at(p.counts, p.counts_step, p.counts_wide, row, p.ntokens);
  }
};

__device__ __forceinline__ bool is_pad(const ConvUpdateCall &p, int64_t slot) {
  return uint64_t(slot) >= uint64_t(p.entries) || slot == p.pad_slot;
}

// What a row does, all of it there.
struct ConvStep {
  int64_t in, to;
  int tokens;        // 0 for a pad
  bool unread, pad;  // the slot to read is a pad; it or the one to write is

  ConvStep() = default;
  __device__ __forceinline__ ConvStep(const ConvUpdateCall &p, const ConvRow &row) {
    to = in = row.in.value(p.in_wide);
    pad = unread = is_pad(p, in);
    tokens = p.ntokens;
    if (!p.plain) {
      if (p.to) {
        to = row.to.value(p.to_wide);
        pad = pad || is_pad(p, to);
      }
      const int64_t n = row.count.value(p.counts_wide);
      tokens = n < 0 ? 0 : n > p.ntokens ? p.ntokens : int(n);
    }
    if (pad) tokens = 0;
  }

  __device__ __forceinline__ bool writes() const { return !pad && (tokens > 0 || to != in); }
};

// z / (1 + exp(-z)); what is below 2^-126 is 0.
__device__ __forceinline__ float conv_silu(float z) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(z), "f"(1.0f + exp2_fast(-z * kLog2e)));
  return y;
}

// An input as the state keeps it: its bits, where the dtype is the same.
template <class S, class X>
__device__ __forceinline__ S kept(X x) {
  if constexpr (std::is_same_v<S, X>) {
    return x;
  } else {
    return narrow<S>(widen(x));
  }
}

}  // namespace ssmk::cuda
