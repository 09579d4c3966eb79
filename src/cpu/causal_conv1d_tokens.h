// SPDX-License-Identifier: MIT
// Any run of tokens of a block of channels: what its taps see, and the two ways to walk it.
// Included by causal_conv1d.cc alone.
#pragma once

#include "cpu/causal_conv1d_groups.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

// ---- What both operations share

struct Convolution {
  View<3> x, out;  // (batch, dim, tokens)
  View<2> weight;
  View<1> bias;
  int64_t width;
  bool silu, over_time, streamed;
};

template <class Problem>
Convolution convolution(const Problem &p, int64_t tokens) {
  Convolution v;
  v.x = p.x;
  v.out = p.out;
  v.weight = p.weight;
  v.bias = p.bias;
  v.width = p.width;
  v.silu = p.activation == Activation::kSilu;
  v.over_time = p.x.stride[2] == 1 && tokens > 1 && (p.x.stride[1] != 1 || tokens >= p.dim);
  v.streamed = p.batch * p.dim * tokens * size_of(p.out.dtype) > kStreamBytes;
  return v;
}

// Channels and their weights: [width][kChannels], or [channels][width] over time.
struct Block {
  int64_t c, channels;
  alignas(64) float weight[kWidth * kChannels];
  alignas(64) float bias[kChannels];

  Block(const Convolution &v, int64_t first, int64_t last) : c(first), channels(last - first) {
    const View<2> &w = v.weight;
    char *data = w.at(c, 0);
    if (!v.over_time) {
      read_group(weight, {data, w.dtype, w.stride[0], w.stride[1]}, channels, v.width);
    } else if (w.stride[1] == 1 && w.stride[0] == v.width) {
      read_row(weight, data, w.dtype, 1, channels * v.width);
    } else {
      read_tile(weight, v.width, data, w.dtype, w.stride[0], w.stride[1], channels, v.width);
    }
    if (v.bias.given()) {
      read_row(bias, v.bias.at(c), v.bias.dtype, v.bias.stride[0], channels);
    } else {
      std::memset(bias, 0, sizeof bias);
    }
  }
};

// ---- Inputs by position

// What the taps of one sequence (with seq_idx: of one id) see.
struct Inputs {
  View<3> x;
  int64_t row, begin;  // x holds the positions from `begin` on
  View<2> ids;         // a position with another id holds nothing
  int64_t id;
  View<3> state;  // the positions before `begin`; not given: nothing
  int64_t slot, state_len;
  bool ring;  // position begin + t is state[(count + t) mod state_len], else state[state_len + t]
  int64_t count;
};

// The input at one position, of many channels; p == nullptr: zeros.
struct Source {
  const char *p = nullptr;
  DType dtype = DType::kNone;
  int64_t stride = 0;

  void read(float *dst, int64_t channels) const {
    if (p) {
      read_row(dst, p, dtype, stride, channels);
    } else {
      std::memset(dst, 0, size_t(channels) * sizeof *dst);
    }
  }
};

int64_t ring_position(int64_t count, int64_t t, int64_t state_len) {
  return (count % state_len + t % state_len + state_len) % state_len;
}

Source source(const Inputs &in, int64_t position, int64_t c) {
  if (position >= in.begin) {
    if (in.ids.given() && read_index(in.ids, in.row, position) != in.id) return {};
    return {in.x.at(in.row, c, position), in.x.dtype, in.x.stride[1]};
  }
  if (!in.state.given()) return {};
  const int64_t t = position - in.begin;
  const int64_t i = in.ring ? ring_position(in.count, t, in.state_len) : in.state_len + t;
  if (i < 0) return {};
  return {in.state.at(in.slot, c, i), in.state.dtype, in.state.stride[1]};
}

// Whether the n inputs before `position` are elements of x in a row.
bool continues(const Inputs &in, int64_t position, int64_t n) {
  if (position - n < in.begin) return false;
  for (int64_t k = 1; in.ids.given() && k <= n; ++k)
    if (read_index(in.ids, in.row, position - k) != in.id) return false;
  return true;
}

// ---- Tokens [begin, end) of a block

