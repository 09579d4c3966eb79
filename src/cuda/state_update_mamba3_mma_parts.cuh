// SPDX-License-Identifier: MIT
// What decode of Mamba-3 on tensor cores is given, and how its factors stand in shared memory.
#pragma once

#include "cuda/hints.cuh"
#include "cuda/mma.cuh"
#include "cuda/state_update_mamba3_common.cuh"
#include "cuda/state_update_tied.cuh"

namespace ssmk::cuda {

constexpr int kMma3States = 128;  // dstate
constexpr int kMma3Rows = 64;     // headdim, at most
constexpr int kMma3Angles = 64;   // at most
constexpr int kMma3Tokens = 4;

// Strides in bytes; the last axis of each is one piece.
struct PerRank {
  const char *data;
  int32_t head, rank;
};
struct PerSlot {
  char *data;
  int32_t slot, head;
};

// Bits of `parts`, as TiedFlags.
enum Mamba3Flags : uint32_t {
  kHasAdt = 1,
  kWideRate = 2,
  kWideTrap = 4,
  kTrapSigmoid = 8,
  kWideAngles = 16,
  kHasKeyBias = 32,
  kHasQueryBias = 64,
  kWideKeyBias = 128,
  kWideQueryBias = 256,
  kHasPsi = 512,
  kHasZeta = 1024,
  kHasPhi = 2048,
  kWidePsi = 4096,
  kWideZeta = 8192,
  kWidePhi = 16384,
  kKeepState = 32768,
  kWideOut = 65536,
};

// What the kernel needs of a StateUpdateProblem; inputs and the small states are bfloat16, but for
// angle_state, and what `parts` and `flags` say.
struct Mamba3Mma : TiedProblem {
  uint32_t parts;
  int nangles;
  PerToken rate;  // adt, or A, the same for all rows and tokens
  PerToken trap, angles;
  PerRank key_bias, query_bias, psi, zeta, phi;
  PerSlot angle_state, v_state, k_state;
  int32_t k_rank, B_rank, C_rank, out_rank;
};

// Addresses, one instruction an axis.
__device__ __forceinline__ const char *reach(const PerToken &v, int b, int t, int head) {
  return step(step(step(v.data, b, v.batch), t, v.token), head, v.head);
}
__device__ __forceinline__ const char *reach(const PerHead &v, int head) {
  return step(v.data, head, v.head);
}
__device__ __forceinline__ const char *reach(const PerRank &v, int head, int rank) {
  return step(step(v.data, head, v.head), rank, v.rank);
}
__device__ __forceinline__ char *reach(const PerSlot &v, int slot, int head) {
  return step(step(v.data, slot, v.slot), head, v.head);
}

// A number that is the same in all lanes, kept where each lane has its own: there addresses take
// fewer instructions, and loads by them do not wait for one another.
__device__ __forceinline__ int in_lanes(int v) { return __shfl_sync(~0u, v, 0); }

// Two neighbours of float32 (`wide`) or bfloat16; loads do not wait for another.
__device__ __forceinline__ uint2 load_two_either(const char *p, int element, uint32_t wide) {
  return load_two(step(p, element, wide ? 4 : 2), wide ? DType::kF32 : DType::kBF16);
}
__device__ __forceinline__ float2 two_either(uint2 bits, uint32_t wide) {
  const float2 narrow = unpack_two<__nv_bfloat16>(bits.x);
  return {wide ? __uint_as_float(bits.x) : narrow.x, wide ? __uint_as_float(bits.y) : narrow.y};
}
__device__ __forceinline__ uint32_t load_word(const char *p) { return load_near<float>(p); }

// A slot as it stands in memory, or whatever stands there if it is not given.
struct RawSlot {
  uint32_t low, high;
};
__device__ __forceinline__ RawSlot load_slot(const SlotList &v, int b, uint32_t wide) {
  const uint2 bits = load_two(step(v.data, b, v.batch), wide ? DType::kF32 : DType::kBF16);
  return {bits.x, bits.y};
}

__device__ __forceinline__ TiedSlots slots_of(const TiedProblem &p, int b, RawSlot in,
                                              RawSlot out) {
  const auto pads = [&](RawSlot s) {
    return s.high != 0 || s.low >= p.entries || s.low == p.pad_slot;
  };
  const bool has_in = p.flags & kHasSlots, has_out = p.flags & kHasOutSlots;
  TiedSlots slots = {has_in ? int(in.low) : b, 0, (has_in && pads(in)) || (has_out && pads(out))};
  slots.out = has_out ? int(out.low) : slots.in;
  return slots;
}

// All states of a head to another slot.
template <class S, int kRank>
__device__ void copy_slot(const Mamba3Mma &p, int in, int out, int head) {
  const auto copy = [&](char *base, int32_t slot, int64_t offset, int bytes) {
    const char *const from = base + int64_t(in) * slot + offset;
    char *const to = base + int64_t(out) * slot + offset;
    for (int i = threadIdx.x * 4; i < bytes; i += blockDim.x * 4)
      *reinterpret_cast<uint32_t *>(to + i) = *reinterpret_cast<const uint32_t *>(from + i);
  };
  copy(p.state, p.state_slot, int64_t(head) * p.state_head,
       p.headdim * kMma3States * int(sizeof(S)));
  copy(p.angle_state.data, p.angle_state.slot, int64_t(head) * p.angle_state.head, p.nangles * 4);
  copy(p.v_state.data, p.v_state.slot, int64_t(head) * p.v_state.head, p.headdim * 2);
  for (int r = 0; r < kRank; ++r)
    copy(p.k_state.data, p.k_state.slot, int64_t(head) * p.k_state.head + int64_t(r) * p.k_rank,
         kMma3States * 2);
}

// The factors in shared memory are rows of bfloat16, one a part and a key or query; number i of a
// part is a token or a rank, of several tokens of four ranks 4 token + rank.
constexpr int kFactorPitch = kMma3States / 2 + 4;  // words from one row to the next

// Where they stand: what a matrix takes together lies in different banks.
template <bool kMany>
struct FactorRows {
  static constexpr int zero = kMany ? 104 : 24, count = kMany ? 105 : 32;

