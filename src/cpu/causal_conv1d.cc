// SPDX-License-Identifier: MIT
// The short causal convolution, prefill and decode.
//
//   out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})        for every channel
//
// One read of x, one write of out and a few operations between: memory bounds it.  Rows go through
// float32 scratch in L1, along whichever axis of x is packed in memory:
//   over time       one channel after the other; its taps are unaligned loads of one row
//   over channels   rows of up to kChannels channels, kGroup tokens at once so that each tap is
//   loaded once for all
// The work is cut into blocks of channels and tokens.  A block reads the width - 1 inputs before it
// again, so blocks do not depend on each other, and one long row or a few channels keep every
// thread busy.
//
// The sum runs from bias through the taps in order, one fma each, on every path: a token's bits
// depend on its inputs alone, and prefill followed by decode gives those of one long prefill.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace ssmk::cpu::SSMK_ISA {

void causal_conv1d(const CausalConv1dProblem &);
void causal_conv1d_update(const CausalConv1dUpdateProblem &);

namespace {

constexpr int kWidth = int(kMaxConvWidth);
constexpr int kGroup = 4;               // tokens (over time: vectors of them) computed side by side
constexpr int64_t kChannels = 512;      // channels of a block, at most
constexpr int64_t kChunk = 512;         // tokens staged at once, over time
constexpr int64_t kBlockTokens = 4096;  // tokens of a block, at most
constexpr int64_t kBlockElements = 65536;  // elements of a block, about: some 20 us of work
constexpr int64_t kStreamBytes =
    16 << 20;  // an output larger than this would only push everything out of the caches
constexpr int64_t kFewTokens =
    8;  // decode: states and tokens up to kWidth and this many are held in scratch
constexpr int64_t kDecodeRows = 8;  // decode: batch rows of a task, which share its staged weights

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_vectors(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// ---- The formula

// z / (1 + e^-z).
SSMK_INLINE vf activate(vf z) {
#if defined(__AVX512F__)
  // exp2() and the division would take longer than memory does for 16-bit inputs.  Here 2^(b/32 +
  // f) comes from a table of 2^(j/32) in two registers and a polynomial of degree 2 (relative error
  // 5e-8) for |f| <= 1/64.  Entry j has j << 18 taken off its bits, so that adding b << 18 puts the
  // integer part of b / 32 into the exponent.
  alignas(64) static constexpr uint32_t kRoots[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
      0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
      0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
      0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  const vf magic =
      splat(12582912.f);  // adding it rounds to an integer and leaves that in the low bits
  const __m512 low = (__m512)splat(-88.73f);  // b = 128 * 32, the bits of infinity
  const vf x = (vf)_mm512_min_ps(_mm512_max_ps((__m512)z, low), (__m512)splat(80.f));
  const vf b = fused(x, splat(-32 * kLog2e), magic);
  const vf f = fused(x, splat(-32 * kLog2e), magic - b);
  const vf root =
      (vf)_mm512_permutex2var_ps(_mm512_load_ps(kRoots), (__m512i)b, _mm512_load_ps(kRoots + 16));
  const vf power = bitcast<vf>(bitcast<vu>(root) + (bitcast<vu>(b) << 18));
  const vf p = fused(fused(f, splat(0x1.ebfbdep-13f), splat(0x1.62e584p-6f)), f, splat(1.f));
  return z / fused(p, power, splat(1.f));
#else
  // One product is enough for the exponent: its error, |z| ulp of e^-z, is below an ulp of 1 +
  // e^-z.
  return z / (exp2(z * -kLog2e) + 1.f);
#endif
}

// U vectors of tokens; src[0] is the oldest tap of the first.
template <int W, int U, bool Silu>
SSMK_INLINE void convolve_vectors(float *dst, const float *src, const vf *tap, vf bias) {
  vf sum[U];
  for (int u = 0; u < U; ++u) sum[u] = bias;
  for (int w = 0; w < W; ++w)
    for (int u = 0; u < U; ++u) sum[u] = fused(tap[w], load(src + u * kLanes + w), sum[u]);
  for (int u = 0; u < U; ++u) store(dst + u * kLanes, Silu ? activate(sum[u]) : sum[u]);
}

// n tokens of one channel, n a multiple of kLanes; src[0] is the oldest tap of the first.  `next`
// is what will be read afterwards: staging and arithmetic take turns, and the prefetches keep the
// memory busy during the latter.
template <int W, bool Silu>
void convolve_time(float *dst, const float *src, const float *weight, float bias, int64_t n,
                   const char *next, int64_t next_step) {
  vf tap[W];
  for (int w = 0; w < W; ++w) tap[w] = splat(weight[w]);
  int64_t i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    for (int u = 0; u < kGroup; ++u, next += next_step) __builtin_prefetch(next);
    convolve_vectors<W, kGroup, Silu>(dst + i, src + i, tap, splat(bias));
  }
  for (; i < n; i += kLanes) convolve_vectors<W, 1, Silu>(dst + i, src + i, tap, splat(bias));
}

// G tokens of n channels, n a multiple of kLanes: rows dst, dst + kChannels ..  src[0] is the
// oldest tap of the first token; `next` as above, with `next_row` bytes from token to token.
template <int W, int G, bool Silu>
void convolve_channels(float *dst, const float *const *src, const float *weight, const float *bias,
                       int64_t n, const char *next, int64_t next_row, int64_t next_step) {
  const float *rows[W - 1 + G];
  for (int k = 0; k < W - 1 + G; ++k) rows[k] = src[k];
  for (int64_t i = 0; i < n; i += kLanes, next += next_step) {
    vf x[W - 1 + G], sum[G];
    for (int g = 0; g < G; ++g) __builtin_prefetch(next + g * next_row);
    for (int k = 0; k < W - 1 + G; ++k) x[k] = load(rows[k] + i);
    for (int g = 0; g < G; ++g) sum[g] = load(bias + i);
    for (int w = 0; w < W; ++w) {
      const vf tap = load(weight + w * kChannels + i);
      for (int g = 0; g < G; ++g) sum[g] = fused(tap, x[w + g], sum[g]);
    }
    for (int g = 0; g < G; ++g) store(dst + g * kChannels + i, Silu ? activate(sum[g]) : sum[g]);
  }
}

using TimeKernel = void (*)(float *, const float *, const float *, float, int64_t, const char *,
                            int64_t);
using ChannelsKernel = void (*)(float *, const float *const *, const float *, const float *,
                                int64_t, const char *, int64_t, int64_t);

template <int W>
TimeKernel time_kernel(bool silu) {
  return silu ? convolve_time<W, true> : convolve_time<W, false>;
}

template <int G, int W>
ChannelsKernel channels_kernel(bool silu) {
  return silu ? convolve_channels<W, G, true> : convolve_channels<W, G, false>;
}

// f(width as a constant).
template <class F>
auto with_width(int64_t width, F &&f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// ---- Planes: a few numbers per channel, as rows of kChannels floats

// Element K of each of kLanes channels, out of S vectors that hold S elements of each channel in
// turn.
template <int S, int K, int J = 1, int... L>
SSMK_INLINE vf plane(const vf *r, vf v, std::integer_sequence<int, L...> lanes) {
  if constexpr (J == S) {
    return v;
  } else {
    v = __builtin_shufflevector(v, r[J],
                                ((L * S + K) / kLanes == J ? kLanes + (L * S + K) % kLanes
                                 : J == 1 && (L * S + K) / kLanes == 0 ? L * S + K
                                                                       : L)...);
    return plane<S, K, J + 1>(r, v, lanes);
  }
}

// The inverse: vector V of those S vectors, out of S planes.
template <int S, int V, int J = 1, int... L>
SSMK_INLINE vf interleaved(const vf *r, vf v, std::integer_sequence<int, L...> lanes) {
  if constexpr (J == S) {
    return v;
  } else {
    v = __builtin_shufflevector(v, r[J],
                                ((V * kLanes + L) % S == J ? kLanes + (V * kLanes + L) / S
                                 : J == 1 && (V * kLanes + L) % S == 0 ? (V * kLanes + L) / S
                                                                       : L)...);
    return interleaved<S, V, J + 1>(r, v, lanes);
  }
}

template <int S, int... K>
void split_planes(float *planes, const float *flat, int64_t channels,
                  std::integer_sequence<int, K...>) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const vf r[S] = {load(flat + c * S + K * kLanes)...};
    (store(planes + K * kChannels + c, plane<S, K>(r, r[0], LaneSequence{})), ...);
  }
}

template <int S, int... K>
void join_planes(float *flat, const float *planes, int64_t channels,
                 std::integer_sequence<int, K...>) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const vf r[S] = {load(planes + K * kChannels + c)...};
    (store(flat + c * S + K * kLanes, interleaved<S, K>(r, r[0], LaneSequence{})), ...);
  }
}

