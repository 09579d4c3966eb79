// SPDX-License-Identifier: MIT
// The convolution's decode step on packed tensors: a thread takes C neighbouring channels.
//
// x and out have the dtype X, the state S (X or float32), weight and bias W (X or float32).  Values
// stay 32-bit words until they are used: taken apart into 16-bit ones sooner, they make each load
// wait for the one before it.  A state of kLength inputs a channel is C * kLength of them in
// sequence, channel by channel (kByChannel), or kLength runs of C, input by input.  Channel by
// channel, a warp's states are one run of memory, which it reads and writes lane by lane and sorts
// out in shared memory.
//
// Nothing waits for a slot.  Before the kernel waits for those before it, it looks at the slot's
// index, loads from what the index names as soon as it may, and looks at the index again when all
// loads are under way; should it have changed by then, the state is loaded anew.
#pragma once

#include "cuda/causal_conv1d_update_call.cuh"

namespace ssmk::cuda {

constexpr int kLanes = 32;
constexpr int kPackedRows = 4;  // of the batch in a block, a warp each

// N words side by side, aligned to as many bytes as divide them, up to 16.
template <int N>
constexpr int kWordsAtOnce = N % 4 == 0   ? 4
                             : N % 2 == 0 ? 2
                                          : 1;

template <bool kOnce, int N>
__device__ __forceinline__ void load_words(const void *p, uint32_t *to) {
  constexpr int kStep = kWordsAtOnce<N>;
  using Word = typename Word<4 * kStep>::type;
#pragma unroll
  for (int i = 0; i < N / kStep; ++i) {
    const Word *const from = static_cast<const Word *>(p) + i;
    const Word word = load_word<kOnce>(from);
    memcpy(to + i * kStep, &word, sizeof(word));
  }
}

template <bool kOnce, int N>
__device__ __forceinline__ void store_words(void *p, const uint32_t *from) {
  constexpr int kStep = kWordsAtOnce<N>;
  using Word = typename Word<4 * kStep>::type;
#pragma unroll
  for (int i = 0; i < N / kStep; ++i) {
    Word word;
    memcpy(&word, from + i * kStep, sizeof(word));
    store_word<kOnce>(static_cast<Word *>(p) + i, word);
  }
}

// Element i of packed ones.
template <class T>
__device__ __forceinline__ float element(const uint32_t *words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(uint16_t(words[i / 2] >> (i % 2 * 16))));
  } else {
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
}

// Half `lo` of a and half `hi` of b as one word.
__device__ __forceinline__ uint32_t join_halves(uint32_t a, int lo, uint32_t b, int hi) {
  return __byte_perm(a, b, (lo ? 0x0032 : 0x0010) | (hi ? 0x7600 : 0x5400));
}

// Two values rounded, as one word.
template <class T>
__device__ __forceinline__ uint32_t narrow_two(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(a, b);
    memcpy(&word, &two, sizeof(word));
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    memcpy(&word, &two, sizeof(word));
  }
  return word;
}

// N rows of N elements as columns, in place.
template <class T, int N>
__device__ __forceinline__ void transpose(uint32_t *words) {
  constexpr int kOf = 4 / int(sizeof(T));  // elements of a word
  uint32_t to[N * N / kOf];
#pragma unroll
  for (int w = 0; w < N * N / kOf; ++w) {
    const int column = w * kOf / N, row = w * kOf % N;
    const int a = row * N + column, b = a + N;
    if constexpr (kOf == 1) {
      to[w] = words[a];
    } else {
      to[w] = join_halves(words[a / 2], a % 2, words[b / 2], b % 2);
    }
  }
#pragma unroll
  for (int w = 0; w < N * N / kOf; ++w) words[w] = to[w];
}

// kLength inputs of C channels in words, and where a warp keeps them in shared memory: a lane's at
// an odd distance from the next one's, in parts of C values, so that access both lane by lane and
// part by part meets no bank twice.
template <class S, int kLength, bool kByChannel, int C>
struct ConvState {
  static constexpr int kPart = C * int(sizeof(S)) / 4, kWords = kLength * kPart;
  static constexpr bool kSorted = kByChannel && kLength > 1;
  static constexpr int kApart = (kLength | 1) * kPart;
  static constexpr int kShared = kSorted ? kLanes * kApart : 4;
  uint32_t words[kWords];