// Any dtypes and strides, by way of scratch.  history: [width - 1][kChannels], the inputs before
// `begin`, or nullptr if they stand in x.
void over_time_staged(const Convolution &v, const Block &block, int64_t row, int64_t c,
                      const float *history, int64_t begin, int64_t end) {
  const int64_t past = v.width - 1, stride = v.x.stride[2], size = size_of(v.x.dtype);
  const int64_t out_size = size_of(v.out.dtype);
  const float *weight = block.weight + c * v.width;
  alignas(64) float staged[kWidth - 1 + kChunk + kPair];
  alignas(64) float result[kChunk];
  int64_t n;
  for (int64_t t = begin; t < end; t += n) {
    // Results go to their place if they fill vectors there, else as far as to where they do.
    char *out = v.out.at(row, block.c + c, t);
    const int64_t ahead = v.streamed ? past_boundary(out, out_size) : 0;
    const bool here = v.out.stride[2] == 1 && end - t >= kPair && ahead == 0;
    n = min(kChunk, end - t);
    if (here) {
      n -= n % kPair;
    } else if (n == kChunk) {
      n -= ahead;
    }

    const char *x = v.x.at(row, block.c + c, t);
    if (t == begin && history) {
      for (int64_t k = 0; k < past; ++k) staged[k] = history[k * kChannels + c];
      read_row(staged + past, x, v.x.dtype, stride, n);
    } else {
      read_row(staged, x - past * stride * size, v.x.dtype, stride, past + n);
    }

    Way way{v.silu, v.streamed && here, x + n * stride * size, stride == 1 ? kLanes * size : 0};
    with_width(v.width, [&](auto w) {
      if (here) {
        with_type(v.out.dtype, [&](auto *type) {
          auto *dst = reinterpret_cast<decltype(type)>(out);
          convolve_time<w>(dst, staged, weight, block.bias[c], n, way);
        });
      } else {
        convolve_time<w>(result, staged, weight, block.bias[c], whole_pairs(n), way);
      }
    });
    if (!here) write_row(out, v.out.dtype, v.out.stride[2], result, n, v.streamed);
  }
}

// Rows of x to rows of out; n is a multiple of kPair.
void over_time_direct(const Convolution &v, const Block &block, int64_t row, int64_t c,
                      int64_t begin, int64_t n) {
  const char *x = v.x.at(row, block.c + c, begin - v.width + 1);
  char *out = v.out.at(row, block.c + c, begin);
  const float *weight = block.weight + c * v.width;
  const float bias = block.bias[c];
  const Way way{v.silu, v.streamed, x + kAhead, kLanes * size_of(v.x.dtype)};
  with_width(v.width, [&](auto w) {
    with_type(v.out.dtype, [&](auto *type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T *dst = reinterpret_cast<T *>(out);
      if constexpr (std::is_same_v<T, bf16>)
        if (v.x.dtype == DType::kBF16)
          return convolve_time<w>(dst, reinterpret_cast<const bf16 *>(x), weight, bias, n, way);
      convolve_time<w>(dst, reinterpret_cast<const float *>(x), weight, bias, n, way);
    });
  });
}

void over_time(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
               int64_t end) {
  const int64_t past = v.width - 1, out_size = size_of(v.out.dtype);
  const bool direct =
      v.x.stride[2] == 1 && v.out.stride[2] == 1 &&
      (v.x.dtype == DType::kF32 || (v.x.dtype == DType::kBF16 && v.out.dtype == DType::kBF16));
  // One input more than the taps see, for the pairs of bfloat16 begin at even lags.
  const bool continued = continues(in, begin, v.width);
  alignas(64) float history[(kWidth - 1) * kChannels];
  for (int64_t k = 0; k < past; ++k)
    source(in, begin - past + k, block.c).read(history + k * kChannels, block.channels);

  for (int64_t c = 0; c < block.channels; ++c) {
    int64_t first = end, n = 0;
    static_assert(kChunk / 2 >= kWidth + 2 * kPair, "`first` below must not pass `end`");
    if (direct && end - begin >= kChunk / 2) {
      // From where the taps stand in x, and at a boundary if need be; to the end if possible.
      first = continued ? begin : begin + v.width;
      const int64_t vector = v.streamed ? kVectorBytes / out_size : 1;
      first += (vector - past_boundary(v.out.at(in.row, block.c + c, first), out_size)) % vector;
      const int64_t rest = (end - first) % kPair;
      if (rest % vector == 0) first += rest;
      n = (end - first) / kPair * kPair;
    }
    over_time_staged(v, block, in.row, c, history, begin, first);
    if (n > 0) over_time_direct(v, block, in.row, c, first, n);
    over_time_staged(v, block, in.row, c, nullptr, first + n, end);
  }
}

