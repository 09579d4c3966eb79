// SPDX-License-Identifier: MIT
// A few numbers per channel (weights, states, tokens of a decode call) as rows of channels.
// Included by causal_conv1d.cc alone.
#pragma once

#include "cpu/causal_conv1d_formula.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

// ---- Groups: a few numbers per channel, in scratch as rows of kChannels

// Numbers `step` elements apart, of channels `channel` elements apart.
struct Group {
  char *data;
  DType dtype;
  int64_t channel, step;

  char *at(int64_t c, int64_t k) const { return data + (c * channel + k * step) * size_of(dtype); }
  // Packed groups are read as one row and taken apart in registers.
  bool packed(int64_t count) const {
    return step == 1 && channel == count && count >= 2 && count <= kWidth;
  }
};

template <int Write>
void prefetch(const char *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, Write);
}

// Number K of each of kLanes channels, out of S vectors that hold the S numbers of each in turn.
template <int S, int K, int J = 1, int... L>
SSMK_INLINE vf split(const vf *r, vf v, std::integer_sequence<int, L...> lanes) {
  if constexpr (J == S) {
    return v;
  } else {
    // From vector J what it has; at J = 1 also what vector 0 has, which v still is.
    constexpr auto lane = [](int l) {
      const int i = l * S + K;
      return i / kLanes == J ? kLanes + i % kLanes : J == 1 && i < kLanes ? i : l;
    };
    v = __builtin_shufflevector(v, r[J], lane(L)...);
    return split<S, K, J + 1>(r, v, lanes);
  }
}

// The inverse: vector V, out of the rows of S numbers.
template <int S, int V, int J = 1, int... L>
SSMK_INLINE vf join(const vf *r, vf v, std::integer_sequence<int, L...> lanes) {
  if constexpr (J == S) {
    return v;
  } else {
    constexpr auto lane = [](int l) {
      const int i = V * kLanes + l;
      return i % S == J ? kLanes + i / S : J == 1 && i % S == 0 ? i / S : l;
    };
    v = __builtin_shufflevector(v, r[J], lane(L)...);
    return join<S, V, J + 1>(r, v, lanes);
  }
}

// Memory is read ahead in small steps among the arithmetic, which keeps more of it under way than
// asking for all of `next` at once: half of each kPair channels by split_all(), half by join_all().
template <int S, class T, int... K>
void split_all(float *const *rows, const T *src, int64_t channels, const T *next,
               std::integer_sequence<int, K...>) {
  for (int64_t c = 0; c < channels; c += kPair) {
    (__builtin_prefetch(next + c * S + K * kLanes), ...);
    SSMK_UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t at = c + h * kLanes;
      const vf r[S] = {load(src + at * S + K * kLanes)...};
      (store(rows[K] + at, split<S, K>(r, r[0], LaneSequence{})), ...);
    }
  }
}

template <int S, class T, int... K>
void join_all(T *dst, const float *const *rows, int64_t channels, const T *next,
              std::integer_sequence<int, K...>) {
  for (int64_t c = 0; c < channels; c += kPair) {
    (__builtin_prefetch(next + (c + kLanes) * S + K * kLanes), ...);
    vf flat[2 * S];
    SSMK_UNROLL for (int h = 0; h < 2; ++h) {
      const vf r[S] = {load(rows[K] + c + h * kLanes)...};
      ((flat[h * S + K] = join<S, K>(r, r[0], LaneSequence{})), ...);
    }
    (put_pair(dst + c * S + K * kPair, flat[2 * K], flat[2 * K + 1], false), ...);
  }
}

// Row (k + turn) mod count <- number k.  `next`: where the same will be read soon, or nullptr.
void read_group(float *rows, const Group &src, int64_t channels, int64_t count, int64_t turn = 0,
                char *next = nullptr) {
  const auto row = [&](int64_t k) { return rows + (k + turn) % count * kChannels; };
  const int64_t whole = src.packed(count) ? channels / kPair * kPair : 0;
  if (whole > 0) {
    float *all[kWidth];
    for (int64_t k = 0; k < count; ++k) all[k] = row(k);
    with_type(src.dtype, [&](auto *type) {
      auto *from = reinterpret_cast<decltype(type)>(src.data);
      auto *then = next ? reinterpret_cast<decltype(type)>(next) : from;
      with_width(count, [&](auto s) {
        split_all<s>(all, from, whole, then, std::make_integer_sequence<int, s>{});
      });
    });
  }
  for (int64_t k = 0; k < count && whole < channels; ++k) {
    if (next && src.channel == 1)
      prefetch<0>(next + (src.at(0, k) - src.data), channels * size_of(src.dtype));
    read_row(row(k) + whole, src.at(whole, k), src.dtype, src.channel, channels - whole);
  }
}

// The inverse.
void write_group(const Group &dst, const float *rows, int64_t channels, int64_t count, int64_t turn,
                 char *next, bool streamed = false) {
  const auto row = [&](int64_t k) { return rows + (k + turn) % count * kChannels; };
  const int64_t whole = dst.packed(count) ? channels / kPair * kPair : 0;
  if (whole > 0) {
    const float *all[kWidth];
    for (int64_t k = 0; k < count; ++k) all[k] = row(k);
    with_type(dst.dtype, [&](auto *type) {
      auto *to = reinterpret_cast<decltype(type)>(dst.data);
      auto *then = next ? reinterpret_cast<decltype(type)>(next) : to;
      with_width(count, [&](auto s) {
        join_all<s>(to, all, whole, then, std::make_integer_sequence<int, s>{});
      });
    });
  }
  for (int64_t k = 0; k < count && whole < channels; ++k)
    write_row(dst.at(whole, k), dst.dtype, dst.channel, row(k) + whole, channels - whole, streamed);
}

}  // namespace
}  // namespace ssmk::cpu::SSMK_ISA