  // Where input i of channel c is.
  static __device__ constexpr int place(int c, int i) {
    return kByChannel ? c * kLength + i : i * C + c;
  }
  // Part i of the run that the warp's lanes read together.
  static __device__ __forceinline__ int part(int i) { return i * kLanes + threadIdx.x; }
  static __device__ __forceinline__ uint32_t *of_part(uint32_t *shared, int i) {
    const int at = part(i);
    if (kLength % 2) return shared + at * kPart;
    return shared + at / kLength * kApart + at % kLength * kPart;
  }

  // From what the warp has read to each lane's own.
  __device__ __forceinline__ void sort(uint32_t *shared) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      store_words<false, kPart>(of_part(shared, i), words + i * kPart);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      load_words<false, kPart>(shared + threadIdx.x * kApart + i * kPart, words + i * kPart);
  }
  __device__ __forceinline__ void unsort(uint32_t *shared) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      store_words<false, kPart>(shared + threadIdx.x * kApart + i * kPart, words + i * kPart);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      load_words<false, kPart>(of_part(shared, i), words + i * kPart);
  }

  // The oldest input goes, x comes.
  template <class X>
  __device__ __forceinline__ void push(const uint32_t *x) {
    uint32_t next[kWords];
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int i = 0; i < kLength; ++i)
          next[place(c, i)] =
              i + 1 < kLength ? words[place(c, i + 1)] : __float_as_uint(element<X>(x, c));
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t from[2];
        int half[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int e = 2 * w + h;
          const int c = kByChannel ? e / kLength : e % C, i = kByChannel ? e % kLength : e / C;
          const int at = i + 1 < kLength ? place(c, i + 1) : c;
          from[h] = i + 1 < kLength ? words[at / 2] : x[at / 2];
          half[h] = at % 2;
        }
        next[w] = join_halves(from[0], half[0], from[1], half[1]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = next[w];
  }
};

// Blocks on a multiprocessor, as far as the words that a thread holds leave room for them.
constexpr int packed_blocks(int words, int tokens) {
  return tokens > 1 || words > 36 ? 1 : words > 24 ? 7 : 8;
}

