// SPDX-License-Identifier: MIT
// The fused prefill kernel's warps that bring chunks to shared memory: one has the copy engine
// fetch the tiles, the others (one a head) prepare what is per token.
#pragma once

#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

// The first token at or after t whose state is captured, and before end; else end.
__device__ __forceinline__ int next_capture(const SsdChunkProblem &p, int row, int t, int end) {
  int next = end;
  for (int64_t i = threadIdx.x & 31; i < p.ncaptures; i += 32) {
    const int64_t at = read_index(p.capture_positions, i) - row * p.seqlen;
    if (at >= t && at < next) next = int(at);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) next = min(next, __shfl_xor_sync(~0u, next, d));
  return next;
}

// Calls use(t, tokens, captured) for the chunks of a piece: they end where they are full, where the
// piece ends, and after a token whose state is captured.
template <class Use>
__device__ __forceinline__ void each_chunk(const SsdChunkProblem &p, const Piece &w, Use &&use) {
#pragma unroll 1
  for (int t = w.begin; t < w.end;) {
    int stop = min(t + kChunk, w.end);
    bool captured = false;
    if (p.ncaptures > 0) {
      const int next = next_capture(p, w.row, t, w.end);
      captured = next < stop;
      if (captured) stop = next + 1;
    }
    use(t, stop - t, captured);
    t = stop;
  }
}

// One warp: the tiles.
template <int kStates, int kHeads, bool kOutputs>
struct TileBringer {
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedSources &from;
  const FusedShared<kStates, kHeads, kOutputs> &at;
  uint32_t shared;
  Place place = {};
  uint32_t landings = 0;

  __device__ __forceinline__ void fetch(const Piece &w, uint32_t to, int t, uint32_t gate) const {
    const bool gated = kOutputs && p.z.given();
    gate_expect(gate, (kStates / 64 * (kOutputs ? 2 : 1) + w.parts * (gated ? 2 : 1)) * kTile);
#pragma unroll 1
    for (int n = 0; n < kStates / 64; ++n) {
      bring_tile(to + n * kTile, from.B, w.row, t, w.group, n * 64, gate);
      if (kOutputs) bring_tile(to + at.kSide + n * kTile, from.C, w.row, t, w.group, n * 64, gate);
    }
    for (int i = 0; i < w.parts; ++i) {
      const int head = head_of(plan, w, i), column = slice_of(plan, w, i);
      bring_tile(to + at.x(i), from.x, w.row, t, head, column, gate);
      if (gated) bring_tile(to + at.z(i), from.z, w.row, t, head, column, gate);
    }
  }

  // Zeros past the last token, where other tokens may be, so that nothing of theirs becomes a NaN:
  // in B and x, whose other factors are 0.
  __device__ __forceinline__ void cut(const Piece &w, uint32_t to, int tokens) const {
    const auto clear = [&](uint32_t tile) {
#pragma unroll 1
      for (int i = tokens * 8 + (threadIdx.x & 31); i < kChunk * 8; i += 32)
        shared_store(tile + i * 16, make_int4(0, 0, 0, 0));
    };
    for (int n = 0; n < kStates / 64; ++n) clear(to + n * kTile);
    for (int i = 0; i < w.parts; ++i) clear(to + at.x(i));
    show_to_products();
    __syncwarp();
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    each_chunk(p, w, [&](int t, int tokens, bool captured) {
      const uint32_t shared = afresh(this->shared), landed = shared + at.cut_gate();
      const uint32_t full = shared + at.gates() + place.stage * 16;
      const uint32_t to = shared + place.stage * at.stage;
      // Past the end of the tensor the copy engine writes zeros by itself.
      const bool cuts = tokens < kChunk && t + tokens < p.seqlen;
      const bool first = (threadIdx.x & 31) == 0;
      gate_wait(full + 8, place.parity ^ 1);
      if (first) {
        shared_store(shared + at.notes() + place.stage * 4, tokens | (captured ? kCaptured : 0));
        fetch(w, to, t, cuts ? landed : full);
      }
      __syncwarp();
      if (cuts) {
        gate_wait(landed, landings++ & 1);
        cut(w, to, tokens);
        if (first) gate_arrive(full);
      }
      place.advance(at.stages);
    });
  }
};

// A warp for each head: what is per token.  Its lanes have four tokens each, those of two chunks,
// or (where chunks may end anywhere) of one.
template <int kStates, int kHeads, bool kOutputs>
struct TokenPreparer {
  static constexpr int kMine = kBatch * kChunk / 32, kLanes = 32 / kBatch;  // tokens; of a chunk
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedShared<kStates, kHeads, kOutputs> &at;
  uint32_t shared;
  int part;
  Place place = {};
  int lane = 0;
  float A = 0, bias = 0;  // of the head
  int row = 0, head = 0;

