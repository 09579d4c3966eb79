// SPDX-License-Identifier: MIT
// Decode of one token of Mamba-2, bound by memory: 16 bytes of states at a time in each of many
// light threads, which is what a GPU's memory likes best.  Every thread prepares what its rows need
// by itself: that costs less than handing it around.  The arithmetic is that of update_heads(),
// operation by operation.
#pragma once

#include "cuda/state_update_tied.cuh"

namespace ssmk::cuda {

// Sums over the lanes of a row, for kRows rows at once: each step halves the rows that a lane still
// carries, and every row is added up as a butterfly would.  y then starts with the sums of rows
// lane * kRows / kLanes and following, as many as there are for a lane, at least one.
template <int kLanes, int kRows>
__device__ __forceinline__ void spread_sums(float (&y)[kRows], int lane) {
  int rows = kRows;
#pragma unroll
  for (int off = kLanes / 2; off; off /= 2) {
    const bool upper = lane & off;
    rows /= 2;
    if (rows == 0) {
      y[0] += __shfl_xor_sync(~0u, y[0], off);
      continue;
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float sent = upper ? y[i] : y[i + rows], kept = upper ? y[i + rows] : y[i];
      y[i] = kept + __shfl_xor_sync(~0u, sent, off);
    }
  }
}

// S: states.  X: x, z, B, C and out.  A row of states is spread over 2^kLogLanes threads, kChunks
// packs in each; a thread has kRows rows, one after another.  kBlocks: that should fit a
// multiprocessor.  headdim is a multiple of kRows.  threadIdx.y: heads of a block.
template <class S, class X, int kLogLanes, int kChunks, int kRows, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_one(const __grid_constant__ TiedProblem p) {
  constexpr int K = kPack<S>, kLanes = 1 << kLogLanes, kRow = K * kLanes * kChunks;
  start_next();
  const uint32_t flags = p.flags;
  const int lane = threadIdx.x & (kLanes - 1);
  const int row0 = (blockIdx.x * (blockDim.x >> kLogLanes) + (threadIdx.x >> kLogLanes)) * kRows;
  const int head = p.first_head + blockIdx.y * blockDim.y + threadIdx.y,
            b = p.first_batch + blockIdx.z;
  const int group = group_of(p, head);
  // The rows whose outputs this lane stores: kOwn of them, at row0 + own.
  constexpr int kShare = kLanes > kRows ? kLanes / kRows : 1;
  constexpr int kOwn = kRows > kLanes ? kRows / kLanes : 1;
  const bool here = row0 < p.headdim;
  // Rows past the end read the first ones, and are not stored.
  const int safe = here ? row0 : 0, own = lane * kRows / kLanes;

  const char *const slot_at = p.in.data + int64_t(b) * p.in.batch;
  const char *const dt_at = at(p.dt, b, head), *const bias_at = at(p.dt_bias, head);
  const char *const A_at = at(p.A, head), *const D_at = at(p.D, head);
  const X *const x_at = reinterpret_cast<const X *>(at(p.x, b, head)) + safe;
  const X *const z_at = reinterpret_cast<const X *>(at(p.z, b, head)) + safe + own;
  const X *const B_at = reinterpret_cast<const X *>(at(p.B, b, group)) + lane * K;
  const X *const C_at = reinterpret_cast<const X *>(at(p.C, b, group)) + lane * K;
  const char *from =
      p.state + int64_t(head) * p.state_head + (safe * kRow + lane * K) * int(sizeof(S));
  wait_with(slot_at, dt_at, bias_at, A_at, D_at, x_at, z_at, B_at, C_at, from);

  const TiedSlots slots = tied_slots(p, b, slot_at);
  const uint32_t dt_bits = load_either(dt_at, flags & kWideDt);
  const uint32_t bias_bits = load_either(bias_at, flags & kWideBias);
  const uint32_t A_bits = load_either(A_at, flags & kWideA);
  const uint32_t D_bits = load_either(D_at, flags & kWideD);
  const Pack<X, kRows> xs = load_pack<X, kRows>(x_at);
  const Pack<X, kOwn> own_x = load_pack<X, kOwn>(x_at + own), z = load_pack<X, kOwn>(z_at);
  Pack<X, K> Bs[kChunks], Cs[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Bs[c] = load_pack<X, K>(B_at + c * kLanes * K);
    Cs[c] = load_pack<X, K>(C_at + c * kLanes * K);
  }
  from += int64_t(slots.in) * p.state_slot;
  Pack<S, K> raw[kRows][kChunks];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      raw[r][c] =
          load_pack_once<S, K>(reinterpret_cast<const S *>(from) + r * kRow + c * kLanes * K);
  S *const keep = reinterpret_cast<S *>(const_cast<char *>(from) +
                                        int64_t(slots.out - slots.in) * p.state_slot);
  const bool keeps = here && !slots.pad;

  const TiedStep step = tied_step<X>(p, dt_bits, bias_bits, A_bits);
  float x[kRows];
  widen(xs, x);
  float y[kRows] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float B[K], C[K];
    widen(Bs[c], B);
    widen(Cs[c], C);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float input = step.dt * x[r];
      float h[K];
      widen(raw[r][c], h);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        h[i] = fmaf(step.decay, h[i], input * B[i]);
        y[r] = fmaf(h[i], C[i], y[r]);
      }
      store_pack_once_if(keeps, keep + r * kRow + c * kLanes * K, narrow_pack<S>(h));
    }
  }
  spread_sums<kLanes>(y, lane);
  float results[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    // Without D not 0 x: x may be infinite.
    const float skip = __fmul_rn(either_value<X>(D_bits, flags & kWideD), widen(own_x.v[i]));
    if (flags & kHasD) y[i] += skip;
    const float gate = silu(widen(z.v[i]));
    if (flags & kHasZ) y[i] *= gate;
    results[i] = slots.pad ? 0.0f : y[i];
  }
  if (here && (lane & (kShare - 1)) == 0)
    store_pack(reinterpret_cast<X *>(const_cast<char *>(at(p.out, b, head))) + row0 + own,
               narrow_pack<X>(results));
}

}  // namespace ssmk::cuda