// Planes 0 .. count-1 <- elements `stride` apart of channels `channel_stride` apart.
void read_planes(float *planes, const char *src, DType dtype, int64_t channel_stride,
                 int64_t stride, int64_t channels, int64_t count) {
  if (stride == 1 && channel_stride == count && count >= 2 && count <= kWidth) {
    alignas(64) float flat[kWidth * kChannels];
    read_row(flat, src, dtype, 1, channels * count);
    with_width(count, [&](auto s) {
      split_planes<s>(planes, flat, channels, std::make_integer_sequence<int, s>{});
    });
  } else {
    for (int64_t k = 0; k < count; ++k)
      read_row(planes + k * kChannels, src + k * stride * size_of(dtype), dtype, channel_stride,
               channels);
  }
}

void write_planes(char *dst, DType dtype, int64_t channel_stride, int64_t stride,
                  const float *planes, int64_t channels, int64_t count) {
  if (stride == 1 && channel_stride == count && count >= 2 && count <= kWidth) {
    alignas(64) float flat[kWidth * kChannels];
    with_width(count, [&](auto s) {
      join_planes<s>(flat, planes, channels, std::make_integer_sequence<int, s>{});
    });
    write_row(dst, dtype, 1, flat, channels * count);
  } else {
    for (int64_t k = 0; k < count; ++k)
      write_row(dst + k * stride * size_of(dtype), dtype, channel_stride, planes + k * kChannels,
                channels);
  }
}