// Any dtypes and strides, by way of scratch.
void over_channels_staged(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
                          int64_t end) {
  const int64_t past = v.width - 1, channels = block.channels, size = size_of(v.x.dtype);
  const int64_t step = v.x.stride[1] == 1 ? kLanes * size : 0;
  alignas(64) float staged[(kWidth - 1 + kRows) * kChannels];
  alignas(64) float result[kRows * kChannels];

  for (int64_t k = 0; k < past; ++k)
    source(in, begin - past + k, block.c).read(staged + k * kChannels, channels);
  int64_t n;
  for (int64_t t = begin; t < end; t += n) {
    n = min(kRows, end - t);
    for (int64_t k = 0; k < n; ++k)
      read_row(staged + (past + k) * kChannels, v.x.at(in.row, block.c, t + k), v.x.dtype,
               v.x.stride[1], channels);
    const Way way{v.silu, false, v.x.at(in.row, block.c, t + n), step, v.x.stride[2] * size};
    with_width(v.width, [&](auto w) {
      convolve_channels<w>(result, kChannels, staged, kChannels, block.weight, block.bias,
                           whole_pairs(channels), n, way);
    });
    for (int64_t k = 0; k < n; ++k)
      write_row(v.out.at(in.row, block.c, t + k), v.out.dtype, v.out.stride[1],
                result + k * kChannels, channels, v.streamed);
    std::memmove(staged, staged + n * kChannels, size_t(past * kChannels) * sizeof *staged);
  }
}

// Rows of x to rows of out.
void over_channels_direct(const Convolution &v, const Block &block, int64_t row, int64_t begin,
                          int64_t end) {
  const int64_t x_row = v.x.stride[2], size = size_of(v.x.dtype);
  const char *x = v.x.at(row, block.c, begin - v.width + 1);
  char *out = v.out.at(row, block.c, begin);
  const Way way{v.silu, v.streamed, v.x.at(row, block.c, begin + kGroup), kLanes * size,
                x_row * size};
  with_type(v.x.dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_width(v.width, [&](auto w) {
      convolve_channels<w>(reinterpret_cast<T *>(out), v.out.stride[2],
                           reinterpret_cast<const T *>(x), x_row, block.weight, block.bias,
                           block.channels, end - begin, way);
    });
  });
}

void over_channels(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
                   int64_t end) {
  const View<3> &x = v.x, &out = v.out;
  bool direct =
      x.dtype == out.dtype && x.stride[1] == 1 && out.stride[1] == 1 && block.channels % kPair == 0;
  if (v.streamed)  // a vector's boundary at the first row and the next is one at all
    direct = direct && past_boundary(out.at(in.row, block.c, begin), 1) == 0 &&
             past_boundary(out.at(in.row, block.c, begin + 1), 1) == 0;
  int64_t first = end;
  if (direct) first = continues(in, begin, v.width - 1) ? begin : min(begin + v.width - 1, end);
  if (begin < first) over_channels_staged(v, block, in, begin, first);
  if (first < end) over_channels_direct(v, block, in.row, first, end);
}

void convolve(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
              int64_t end) {
  if (begin < end) (v.over_time ? over_time : over_channels)(v, block, in, begin, end);
}

void zero_tokens(const Convolution &v, const Block &block, int64_t row, int64_t begin,
                 int64_t end) {
  if (v.over_time) {
    for (int64_t c = 0; c < block.channels; ++c)
      zero_row(v.out.at(row, block.c + c, begin), v.out.dtype, v.out.stride[2], end - begin);
  } else {
    for (int64_t t = begin; t < end; ++t)
      zero_row(v.out.at(row, block.c, t), v.out.dtype, v.out.stride[1], block.channels);
  }
}

// state <- the inputs before position `end`, newest last.  In place too: an element is replaced by
// one that stood at its place or later.
void shift_state(const Inputs &in, int64_t end, const View<3> &state, int64_t slot,
                 const Block &block) {
  alignas(64) float row[kChannels];
  for (int64_t i = 0; i < in.state_len; ++i) {
    source(in, end - in.state_len + i, block.c).read(row, block.channels);
    write_row(state.at(slot, block.c, i), state.dtype, state.stride[1], row, block.channels);
  }
}

}  // namespace
}  // namespace ssmk::cpu::SSMK_ISA
