// SPDX-License-Identifier: MIT
// The state of a head as the threads of a warpgroup hold it: from and to memory, from block to
// block.
#pragma once

#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

template <int kStates, int kHeads, int kMode>
struct HeldState : ChunkReader<kStates, kHeads, kMode> {
  static constexpr int kHeld = kSlice * kStates / kWarpgroup;  // states of a thread
  using Reader = ChunkReader<kStates, kHeads, kMode>;
  using Reader::thread;
  const FusedPlan &plan;
  int part;  // of the block
  float h[kHeld];

  __device__ __forceinline__ HeldState(const SsdChunkProblem &p, const FusedPlan &plan,
                                       const FusedShared<kStates, kHeads, kMode> &at,
                                       uint32_t shared, int part)
      : Reader(p, at, shared), plan(plan), part(part) {}

  __device__ __forceinline__ Lane here() const { return Lane(afresh(thread)); }

  __device__ __forceinline__ void read(const View<4> &v, int64_t entry, int head, int slice) {
    const int64_t size = size_of(v.dtype), next = v.stride[3] * size;
    const Lane l = here();
    const char *from = v.at(entry, head, slice + l.row, l.column);
#pragma unroll
    for (int b = 0; b < kStates / 8; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char *const q = from + i * 8 * v.stride[2] * size;
        h[4 * b + 2 * i] = load(q, v.dtype);
        h[4 * b + 2 * i + 1] = load(q + next, v.dtype);
      }
      from += 8 * next;
    }
  }
  __device__ __forceinline__ void write(const View<4> &v, int64_t entry, int head,
                                        int slice) const {
    const int64_t size = size_of(v.dtype), next = v.stride[3] * size;
    const int64_t lower = 8 * v.stride[2] * size;
    const Lane l = here();
    char *to = v.at(entry, head, slice + l.row, l.column);
    const bool pairs = v.dtype == DType::kF32 && v.stride[3] == 1 &&
                       (v.stride[0] | v.stride[1] | v.stride[2]) % 2 == 0 &&
                       reinterpret_cast<uintptr_t>(v.data) % 8 == 0;
    if (pairs) {
#pragma unroll
      for (int b = 0; b < kStates / 8; ++b) {
        *reinterpret_cast<float2 *>(to) = {h[4 * b], h[4 * b + 1]};
        *reinterpret_cast<float2 *>(to + lower) = {h[4 * b + 2], h[4 * b + 3]};
        to += 32;
      }
      return;
    }
#pragma unroll
    for (int b = 0; b < kStates / 8; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store(to + i * lower, v.dtype, h[4 * b + 2 * i]);
        store(to + i * lower + next, v.dtype, h[4 * b + 2 * i + 1]);
      }
      to += 8 * next;
    }
  }

  // Mamba-3: what the first token owes to the one before it, h += share v k^T.
  __device__ __forceinline__ void add_before(const Piece &w, int64_t slot, int head) {
    const SsdChunkProblem &p = this->p;
    const View<1> &flags = p.seqs.has_initial_state;
    if (w.begin == w.end || !p.trap.given() || !p.initial.k.given() || !p.initial.v.given() ||
        (flags.given() && *flags.at(w.s) == 0))
      return;
    const float share = first_share(p, w.row, w.begin, head);
    const Lane l = here();
    const float v[2] = {load_at(p.initial.v, slot, head, l.row) * share,
                        load_at(p.initial.v, slot, head, l.row + 8) * share};
#pragma unroll
    for (int b = 0; b < kStates / 8; ++b)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float k = load_at(p.initial.k, slot, 0, head, 8 * b + l.column + j);
        h[4 * b + j] = fmaf(v[0], k, h[4 * b + j]);
        h[4 * b + 2 + j] = fmaf(v[1], k, h[4 * b + 2 + j]);
      }
  }

  // To and from other blocks, as the threads hold them.
  __device__ __forceinline__ float *handed(int i) const {
    return plan.states + int64_t(i + part) * (kSlice * kStates) + thread * 4;
  }
  __device__ __forceinline__ void park(int place) const {
    float *const to = handed(place);
#pragma unroll
    for (int i = 0; i < kHeld; i += 4)
      *reinterpret_cast<float4 *>(to + i * kWarpgroup) = {h[i], h[i + 1], h[i + 2], h[i + 3]};
  }
  __device__ __forceinline__ void hand_on(const Piece &w, float total) const {
    park(w.to);
    if (plan.chunks) {
      __threadfence();
      meet(1 + part, kWarpgroup);
      if (thread == 0)
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(plan.flags + w.to + part)
                     : "memory");
    } else if (thread == 0) {
      plan.decays[w.to + part] = total;
    }
  }
  __device__ __forceinline__ void take_over(const Piece &w) {
    const int place = w.starts ? w.kept : w.from;
    if (w.waits) {
      if (thread == 0) {
        uint32_t there;
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                       : "=r"(there)
                       : "l"(plan.flags + w.from + part)
                       : "memory");
        } while (!there);
      }
      meet(1 + part, kWarpgroup);
    }
    const float *const from = handed(place);
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) {
      const float4 v = __ldcg(reinterpret_cast<const float4 *>(from + i * kWarpgroup));
      h[i] = v.x, h[i + 1] = v.y, h[i + 2] = v.z, h[i + 3] = v.w;
    }
  }
};

}  // namespace ssmk::cuda
