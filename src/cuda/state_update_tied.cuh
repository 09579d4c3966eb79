// SPDX-License-Identifier: MIT
// Decode of Mamba-2 as models use it: one dt, A, D and dt_bias a head, no intermediate states,
// rows p in one piece after another.  What the two kernels for that share.
//
// Both are bound by how many instructions they need beside those for the states, and a short call
// by how many cache lines of arguments it has to wait for.  So the arguments are few and narrow.
#pragma once

#include "cuda/state_update_lanes.cuh"

namespace ssmk::cuda {

// Strides in bytes.
struct PerHead {
  const char *data;
  int32_t head;
};
struct PerToken {
  const char *data;
  int32_t batch, head, token;  // B and C: `head` is of groups
};
struct SlotList {
  const char *data;
  int32_t batch;
};

// Bits of `flags`: tensors that are given, and those that are float32 (slots: int64) where either
// of two dtypes may come.  In the place of a tensor that is not given stands another that can be
// read at the same indices, so that all loads can be asked for without a branch.
enum TiedFlags : uint32_t {
  kHasSlots = 1,
  kHasOutSlots = 2,
  kWideSlots = 4,
  kWideOutSlots = 8,
  kWideDt = 16,
  kWideA = 32,
  kHasBias = 64,
  kWideBias = 128,
  kSoftplus = 256,
  kHasZ = 512,
  kHasD = 1024,
  kWideD = 2048,
};

// What the kernels need of a StateUpdateProblem.  Rows p of x, z and out are neighbours; so are
// those of a head's states, dstate elements each.
struct TiedProblem {
  uint32_t flags;
  int first_batch, first_head, headdim;
  SlotList in, out_slots;
  uint32_t entries, pad_slot;  // pad_slot: `entries` if there is none
  char *state;
  int32_t state_slot, state_head;
  uint32_t heads_inverse;  // 2^31 / heads of a group, rounded up
  float dt_lo, dt_hi;      // infinite without limits
  PerToken dt, x, B, C, z;
  PerHead A, dt_bias, D;
  PerToken out;
  View<1> num_tokens;
  int ntokens;
};

// Exact below 2^15 heads.
__device__ __forceinline__ int group_of(const TiedProblem &p, int head) {
  return int(__umulhi(uint32_t(head) * 2, p.heads_inverse));
}

__device__ __forceinline__ const char *at(const PerToken &v, int b, int head) {
  return v.data + int64_t(b) * v.batch + int64_t(head) * v.head;
}
__device__ __forceinline__ const char *at(const PerHead &v, int head) {
  return v.data + int64_t(head) * v.head;
}

// A value of float32 or of X, from load_either().
template <class X>
__device__ __forceinline__ float either_value(uint32_t bits, uint32_t wide) {
  return wide ? __uint_as_float(bits) : widen_bits<X>(bits);
}

// The slots that a row reads and writes.  A pad's are 0: it may read there, but not write.
struct TiedSlots {
  int in, out;
  bool pad;
};

__device__ __forceinline__ uint32_t tied_slot(const TiedProblem &p, const char *at, uint32_t wide,
                                              bool *pad) {
  uint32_t low, high;
  asm volatile(
      "{\n.reg .pred wide;\nsetp.ne.u32 wide, %3, 0;\nmov.u32 %1, 0;\n"
      "ld.global.b32 %0, [%2];\n@wide ld.global.b32 %1, [%2 + 4];\n}"
      : "=&r"(low), "=&r"(high)
      : "l"(at), "r"(wide));
  *pad |= high != 0 || low >= p.entries || low == p.pad_slot;
  return low;
}

// `at` is where the slot to read stands.
__device__ __forceinline__ TiedSlots tied_slots(const TiedProblem &p, int b, const char *at) {
  TiedSlots slots = {b, b, false};
  if (p.flags & kHasSlots)
    slots.in = slots.out = int(tied_slot(p, at, p.flags & kWideSlots, &slots.pad));
  if (p.flags & kHasOutSlots)
    slots.out = int(tied_slot(p, p.out_slots.data + int64_t(b) * p.out_slots.batch,
                              p.flags & kWideOutSlots, &slots.pad));
  if (slots.pad) slots.in = slots.out = 0;
  return slots;
}

template <class X>
__device__ __forceinline__ float tied_dt(const TiedProblem &p, uint32_t dt_bits,
                                         uint32_t bias_bits) {
  float dt = either_value<X>(dt_bits, p.flags & kWideDt);
  const float biased = dt + either_value<X>(bias_bits, p.flags & kWideBias);
  if (p.flags & kHasBias) dt = biased;
  const float soft = softplus(dt);
  if (p.flags & kSoftplus) dt = soft;
  dt = dt < p.dt_lo ? p.dt_lo : dt;
  return dt > p.dt_hi ? p.dt_hi : dt;
}

// dt' and its decay.
struct TiedStep {
  float dt, decay;
};

template <class X>
__device__ __forceinline__ TiedStep tied_step(const TiedProblem &p, uint32_t dt_bits,
                                              uint32_t bias_bits, uint32_t A_bits) {
  const float dt = tied_dt<X>(p, dt_bits, bias_bits);
  return {dt, exp2_fast(dt * (either_value<X>(A_bits, p.flags & kWideA) * kLog2e))};
}

}  // namespace ssmk::cuda