// ---- What both operations share

struct Convolution {
  View<3> x, out;  // (batch, dim, tokens)
  View<2> weight;
  View<1> bias;
  int64_t dim, width;
  bool silu, over_time, streamed;
};

template <class Problem>
Convolution convolution(const Problem &p, int64_t tokens) {
  Convolution v;
  v.x = p.x;
  v.out = p.out;
  v.weight = p.weight;
  v.bias = p.bias;
  v.dim = p.dim;
  v.width = p.width;
  v.silu = p.activation == Activation::kSilu;
  v.over_time = p.x.stride[2] == 1 && (p.x.stride[1] != 1 || tokens >= p.dim) && tokens > 1;
  v.streamed = p.batch * p.dim * tokens * size_of(p.out.dtype) > kStreamBytes;
  return v;
}

// A block of channels with its weights: [width][kChannels], or over time [channels][width].
struct Block {
  int64_t c, channels;
  alignas(64) float weight[kWidth * kChannels];
  alignas(64) float bias[kChannels];

  Block(const Convolution &v, int64_t first, int64_t last) : c(first), channels(last - first) {
    const char *w = v.weight.at(c, 0);
    if (!v.over_time) {
      read_planes(weight, w, v.weight.dtype, v.weight.stride[0], v.weight.stride[1], channels,
                  v.width);
    } else if (v.weight.stride[1] == 1 && v.weight.stride[0] == v.width) {
      read_row(weight, w, v.weight.dtype, 1, channels * v.width);
    } else {
      read_tile(weight, v.width, w, v.weight.dtype, v.weight.stride[0], v.weight.stride[1],
                channels, v.width);
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
  bool ring;  // position begin + t stands at state[(count + t) mod state_len], else at
              // state[state_len + t]
  int64_t count;
};

// The input at one position, for many channels; p == nullptr: zeros.
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

// ---- Tokens [begin, end) of a block's channels

void over_time(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
               int64_t end) {
  const TimeKernel kernel = with_width(v.width, [&](auto w) { return time_kernel<w>(v.silu); });
  const int64_t past = v.width - 1, size = size_of(v.x.dtype), stride = v.x.stride[2];
  const bool direct = v.x.dtype == DType::kF32 && stride == 1;
  const int64_t next_step = stride == 1 ? kLanes * size : 0;
  alignas(64) float history[(kWidth - 1) * kChannels];
  alignas(64) float staged[kWidth - 1 + kChunk + kLanes];
  alignas(64) float result[kChunk];

  const bool continued = continues(in, begin, past);
  for (int64_t k = 0; !continued && k < past; ++k)
    source(in, begin - past + k, block.c).read(history + k * kChannels, block.channels);

  for (int64_t c = 0; c < block.channels; ++c) {
    const char *x = v.x.at(in.row, block.c + c, 0);
    int64_t n;
    for (int64_t t = begin; t < end; t += n) {
      n = min(kChunk, end - t);

      const float *src = staged;
      const char *first = x + (t - past) * stride * size;
      const char *next = x + (t + n) * stride * size;
      if (t == begin && !continued) {
        for (int64_t k = 0; k < past; ++k) staged[k] = history[k * kChannels + c];
        read_row(staged + past, x + t * stride * size, v.x.dtype, stride, n);
      } else if (direct && n >= kLanes) {
        n -= n % kLanes;
        src = reinterpret_cast<const float *>(first);
      } else {
        read_row(staged, first, v.x.dtype, stride, n + past);
      }

      kernel(result, src, block.weight + c * v.width, block.bias[c], whole_vectors(n), next,
             next_step);
      write_row(v.out.at(in.row, block.c + c, t), v.out.dtype, v.out.stride[2], result, n,
                v.streamed);
    }
  }
}

void over_channels(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
                   int64_t end) {
  ChannelsKernel group, single;
  with_width(v.width, [&](auto w) {
    group = channels_kernel<kGroup, w>(v.silu);
    single = channels_kernel<1, w>(v.silu);
  });
  const int64_t past = v.width - 1, channels = block.channels, padded = whole_vectors(channels);
  const bool direct = v.x.dtype == DType::kF32 && v.x.stride[1] == 1 && channels == padded;
  const int64_t size = size_of(v.x.dtype), next_step = v.x.stride[1] == 1 ? kLanes * size : 0;

  // As many rows as are in use at once, handed out in turn.
  alignas(64) float staged[(kWidth - 1 + kGroup) * kChannels];
  alignas(64) float result[kGroup * kChannels];
  const int64_t nrows = past + kGroup;
  int64_t row = 0;
  const auto input = [&](int64_t position) -> const float * {
    const Source s = source(in, position, block.c);
    if (direct && s.p && position >= in.begin) return reinterpret_cast<const float *>(s.p);
    float *r = staged + row * kChannels;
    row = row + 1 == nrows ? 0 : row + 1;
    s.read(r, channels);
    return r;
  };

  const float *src[kWidth - 1 + kGroup];
  for (int64_t k = 0; k < past; ++k) src[k] = input(begin - past + k);
  int64_t n;
  for (int64_t t = begin; t < end; t += n) {
    n = min(kGroup, end - t);
    for (int64_t g = 0; g < n; ++g) src[past + g] = input(t + g);
    const char *next = v.x.at(in.row, block.c, t + n);
    if (n == kGroup) {
      group(result, src, block.weight, block.bias, padded, next, v.x.stride[2] * size, next_step);
    } else {
      for (int64_t g = 0; g < n; ++g)
        single(result + g * kChannels, src + g, block.weight, block.bias, padded, next, 0,
               next_step);
    }
    for (int64_t g = 0; g < n; ++g)
      write_row(v.out.at(in.row, block.c, t + g), v.out.dtype, v.out.stride[1],
                result + g * kChannels, channels, v.streamed);
    for (int64_t k = 0; k < past; ++k) src[k] = src[k + n];
  }
}

void convolve(const Convolution &v, const Block &block, const Inputs &in, int64_t begin,
              int64_t end) {
  if (begin >= end) return;
  (v.over_time ? over_time : over_channels)(v, block, in, begin, end);
}

void zero_tokens(const Convolution &v, int64_t c, int64_t channels, int64_t row, int64_t begin,
                 int64_t end) {
  if (v.over_time) {
    for (int64_t k = 0; k < channels; ++k)
      zero_row(v.out.at(row, c + k, begin), v.out.dtype, v.out.stride[2], end - begin);
  } else {
    for (int64_t t = begin; t < end; ++t)
      zero_row(v.out.at(row, c, t), v.out.dtype, v.out.stride[1], channels);
  }
}

// state <- the inputs before position `end`, newest last.  In place too: element i takes one that
// stood at i or later.
void shift_state(const Inputs &in, int64_t end, const View<3> &state, int64_t slot, int64_t c,
                 int64_t channels) {
  alignas(64) float row[kChannels];
  for (int64_t i = 0; i < in.state_len; ++i) {
    source(in, end - in.state_len + i, c).read(row, channels);
    write_row(state.at(slot, c, i), state.dtype, state.stride[1], row, channels);
  }
}

// ---- Prefill

struct Prefill {
  const CausalConv1dProblem &p;
  Convolution v;
  int64_t block_channels, channel_blocks, channel_shift;
  int64_t block_tokens, token_blocks;
};

// The first of n ascending values that is at least `least`.
int64_t lower_bound(const View<1> &values, int64_t n, int64_t least) {
  int64_t lo = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (read_index(values, lo + half) < least) {
      lo += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return lo;
}

Inputs inputs_of(const CausalConv1dProblem &p, const Sequence &q) {
  Inputs in{p.x, q.row, q.begin, p.seqs.seq_idx, 0, {}, q.slot, p.state_len, false, 0};
  if (q.has_initial) in.state = p.initial_states;
  return in;
}

// One past the last position before `end` of the run of tokens that starts at t: those with one id,
// or those of pads.
int64_t run_end(const View<2> &ids, int64_t row, int64_t t, int64_t end) {
  const int64_t id = read_index(ids, row, t);
  do {
    ++t;
  } while (t < end && (id < 0 ? read_index(ids, row, t) < 0 : read_index(ids, row, t) == id));
  return t;
}

// The first real token at or after t, or `end`.
int64_t first_real(const View<2> &ids, int64_t row, int64_t t, int64_t end) {
  while (t < end && read_index(ids, row, t) < 0) ++t;
  return t;
}

// Tokens [begin, end) of a row that seq_idx cuts up.
void convolve_runs(const Prefill &f, const Block &block, const Sequence &q, int64_t begin,
                   int64_t end) {
  const View<2> &ids = f.p.seqs.seq_idx;
  const int64_t first = first_real(ids, q.row, 0, end);
  for (int64_t t = begin, stop; t < end; t = stop) {
    stop = run_end(ids, q.row, t, end);
    Inputs in = inputs_of(f.p, q);
    in.id = read_index(ids, q.row, t);
    if (in.id < 0) {
      zero_tokens(f.v, block.c, block.channels, q.row, t, stop);
      continue;
    }
    if (in.id != read_index(ids, q.row, first)) in.state = {};
    convolve(f.v, block, in, t, stop);
  }
}

// The state after the last token; after the last real one if there are pads.
void finish_sequence(const Prefill &f, const Block &block, const Sequence &q) {
  Inputs in = inputs_of(f.p, q);
  int64_t end = q.end;
  if (in.ids.given()) {
    while (end > q.begin && read_index(in.ids, q.row, end - 1) < 0) --end;
    if (end > q.begin) {
      in.id = read_index(in.ids, q.row, end - 1);
      if (in.id != read_index(in.ids, q.row, first_real(in.ids, q.row, q.begin, end)))
        in.state = {};
    }
  }
  shift_state(in, end, f.p.final_states, q.slot, block.c, block.channels);
}

// The part of one sequence that lies in tokens [t0, t1).  The block in which a sequence begins also
// takes its first width - 1 tokens, the only ones that see the initial state, and stores the final
// state: so that may be the same memory.
void convolve_sequence(const Prefill &f, const Block &block, const Sequence &q, int64_t t0,
                       int64_t t1) {
  const auto edge = [&](int64_t t) {
    return t <= q.begin ? q.begin : min(q.end, max(t, q.begin + f.p.width - 1));
  };
  const int64_t begin = edge(t0), end = edge(t1);
  if (q.pad) {
    zero_tokens(f.v, block.c, block.channels, q.row, begin, end);
    return;
  }
  if (f.p.seqs.seq_idx.given()) {
    convolve_runs(f, block, q, begin, end);
  } else {
    convolve(f.v, block, inputs_of(f.p, q), begin, end);
  }
  if (f.p.final_states.given() && q.begin >= t0) finish_sequence(f, block, q);
}

void prefill_block(void *context, int64_t task) {
  const Prefill &f = *static_cast<const Prefill *>(context);
  const CausalConv1dProblem &p = f.p;

  // Neighbours in memory are neighbours in time.
  const int64_t inner = f.v.over_time ? f.token_blocks : f.channel_blocks;
  const int64_t outer = f.v.over_time ? f.channel_blocks : f.token_blocks;
  const int64_t i = task % inner, o = task / inner % outer, row = task / inner / outer;
  const int64_t cb = f.v.over_time ? o : i, tb = f.v.over_time ? i : o;
  const int64_t c0 = max(cb * f.block_channels - f.channel_shift, 0);
  const int64_t c1 = min((cb + 1) * f.block_channels - f.channel_shift, p.dim);
  const int64_t t0 = tb * f.block_tokens;
  const bool last = tb + 1 == f.token_blocks;
  const int64_t t1 = last ? p.seqlen : t0 + f.block_tokens;

  const Block block(f.v, c0, c1);
  if (!p.seqs.cu_seqlens.given()) {
    convolve_sequence(f, block, sequence(p.seqs, row, p.seqlen), t0, t1);
  } else {
    int64_t s = lower_bound(p.seqs.cu_seqlens, p.seqs.nseq, t0);
    if (s > 0 && read_index(p.seqs.cu_seqlens, s) > t0) --s;  // it began in an earlier block
    for (; s < p.seqs.nseq; ++s) {
      const Sequence q = sequence(p.seqs, s, p.seqlen);
      if (q.begin >= t1 && !last) break;
      convolve_sequence(f, block, q, t0, t1);
    }
  }
  if (f.v.streamed) stream_fence();
}

// ---- Decode

struct Decode {
  const CausalConv1dUpdateProblem &p;
  Convolution v;
  int64_t channel_blocks;
  bool few;  // state and tokens fit in the scratch of decode_few()
};

// One row of a decode call.
struct Step {
  int64_t row, tokens, read_slot, write_slot, count;
  bool pad;
};

Step step_of(const CausalConv1dUpdateProblem &p, int64_t row) {
  Step s;
  s.row = row;
  s.tokens = p.num_tokens.given() ? read_index(p.num_tokens, row) : p.ntokens;
  s.read_slot = p.state_indices.given() ? read_index(p.state_indices, row) : row;
  s.write_slot = p.state_indices_out.given() ? read_index(p.state_indices_out, row) : s.read_slot;
  s.count = p.cache_seqlens.given() ? read_index(p.cache_seqlens, row) : 0;
  s.pad = (p.state_indices.given() && p.pad.is_pad(s.read_slot)) ||
          (p.state_indices_out.given() && p.pad.is_pad(s.write_slot));
  return s;
}

// State and tokens side by side in scratch, whatever their layout: planes 0 .. state_len-1 and
// those after them.
void decode_few(const Decode &d, const Block &block, const Step &s) {
  const CausalConv1dUpdateProblem &p = d.p;
  const View<3> &state = p.conv_state;
  const int64_t past = p.width - 1, channels = block.channels, padded = whole_vectors(channels);
  const bool ring = p.cache_seqlens.given();
  alignas(64) float window[(kWidth + kFewTokens) * kChannels];
  alignas(64) float result[kFewTokens * kChannels];

  // inputs
  read_planes(window, state.at(s.read_slot, block.c, 0), state.dtype, state.stride[1],
              state.stride[2], channels, p.state_len);
  read_planes(window + p.state_len * kChannels, p.x.at(s.row, block.c, 0), p.x.dtype, p.x.stride[1],
              p.x.stride[2], channels, s.tokens);

  // outputs
  const float *src[kWidth - 1 + kFewTokens];
  const char *next = state.at(s.read_slot, block.c, 0);
  for (int64_t k = 0; k < past; ++k)
    src[k] =
        window +
        (ring ? ring_position(s.count, k - past, p.state_len) : p.state_len + k - past) * kChannels;
  for (int64_t t = 0; t < s.tokens; ++t) src[past + t] = window + (p.state_len + t) * kChannels;
  with_width(p.width, [&](auto w) {
    int64_t t = 0;
    for (; t + kGroup <= s.tokens; t += kGroup)
      channels_kernel<kGroup, w>(d.v.silu)(result + t * kChannels, src + t, block.weight,
                                           block.bias, padded, next, 0, 0);
    for (; t < s.tokens; ++t)
      channels_kernel<1, w>(d.v.silu)(result + t * kChannels, src + t, block.weight, block.bias,
                                      padded, next, 0, 0);
  });
  write_planes(p.out.at(s.row, block.c, 0), p.out.dtype, p.out.stride[1], p.out.stride[2], result,
               channels, s.tokens);

  // state
  if (s.tokens == 0 && s.read_slot == s.write_slot) return;
  float *after = window;
  if (!ring) {
    after += s.tokens * kChannels;
  } else {
    for (int64_t t = max(0, s.tokens - p.state_len); t < s.tokens; ++t)
      std::memcpy(window + ring_position(s.count, t, p.state_len) * kChannels, src[past + t],
                  kChannels * sizeof(float));
  }
  write_planes(state.at(s.write_slot, block.c, 0), state.dtype, state.stride[1], state.stride[2],
               after, channels, p.state_len);
}

// States and token counts of any size: a prefill of one sequence, whose state is the slot.
void decode_many(const Decode &d, const Block &block, const Step &s) {
  const CausalConv1dUpdateProblem &p = d.p;
  const bool ring = p.cache_seqlens.given();
  const Inputs in{p.x, s.row, 0, {}, 0, p.conv_state, s.read_slot, p.state_len, ring, s.count};
  convolve(d.v, block, in, 0, s.tokens);
  if (!ring) {
    shift_state(in, s.tokens, p.conv_state, s.write_slot, block.c, block.channels);
    return;
  }
  alignas(64) float row[kChannels];
  const View<3> &state = p.conv_state;
  const auto copy = [&](int64_t position, int64_t to) {
    source(in, position, block.c).read(row, block.channels);
    write_row(state.at(s.write_slot, block.c, to), state.dtype, state.stride[1], row,
              block.channels);
  };
  for (int64_t k = 1; k <= p.state_len && s.write_slot != s.read_slot; ++k)
    copy(-k, ring_position(s.count, -k, p.state_len));
  for (int64_t t = max(0, s.tokens - p.state_len); t < s.tokens; ++t)
    copy(t, ring_position(s.count, t, p.state_len));
}

void decode_block(void *context, int64_t task) {
  const Decode &d = *static_cast<const Decode *>(context);
  const int64_t c0 = task % d.channel_blocks * kChannels,
                b0 = task / d.channel_blocks * kDecodeRows;
  const Block block(d.v, c0, min(c0 + kChannels, d.p.dim));
  for (int64_t b = b0; b < min(b0 + kDecodeRows, d.p.batch); ++b) {
    const Step s = step_of(d.p, b);
    zero_tokens(d.v, block.c, block.channels, b, s.pad ? 0 : s.tokens, d.p.ntokens);
    if (s.pad) continue;
    (d.few ? decode_few : decode_many)(d, block, s);
  }
  if (d.v.streamed) stream_fence();
}

}  // namespace

void causal_conv1d(const CausalConv1dProblem &p) {
  if (p.batch == 0 || p.dim == 0) return;
  Prefill f{p, convolution(p, p.seqlen), 0, 0, 0, 0, 0};

  // blocks
  if (f.v.over_time) {
    f.block_tokens = kBlockTokens;
    f.block_channels = min(max(kBlockElements / min(p.seqlen, kBlockTokens), 1), kChannels);
  } else {
    // Rows of all blocks but the first begin at a cache line, if the rows of the whole tensor allow
    // it.
    f.block_channels = kChannels;
    f.block_tokens = min(max(kBlockElements / min(p.dim, kChannels), 16), kBlockTokens);
    if (f.v.out.stride[1] == 1)
      f.channel_shift =
          int64_t(reinterpret_cast<uintptr_t>(f.v.out.data) % 64) / size_of(f.v.out.dtype);
  }
  f.channel_blocks = ceil_div(p.dim + f.channel_shift, f.block_channels);
  f.token_blocks = max(ceil_div(p.seqlen, f.block_tokens), 1);
  parallel_for(p.batch * f.channel_blocks * f.token_blocks,
               p.batch * p.dim * max(p.seqlen, p.state_len), prefill_block, &f);
}

void causal_conv1d_update(const CausalConv1dUpdateProblem &p) {
  if (p.batch == 0 || p.dim == 0) return;
  Decode d{p, convolution(p, p.ntokens), ceil_div(p.dim, kChannels),
           p.state_len <= kWidth && p.ntokens <= kFewTokens};
  if (d.few) d.v.over_time = false;
  parallel_for(ceil_div(p.batch, kDecodeRows) * d.channel_blocks,
               p.batch * p.dim * (p.ntokens + (d.few ? p.state_len : p.width)), decode_block, &d);
}

}  // namespace ssmk::cpu::SSMK_ISA
