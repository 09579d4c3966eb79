// SPDX-License-Identifier: MIT
// Decode of Mamba-1 and 2 on any layout, dtype and size; the formulas stand in ssmk.h.  Packed
// states take state_update_packed.cuh, with the same arithmetic.
//
// A block owns rows p of one head of one batch row.  It asks for its states; while they are on the
// way it brings what the rows share to shared memory: B and C in float32, and of each row dt' x,
// the decay, D x and the gate, each computed once.  A thread then updates its part of a row in
// registers, token by token.  A row longer than a warp can hold is shared by several warps.
#pragma once

#include "cuda/state_update_lanes.cuh"

namespace ssmk::cuda {

// What the kernels below need of a StateUpdateProblem, under the same names.
struct HeadsProblem {
  View<4> x, dt, z;
  View<5> out;
  View<3> A;
  View<5> B, C;
  View<2> D, dt_bias;
  View<4> state;
  View<5> intermediate;
  Slots slots;
  DtTransform dt_transform;
  int64_t first_batch, first_head;  // of this launch
  int batch, ntokens, headdim, dstate, heads_per_group;
  int packs, log_lanes, padded;  // padded: states of a row in shared memory
  int stage;                     // tokens in shared memory at a time
  bool one_decay;
};

// Of a row and token, in shared memory.
struct RowTerms {
  float decay;  // or dt' log2(e), if each state has its own
  float input;  // dt' x
  float skip;   // D x
  float gate;   // silu(z)
};

constexpr int kHeadsThreads = 256;
static_assert(kHeadsThreads >= kMostLanes, "a row fits");

// Bytes of a token in shared memory: B, C, and RowTerms of a block's rows.
inline int64_t heads_token_bytes(int rows, int padded) {
  return 2 * padded * int64_t(sizeof(float)) + rows * int64_t(sizeof(RowTerms));
}

// K: states in a pack.
template <int K>
__global__ void __launch_bounds__(kHeadsThreads, 1)
    update_heads(const __grid_constant__ HeadsProblem p) {
  extern __shared__ float4 shared[];
  __shared__ float partial[kHeadsThreads / 32];
  begin();

  const int lanes = 1 << p.log_lanes, lane = threadIdx.x & (lanes - 1);
  const int rows = kHeadsThreads >> p.log_lanes, mine = threadIdx.x >> p.log_lanes;
  const int first = blockIdx.x * rows, row = first + mine, n = p.dstate, padded = p.padded;
  const int64_t head = p.first_head + blockIdx.y, group = head / p.heads_per_group;
  const int64_t b = p.first_batch + blockIdx.z;
  const RowSlots slots = row_slots(p, b);
  const auto zero_output = [&](int from_token) {
    for (int t = from_token; t < p.ntokens; ++t)
      if (lane == 0 && row < p.headdim) store_at(p.out, 0.0f, b, t, 0, head, row);
  };
  if (slots.pad) return zero_output(0);

  const States source = slots.start >= 0 ? states_after(p, slots.intermediate, slots.start, head)
                                         : states_in(p, slots.in, head);
  const auto here = [&](int c) { return row < p.headdim && c * lanes + lane < p.packs; };
  const auto first_state = [&](int c) { return (c * lanes + lane) * K; };
  float h[kMostChunks][K], rate[kMostChunks][K];
#pragma unroll
  for (int c = 0; c < kMostChunks; ++c)
    if (here(c)) {
      read_any<K>(source, row, first_state(c), n, h[c]);
      if (!p.one_decay)
        read_any<K>({p.A.at(head), p.A.dtype, p.A.stride[1], p.A.stride[2]}, row, first_state(c), n,
                    rate[c]);
    }
  const auto keep = [&](const States &to) {
#pragma unroll
    for (int c = 0; c < kMostChunks; ++c)
      if (here(c)) write_any<K>(to, row, first_state(c), n, h[c]);
  };

  const int token_floats = 2 * padded + rows * int(sizeof(RowTerms) / sizeof(float));
  float *const staged = reinterpret_cast<float *>(shared);
  const auto stage = [&](float *to, int t) {
    for (int i = threadIdx.x; i < n; i += kHeadsThreads) {
      to[place<K>(i, padded)] = load_at(p.B, b, t, 0, group, i);
      to[padded + place<K>(i, padded)] = load_at(p.C, b, t, 0, group, i);
    }
    RowTerms *const terms = reinterpret_cast<RowTerms *>(to + 2 * padded);
    for (int i = threadIdx.x; i < rows && first + i < p.headdim; i += kHeadsThreads) {
      float dt = load_at(p.dt, b, t, head, first + i);
      const float x = load_at(p.x, b, t, head, first + i);
      if (p.dt_bias.given()) dt += load_at(p.dt_bias, head, first + i);
      dt = transform_dt(p.dt_transform, dt);
      RowTerms r;
      r.decay =
          p.one_decay ? exp2_fast(dt * (load_at(p.A, head, first + i) * kLog2e)) : dt * kLog2e;
      r.input = dt * x;
      // Without D not 0 x: x may be infinite.
      r.skip = p.D.given() ? __fmul_rn(load_at(p.D, head, first + i), x) : 0.0f;
      r.gate = p.z.given() ? silu(load_at(p.z, b, t, head, first + i)) : 1.0f;
      terms[i] = r;
    }
  };

  for (int t = 0, at = 0; t < slots.tokens; ++t, ++at) {
    if (at == p.stage) at = 0;
    if (at == 0) {
      const int last = slots.tokens - t < p.stage ? slots.tokens - t : p.stage;
      __syncthreads();
      for (int i = 0; i < last; ++i) stage(staged + i * token_floats, t + i);
      __syncthreads();
    }
    const float *const token = staged + at * token_floats;
    const RowTerms terms = reinterpret_cast<const RowTerms *>(token + 2 * padded)[mine];
    float y[1] = {0.0f};
#pragma unroll
    for (int c = 0; c < kMostChunks; ++c) {
      if (!here(c)) continue;
      float B[K], C[K];
      read_row<K>(token, c * lanes + lane, padded, B);
      read_row<K>(token + padded, c * lanes + lane, padded, C);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const float a = p.one_decay ? terms.decay : exp2_fast(terms.decay * rate[c][i]);
        h[c][i] = fmaf(a, h[c][i], terms.input * B[i]);
        // States past the end are dropped, not multiplied by a padded 0: 0 * inf would be NaN.
        if (first_state(c) + i < n) y[0] = fmaf(h[c][i], C[i], y[0]);
      }
    }
    sum_lanes<1>(y, lane, lanes < 32 ? lanes : 32);
    if (lanes > 32) {
      __syncthreads();
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = y[0];
      __syncthreads();
      y[0] = 0;
      for (int i = 0; i < lanes / 32; ++i) y[0] += partial[mine * (lanes / 32) + i];
    }
    if (lane == 0 && row < p.headdim)
      store_at(p.out, (y[0] + terms.skip) * terms.gate, b, t, 0, head, row);

    // The state after this token, wherever it goes.
    if (slots.intermediate >= 0) keep(states_after(p, slots.intermediate, t, head));
    if (p.slots.out_per_token && !p.slots.keep_state) {
      const int64_t slot = read_index(p.slots.out, b, t);
      if (!p.slots.pad.is_pad(slot)) keep(states_in(p, slot, head));
    }
  }
  zero_output(slots.tokens);
  if (p.slots.keep_state || p.slots.out_per_token) return;
  const States to = states_in(p, slots.out, head);
  // Without tokens a state that stays where it is is left alone.
  if (slots.tokens == 0 && source == to) return;
  keep(to);
}

}  // namespace ssmk::cuda
