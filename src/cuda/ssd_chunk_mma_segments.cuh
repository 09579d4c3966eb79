// SPDX-License-Identifier: MIT
// Long sequences of few heads, cut into segments: how far each turns the angles, and the states
// before each from what all of them add.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ssd_chunk_mma_prepare.cuh"

namespace ssmk::cuda {

// Entry i of the turns is what segment i - 1 of a sequence adds, of its first segment what the
// sequence begins with.  A block has a segment of a head.
static __global__ void __launch_bounds__(kTeam)
    mma_turns(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
  uint32_t *const sums = reinterpret_cast<uint32_t *>(mma_shared);
  wait_for_previous();
  start_next();
  const int64_t index = blockIdx.x / p.nheads, head = blockIdx.x % p.nheads;
  MmaSpan s;
  if (!span_of(p, plan, index, &s) || s.pad) return;
  const int nangles = int(p.mamba3.nangles);
  const float bias = p.dt_bias.given() ? load_at(p.dt_bias, head) : 0.0f;
  uint32_t *const to = plan.turns + (index * p.nheads + head) * nangles;
  for (int first = 0; first < nangles; first += kTeam) {
    const int n = min(nangles - first, kTeam), tokens = kTeam / n;
    const int angle = threadIdx.x % n, offset = threadIdx.x / n;
    if (s.first && offset == 0)
      to[first + angle] =
          s.has_initial && p.initial.angle.given()
              ? turns_of_angle(load_at(p.initial.angle, s.slot, head, first + angle))
              : 0;
    if (s.last) continue;
    uint32_t sum = 0, bad = 0;
    for (int64_t t = s.begin + offset; t < s.end && offset < tokens; t += tokens) {
      const float dt = transform_dt(p.dt_transform, load_at(p.dt, s.row, t, head) + bias);
      sum += turn_of(load_at(p.angles, s.row, t, head, first + angle), dt, &bad);
    }
    sum |= bad;
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (offset == 0) {
      for (int i = 1; i < tokens; ++i) sum = add_turns(sum, sums[i * n + angle]);
      to[p.nheads * nangles + first + angle] = sum;
    }
    __syncthreads();
  }
}

// Turns before a segment.
__device__ __forceinline__ uint32_t turns_before(const SsdChunkProblem &p, const MmaPlan &plan,
                                                 const MmaSpan &s, int64_t head, int angle) {
  const int64_t each = p.nheads * p.mamba3.nangles;
  const uint32_t *const from = plan.turns + s.index * each + head * p.mamba3.nangles + angle;
  uint32_t sum = 0;
  for (int64_t i = 0; i <= s.local; ++i) sum = add_turns(sum, from[-i * each]);
  return sum;
}

// The workspace has what segments add to the state, and gets the states before them.  A thread has
// four states: those of a fragment.
template <int kN, bool kPaired = false>
__global__ void __launch_bounds__(256)
    mma_starts(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
  wait_for_previous();
  start_next();
  const int part = blockIdx.y * 256 + threadIdx.x, tile = part / kTeam, thread = part % kTeam;
  const int slice = int(blockIdx.x % plan.slices);
  const int64_t head = blockIdx.x / plan.slices % p.nheads;
  const int64_t seq = blockIdx.x / plan.slices / p.nheads;
  MmaSpan s;
  const int64_t index = first_slot(p, plan, seq);
  if (!span_of(p, plan, index, &s) || s.pad) return;
  const int lane = thread & 31;
  const int c[2] = {slice * kSlice + thread / 32 % 4 * 16 + (lane >> 2), c[0] + 8};
  const int n0 = thread / 128 * (kN / 2) + tile / 2 * 16;
  const auto n = [&](int k) {
    return n0 + MmaState<kN, kPaired>::column(tile & 1, lane & 3, k & 1);
  };
  float h[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool there = s.has_initial && c[k >> 1] < p.headdim && n(k) < p.dstate;
    h[k] =
        there && p.initial.h.given() ? load_at(p.initial.h, s.slot, head, c[k >> 1], n(k)) : 0.0f;
  }
  if (s.has_initial && p.trap.given() && p.initial.k.given() && p.initial.v.given() &&
      s.seq_begin < s.seq_end) {
    const float share = first_share(p, s.row, s.seq_begin, head);
    for (int r = 0; r < p.mamba3.rank; ++r)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (c[k >> 1] < p.headdim && n(k) < p.dstate) {
          float u = load_at(p.initial.v, s.slot, head, c[k >> 1]) * share;
          if (p.mamba3.mimo_x.given()) u *= load_at(p.mamba3.mimo_x, head, r, c[k >> 1]);
          h[k] = fmaf(u, load_at(p.initial.k, s.slot, r, head, n(k)), h[k]);
        }
  }
  const int64_t segments = s.seq_end - s.seq_begin > plan.segment
                               ? (s.seq_end - s.seq_begin + plan.segment - 1) / plan.segment
                               : 1;
  const int64_t step = p.nheads * plan.slices * (kN / 16 * kTeam);
  float4 *at = reinterpret_cast<float4 *>(plan.states) +
               ((index * p.nheads + head) * plan.slices + slice) * (kN / 16 * kTeam) + part;
  const float *decay = plan.decays + index * p.nheads + head;
  constexpr int kAhead = 4;
  for (int64_t i = 0; i < segments; i += kAhead) {
    float4 add[kAhead];
    float by[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j + 1 < segments) {
        add[j] = at[j * step];
        by[j] = decay[j * p.nheads];
      }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j < segments) at[j * step] = {h[0], h[1], h[2], h[3]};
      if (i + j + 1 < segments) {
        const float d = exp2_fast(by[j]);
        h[0] = fmaf(h[0], d, add[j].x), h[1] = fmaf(h[1], d, add[j].y);
        h[2] = fmaf(h[2], d, add[j].z), h[3] = fmaf(h[3], d, add[j].w);
      }
    }
    at += kAhead * step;
    decay += kAhead * p.nheads;
  }
}

}  // namespace ssmk::cuda