  // Of a key and a query; of the key before the first token, of a rank.
  __device__ static constexpr int key(int part, int i) {
    return kMany ? 16 * part + (i ^ (i >> 2 & 2)) : (part == 0 ? 0 : part == 1 ? 4 : 12) + i;
  }
  __device__ static constexpr int query(int part, int i) {
    return kMany ? 48 + 16 * part + i : (part == 0 ? 16 : part == 1 ? 28 : 8) + i;
  }
  __device__ static constexpr int old(int rank) { return kMany ? 96 + (rank ^ 1) : 20 + rank; }
};

// Where things stand in shared memory: states as packs, then, in words, the factors, sines and
// cosines, the steps of angles, the decay and the two parts of the trapezoid of each token,
// products of keys and queries.
template <class S, bool kMany, int kTokens, bool kHeld>
struct MmaRoom {
  // After states that do not go to registers.
  static constexpr int factors = kHeld ? 0 : kMma3Rows * kMma3States * int(sizeof(S)) / 4;
  static constexpr int turns = FactorRows<kMany>::count * kFactorPitch;
  static constexpr int steps = turns + 2 * kTokens * kMma3Angles;
  static constexpr int coefs = steps + (kTokens > 1 ? kTokens * kMma3Angles : 0);
  static constexpr int products = coefs + 12;
  static constexpr int bytes =
      (factors + products + (kMany ? kTokens * (kTokens + 3) / 2 * 64 : 0)) * 4;
};

// Where a word of two neighbouring states stands in its row: word k of the pack of lane q is word
// q of matrix k of its group.
template <class S>
__device__ __forceinline__ int word_place(int word) {
  if constexpr (sizeof(S) == 4) return (word & ~7) | (word & 1) << 2 | (word & 7) >> 1;
  return (word & ~15) | (word & 3) << 2 | (word & 15) >> 2;
}

}  // namespace ssmk::cuda