  // dt' and the log decay of this lane's tokens, 0 past the end.
  struct Tokens {
    float dt[kMine], decay[kMine];
  };
  __device__ __forceinline__ void read(Tokens &v, int t, int end) const {
    const int first = t + kMine * afresh(lane);
    uint32_t bits[kMine];
    bring(bits, p.dt, first, end);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      float value = value_of(bits[i], p.dt.dtype) + bias;
      if (p.dt_transform.softplus) value = softplus(value);
      if (p.dt_transform.clamp) value = fminf(fmaxf(value, p.dt_transform.lo), p.dt_transform.hi);
      v.dt[i] = first + i < end ? value : 0.0f;
      v.decay[i] = __fmul_rn(v.dt[i], A);
    }
    if (p.A.given()) return;
    bring(bits, p.adt, first, end);
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      v.decay[i] = first + i < end ? value_of(bits[i], p.adt.dtype) * kLog2e : 0.0f;
  }
  // As bits: all are asked for before one is waited for.  Past the end the last one is read.
  __device__ __forceinline__ void bring(uint32_t (&bits)[kMine], const View<3> &v, int first,
                                        int end) const {
    const char *from = v.at(afresh(row), min(first, end - 1), afresh(head));
    const int64_t next = v.stride[1] * size_of(v.dtype);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      bits[i] = load_bits(from, v.dtype);
      if (first + i + 1 < end) from += next;
    }
  }

  // For `tokens` tokens, of chunks of 64 the last of which may be cut.
  __device__ __forceinline__ void write(uint32_t to, Tokens &v, int tokens) const {
    const int lane = afresh(this->lane);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (kMine * lane + i >= tokens) v.dt[i] = v.decay[i] = 0;  // a chunk that a capture ends
      v.decay[i] = sum += v.decay[i];
    }
    const float other = __shfl_xor_sync(~0u, sum, 1);  // of the other half of the eight
    float before = sum;                                // of the lanes of the chunk
#pragma unroll
    for (int d = 1; d < kLanes; d <<= 1) {
      const float lower = __shfl_up_sync(~0u, before, d, kLanes);
      if (lane % kLanes >= d) before += lower;
    }
    const float last = __shfl_sync(~0u, before, kLanes - 1, kLanes);
    before -= sum;
    const int first = lane % kLanes * kMine;
    if (lane / kLanes * kChunk >= tokens) return;
    to += lane / kLanes * int(sizeof(TokenValues));
    const float end = lane & 1 ? sum : sum + other;  // of the eight
#pragma unroll
    for (int i = 0; i < kMine; i += 2) {
      const float dt[2] = {v.dt[i], v.dt[i + 1]};
      const float here[2] = {v.decay[i], v.decay[i + 1]};
      const float decay[2] = {before + here[0], before + here[1]};
      const auto put = [&](int row, float a, float b) {
        shared_store(to + row + (first + i) * 4, make_float2(a, b));
      };
      const int pairs = offsetof(TokenValues, decay) + (first + i) * 4;
      put(pairs, decay[0], dt[0]);
      put(pairs + 8, decay[1], dt[1]);
      put(offsetof(TokenValues, grown), exp2_fast(decay[0]), exp2_fast(decay[1]));
      put(offsetof(TokenValues, weight), exp2_fast(last - decay[0]) * dt[0],
          exp2_fast(last - decay[1]) * dt[1]);
      put(offsetof(TokenValues, near), exp2_fast(end - here[0]) * dt[0],
          exp2_fast(end - here[1]) * dt[1]);
    }
    if (lane & 1)
      shared_store(to + offsetof(TokenValues, eighths) + first / 8 * 4,
                   __float_as_int(before + sum));
    if (first == 0)
      shared_store(to + offsetof(TokenValues, last), make_float2(exp2_fast(last), last));
  }

  __device__ __forceinline__ void give(Tokens &v, int tokens) {
    const uint32_t shared = afresh(this->shared);
    const uint32_t full = shared + at.batch_gates(part) + place.stage * 16;
    gate_wait(full + 8, place.parity ^ 1);
    write(shared + at.values() +
              (part * kBatchPlaces + place.stage) * kBatch * int(sizeof(TokenValues)),
          v, tokens);
    __syncwarp();
    if (lane == 0) gate_arrive(full);
    place.advance(kBatchPlaces);
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (part >= w.parts || w.begin >= w.end) return;
    row = w.row;
    head = head_of(plan, w, part);
    lane = threadIdx.x & 31;
    bias = p.dt_bias.given() ? load_at(p.dt_bias, head) : 0.0f;
    A = p.A.given() ? load_at(p.A, head) * kLog2e : 0.0f;
#pragma unroll 1
    for (int t = w.begin; t < w.end;) {
      int tokens = min(kBatch * kChunk, w.end - t);
      if (p.ncaptures > 0) {
        tokens = min(tokens, kChunk);
        tokens = min(tokens, next_capture(p, w.row, t, w.end) + 1 - t);
      }
      Tokens v;
      read(v, t, w.end);
      give(v, tokens);
      t += tokens;
    }
  }
};

}  // namespace ssmk::cuda