// kTokens: how many are loaded at a time; 1: there is no more than one.
template <class X, class S, class W, int kWidth, int kLength, bool kByChannel, int C, int kTokens>
__global__ void __launch_bounds__(
    kPackedRows *kLanes,
    packed_blocks(C *int(kLength * sizeof(S) + (kWidth + 1) * sizeof(W) + sizeof(X)) / 4, kTokens))
    packed_step(const __grid_constant__ ConvUpdateCall p) {
  using State = ConvState<S, kLength, kByChannel, C>;
  constexpr int kIn = C * int(sizeof(X)) / 4, kBias = C * int(sizeof(W)) / 4;  // words
  __shared__ __align__(16) uint32_t shared[State::kSorted ? kPackedRows : 1][State::kShared];
  start_next();
  const int row = blockIdx.y * blockDim.y + threadIdx.y, lane = threadIdx.x;
  if (row >= p.batch) return;  // a whole warp
  const int c0 = blockIdx.x * (kLanes * C);
  const bool mine = c0 + lane * C < p.dim;         // dim is a multiple of C
  const int c = mine ? c0 + lane * C : p.dim - C;  // what is nobody's is read twice
  const int parts = min(kLanes * C, p.dim - c0) / C * kLength;

  const char *const weight_at = p.weight + int64_t(c) * (kWidth * int(sizeof(W)));
  const char *const bias_at = p.bias + int64_t(c) * int(sizeof(W));
  const char *const x_at = p.x + row * p.x_row + int64_t(c) * p.x_channel;
  uint32_t first[kLength];  // of each part, from the start of the slot
#pragma unroll
  for (int i = 0; i < kLength; ++i) {
    constexpr int kBytes = 4 * State::kPart;
    if (State::kSorted) {
      first[i] = uint32_t(c0 / C * kLength + min(State::part(i), parts - 1)) * kBytes;
    } else {
      first[i] = uint32_t(c) * (kByChannel ? kLength : 1) * int(sizeof(S));
      if (!kByChannel) first[i] += i * uint32_t(p.state_input);
    }
  }

  const Index seen = index_at(p.in, p.in_step, p.in_wide, row, row);
  int64_t guess = seen.value(p.in_wide);
  if (is_pad(p, guess)) guess = 0;  // there is one slot at least
  if (p.ahead) {
    fetch(weight_at);
    if (kWidth * kBias > 8) fetch(weight_at + 32);
    if (p.bias) fetch(bias_at);
    fetch(x_at);
#pragma unroll
    for (int i = 0; i < kLength; ++i) fetch(p.state + guess * p.slot + first[i]);
  }
  wait_for_previous();

  State state;
  uint32_t x[kTokens * kIn], weight[kWidth * kBias], bias[kBias] = {};
  const auto load_state = [&](int64_t slot) {
    const char *const from = p.state + slot * p.slot;
#pragma unroll
    for (int i = 0; i < kLength; ++i)
      load_words<true, State::kPart>(from + first[i], state.words + i * State::kPart);
  };
  constexpr bool kQuads = kTokens > 1 && kTokens == C;
  const auto load_tokens = [&](int t0) {
    if (kQuads && p.quads) {
#pragma unroll
      for (int j = 0; j < C; ++j)
        load_words<true, kIn>(x_at + int64_t(j) * p.x_channel + t0 * int(sizeof(X)), x + j * kIn);
      return;
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u)
      if (kTokens == 1 || t0 + u < p.ntokens)
        load_words<true, kIn>(x_at + int64_t(t0 + u) * p.x_token, x + u * kIn);
  };
  load_state(guess);
  load_tokens(0);
  load_words<false, kWidth * kBias>(weight_at, weight);
  if (p.bias) load_words<false, kBias>(bias_at, bias);
  ConvRow indices;
  indices.read(p, row);
  const ConvStep step(p, indices);
  for (;;) {  // twice if the slot was another one
    if constexpr (State::kSorted) state.sort(shared[threadIdx.y]);
    if (step.unread || guess == step.in) break;
    guess = step.in;
    load_state(guess);
  }

  // The taps, and of each channel the inputs before the next token
  float taps[C][kWidth], window[C][kWidth];
#pragma unroll
  for (int j = 0; j < C; ++j) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) taps[j][k] = element<W>(weight, j * kWidth + k);
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k)
      window[j][k] = element<S>(state.words, State::place(j, kLength - (kWidth - 1) + k));
  }
  char *const out_at = p.out + row * p.out_row + int64_t(c) * p.out_channel;
  for (int t0 = 0; t0 < (kTokens == 1 ? 1 : p.ntokens); t0 += kTokens) {
    if (kTokens > 1 && t0 > 0) load_tokens(t0);
    if (kQuads && p.quads) transpose<X, C>(x);
    uint32_t y[kTokens * kIn] = {};
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (t0 + u >= step.tokens) break;
      const uint32_t *const now = x + u * kIn;
      float sum[C];
#pragma unroll
      for (int j = 0; j < C; ++j) {
        window[j][kWidth - 1] = element<X>(now, j);
        sum[j] = element<W>(bias, j);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[j] = fmaf(taps[j][k], window[j][k], sum[j]);
#pragma unroll
        for (int k = 0; k + 1 < kWidth; ++k) window[j][k] = window[j][k + 1];
      }
      if (p.silu) {
#pragma unroll
        for (int j = 0; j < C; ++j) sum[j] = conv_silu(sum[j]);
      }
#pragma unroll
      for (int k = 0; k < kIn; ++k) {
        if constexpr (sizeof(X) == 4) {
          y[u * kIn + k] = __float_as_uint(sum[k]);
        } else {
          y[u * kIn + k] = narrow_two<X>(sum[2 * k], sum[2 * k + 1]);
        }
      }
      state.template push<X>(now);
    }
    if (kQuads && p.quads) {
      transpose<X, C>(y);
#pragma unroll
      for (int j = 0; j < C; ++j)
        if (mine)
          store_words<true, kIn>(out_at + int64_t(j) * p.out_channel + t0 * int(sizeof(X)),
                                 y + j * kIn);
      continue;
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u)
      if (mine && (kTokens == 1 || t0 + u < p.ntokens))
        store_words<true, kIn>(out_at + int64_t(t0 + u) * p.out_token, y + u * kIn);
  }

  if (!step.writes()) return;
  char *const to = p.state + step.to * p.slot;
  if constexpr (State::kSorted) state.unsort(shared[threadIdx.y]);
#pragma unroll
  for (int i = 0; i < kLength; ++i)
    if (State::kSorted ? State::part(i) < parts : mine)
      store_words<true, State::kPart>(to + first[i], state.words + i * State::kPart);
}

}  // namespace ssmk::cuda
