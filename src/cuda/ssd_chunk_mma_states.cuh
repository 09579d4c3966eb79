// SPDX-License-Identifier: MIT
// The states of a slice of a head: from the caller's tensors or the workspace to registers, and
// back.
#pragma once

#include "cuda/ssd_chunk_mma_products.cuh"

namespace ssmk::cuda {

// Who a thread is.
struct MmaLane {
  int thread, lane, pair, half;  // pair: of warps that have the same channels

  // What follows from the thread's number is computed anew after this: kept over the whole walk it
  // would take the registers that the products need.
  __device__ __forceinline__ void forget() {
    asm volatile("" : "+r"(thread), "+r"(lane), "+r"(pair), "+r"(half));
  }
  __device__ __forceinline__ int own() const { return pair * 16 + (lane >> 2); }
};

// And what it works for.
struct MmaThread : MmaLane, HeadSlice {
  __device__ __forceinline__ int p(int k) const {  // channel of sums k
    return channel + own() + (k < 2 ? 0 : 8);
  }
  __device__ __forceinline__ bool has(int k) const { return own() + (k < 2 ? 0 : 8) < channels; }
};

template <int kN, bool kPaired>
__device__ __forceinline__ void clear(MmaState<kN, kPaired> &h) {
#pragma unroll
  for (int n = 0; n < kN / 16; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) h.v[n][k] = 0.0f;
}

// The caller's tensors have any dtype and strides: registers and memory meet in shared memory, 16
// states of a warp's 16 channels at a time.  `area`: kAreaFloats for each warp.
template <int kN, bool kPaired>
__device__ __forceinline__ void read_state(MmaState<kN, kPaired> &h, const View<4> &from,
                                           int64_t entry, const MmaThread &t, int dstate,
                                           float *area) {
  const int g = t.lane >> 2, q = t.lane & 3, first = t.half * (kN / 2);
  area += t.thread / 32 * kAreaFloats;
#pragma unroll
  for (int n0 = 0; n0 < kN / 2; n0 += 16) {
    const int column = t.lane & 15, n = first + n0 + column;
#pragma unroll 1
    for (int i = t.lane >> 4; i < 16; i += 2) {
      const bool there = t.pair * 16 + i < t.channels && n < dstate;
      area[i * kAreaStride + column] =
          there ? load_at(from, entry, t.head, t.channel + t.pair * 16 + i, n) : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        h.v[n0 / 8 + j][k] = area[(g + (k >> 1) * 8) * kAreaStride + h.column(j, q, k & 1)];
    __syncwarp();
  }
}

template <int kN, bool kPaired>
__device__ __forceinline__ void write_state(const MmaState<kN, kPaired> &h, const View<4> &to,
                                            int64_t entry, const MmaThread &t, int dstate,
                                            float *area) {
  const int g = t.lane >> 2, q = t.lane & 3, first = t.half * (kN / 2);
  area += t.thread / 32 * kAreaFloats;
#pragma unroll
  for (int n0 = 0; n0 < kN / 2; n0 += 16) {
    const int column = t.lane & 15, n = first + n0 + column;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        area[(g + (k >> 1) * 8) * kAreaStride + h.column(j, q, k & 1)] = h.v[n0 / 8 + j][k];
    __syncwarp();
#pragma unroll 1
    for (int i = t.lane >> 4; i < 16; i += 2)
      if (t.pair * 16 + i < t.channels && n < dstate)
        store_at(to, area[i * kAreaStride + column], entry, t.head, t.channel + t.pair * 16 + i, n);
    __syncwarp();
  }
}

// A slot's fragments in the workspace: coalesced.
template <int kN>
__device__ __forceinline__ float4 *kept_state(const SsdChunkProblem &p, const MmaPlan &plan,
                                              int64_t index, const MmaThread &t) {
  const int64_t at = (index * p.nheads + t.head) * plan.slices + t.slice;
  return reinterpret_cast<float4 *>(plan.states) + at * (kN / 16 * kTeam) + t.thread;
}
template <int kN, bool kPaired>
__device__ __forceinline__ void read_kept(MmaState<kN, kPaired> &h, const float4 *from) {
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) {
    const float4 v = from[n * kTeam];
    h.v[n][0] = v.x, h.v[n][1] = v.y, h.v[n][2] = v.z, h.v[n][3] = v.w;
  }
}
template <int kN, bool kPaired>
__device__ __forceinline__ void keep_state(const MmaState<kN, kPaired> &h, float4 *to) {
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) to[n * kTeam] = {h.v[n][0], h.v[n][1], h.v[n][2], h.v[n][3]};
}

// What the first token owes to the one before it: h += share sum_r (psi v)(k^r)^T.  `area`: kN
// floats.
template <int kN>
__device__ __forceinline__ void add_before(MmaState<kN> &h, const SsdChunkProblem &p, int64_t entry,
                                           const MmaThread &t, float share, float *area) {
#pragma unroll 1
  for (int r = 0; r < p.mamba3.rank; ++r) {
    __syncthreads();
#pragma unroll 1
    for (int n = t.thread; n < kN; n += kTeam)
      area[n] =
          p.initial.k.given() && n < p.dstate ? load_at(p.initial.k, entry, r, t.head, n) : 0.0f;
    __syncthreads();
    float u[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u[i] = 0.0f;
      if (t.has(2 * i) && p.initial.v.given()) {
        u[i] = load_at(p.initial.v, entry, t.head, t.p(2 * i)) * share;
        if (p.mamba3.mimo_x.given()) u[i] *= load_at(p.mamba3.mimo_x, t.head, r, t.p(2 * i));
      }
    }
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      const float2 key =
          *reinterpret_cast<const float2 *>(area + t.half * (kN / 2) + n * 8 + 2 * (t.lane & 3));
      h.v[n][0] = fmaf(u[0], key.x, h.v[n][0]);
      h.v[n][1] = fmaf(u[0], key.y, h.v[n][1]);
      h.v[n][2] = fmaf(u[1], key.x, h.v[n][2]);
      h.v[n][3] = fmaf(u[1], key.y, h.v[n][3]);
    }
  }
  __syncthreads();
}

}  // namespace ssmk::cuda
