// SPDX-License-Identifier: MIT
// The fused prefill kernel's warps that bring chunks to shared memory: one has the copy engine
// fetch the tiles, the others (one a head) prepare what is per token.
#pragma once

#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

// The first token at or after t whose state is captured, and before end; else end.
__device__ __forceinline__ int next_capture(const SsdChunkProblem &p, int row, int t, int end) {
  int next = end;
#pragma unroll 1
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
template <bool kCaptures, class Use>
__device__ __forceinline__ void each_chunk(const SsdChunkProblem &p, const Piece &w, Use &&use) {
#pragma unroll 1
  for (int t = w.begin; t < w.end;) {
    int stop = min(t + kChunk, w.end);
    bool captured = false;
    if (kCaptures && p.ncaptures > 0) {
      const int next = next_capture(p, w.row, t, w.end);
      captured = next < stop;
      if (captured) stop = next + 1;
    }
    use(t, stop - t, captured);
    t = stop;
  }
}

// One warp: the tiles.  A lane fetches one of them, or none.
template <int kStates, int kHeads, int kMode>
struct TileBringer {
  static constexpr bool kOutputs = kMode != kStatesOnly;
  static constexpr int kWide = kStates / 64;  // tiles of B, or C
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedSources &from;
  const FusedShared<kStates, kHeads, kMode> &at;
  uint32_t shared;
  int lane;
  Place place = {};
  uint32_t landings = 0;
  // This lane's tile: where it comes from, and its place in a stage.
  const TileSource *source = nullptr;
  int head = 0, column = 0, to = 0;
  int count = 0;  // of all lanes

  __device__ __forceinline__ void choose(const Piece &w) {
    const bool gated = kOutputs && p.z.given();
    constexpr int kShared = kWide * (kOutputs ? 2 : 1);
    count = kShared + w.parts * (gated ? 2 : 1);
    if (lane < kShared) {
      const bool second = lane >= kWide;
      source = second ? &from.C : &from.B;
      head = w.group;
      column = lane % kWide * 64;
      to = lane * kTile;
    } else if (lane < count) {
      const bool second = lane - kShared >= w.parts;
      const int part = lane - kShared - (second ? w.parts : 0);
      source = second ? &from.z : &from.x;
      head = head_of(plan, w, part);
      column = slice_of(plan, w, part);
      to = second ? at.z(part) : at.x(part);
    }
  }

  __device__ __forceinline__ void fetch(int row, int t, uint32_t stage, uint32_t gate) const {
    if (lane == 0) gate_expect(gate, count * kTile);
    __syncwarp();
    if (lane < count) bring_tile(stage + to, *source, row, t, head, column, gate);
    __syncwarp();
  }

  // Zeros past the last token, where other tokens may be, so that nothing of theirs becomes a NaN:
  // in B and x, whose other factors are 0.
  __device__ __forceinline__ void cut(const Piece &w, uint32_t stage, int tokens) const {
#pragma unroll 1
    for (int n = 0; n < kWide + w.parts; ++n) {
      const uint32_t tile = stage + (n < kWide ? n * kTile : at.x(n - kWide));
#pragma unroll 1
      for (int i = tokens * 8 + lane; i < kChunk * 8; i += 32)
        shared_store(tile + i * 16, make_int4(0, 0, 0, 0));
    }
    show_to_products();
    __syncwarp();
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    choose(w);
    each_chunk<kMode != kSiso>(p, w, [&](int t, int tokens, bool captured) {
      const uint32_t landed = shared + at.cut_gate();
      const uint32_t full = shared + at.gates() + place.stage * 16;
      const uint32_t stage = shared + place.stage * at.stage;
      // Past the end of the tensor the copy engine writes zeros by itself.
      const bool cuts = tokens < kChunk && t + tokens < p.seqlen;
      gate_wait(full + 8, place.parity ^ 1);
      if (lane == 0)
        shared_store(shared + at.notes() + place.stage * 4, tokens | (captured ? kCaptured : 0));
      fetch(w.row, t, stage, cuts ? landed : full);
      if (cuts) {
        gate_wait(landed, landings++ & 1);
        cut(w, stage, tokens);
        if (lane == 0) gate_arrive(full);
      }
      place.advance(at.stages);
    });
  }
};

// A warp, or kWarps in turn, for each head: what is per token.  A lane has two tokens of the chunk.
template <int kStates, int kHeads, int kMode>
struct TokenPreparer {
  static constexpr int kWarps = kHeads == 1 ? 2 : 1;
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedShared<kStates, kHeads, kMode> &at;
  uint32_t shared;
  int part, lane, mine;   // mine: of the warps in turn
  uint32_t chunks = 0;    // so far
  float A = 0, bias = 0;  // of the head

  // Of this lane's tokens dt', the log decay and, Mamba-3, the weights for later tokens and for the
  // token itself: h takes up what a token adds in two shares, the second with the token after it.
  // 0 past the end.
  struct Tokens {
    float dt[2], decay[2], later[2], same[2];
  };
  // The inputs, as bits, asked for ahead; Mamba-3: of the token after them, too.  Past the end the
  // last one is read.
  static constexpr int kAsked = kMode == kSiso ? 3 : 2;
  struct Inputs {
    uint32_t dts[kAsked], adts[2], traps[kAsked];

    static __device__ __forceinline__ uint32_t load(const View<3> &v, const char *from, int t) {
      const int64_t token = v.stride[1] * (v.dtype == DType::kF32 ? 4 : 2);
      return load_bits(from + t * token, v.dtype);
    }
    template <int N>
    static __device__ __forceinline__ void ask(uint32_t (&to)[N], const View<3> &v, int row,
                                               int head, int t, int end) {
      const char *const from = v.at(row, 0, head);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = load(v, from, min(t + i, end - 1));
    }
    __device__ __forceinline__ void ask(const SsdChunkProblem &p, int row, int head, int t,
                                        int end) {
      ask(dts, p.dt, row, head, t, end);
      if (!p.A.given()) ask(adts, p.adt, row, head, t, end);
      if (kMode == kSiso && p.trap.given()) ask(traps, p.trap, row, head, t, end);
    }
  };

  // left: tokens from the chunk's first to the end of the sequence.
  __device__ __forceinline__ Tokens tokens_of(const Inputs &from, int tokens, int left) const {
    Tokens v;
    float dt[kAsked], share[kAsked];
#pragma unroll
    for (int i = 0; i < kAsked; ++i) {
      dt[i] = transform_dt(p.dt_transform, value_of(from.dts[i], p.dt.dtype) + bias);
      float now = dt[i];
      share[i] = 0;
      if (kMode == kSiso && p.trap.given()) {
        const float trap = value_of(from.traps[i], p.trap.dtype);
        const float own = p.mamba3.trap_sigmoid ? trap : sigmoid(trap);
        now *= own;
        share[i] = dt[i] * (p.mamba3.trap_sigmoid ? 1.0f - trap : sigmoid(-trap));
      }
      if (i < 2) v.same[i] = now;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // What is 0, or infinite, in float32 is cut off, so that sums stay finite.
      constexpr float kMost = 288;
      float log = p.A.given() ? __fmul_rn(dt[i], A) : value_of(from.adts[i], p.adt.dtype) * kLog2e;
      log = log < -kMost ? -kMost : log > kMost ? kMost : log;
      const int at = 2 * lane + i;
      const bool own = at < tokens;
      float later = v.same[i];
      if constexpr (kMode == kSiso) later += at + 1 < left ? share[i + 1] : 0.0f;
      v.dt[i] = own ? dt[i] : 0.0f;
      v.decay[i] = own ? log : 0.0f;
      v.later[i] = own ? later : 0.0f;
      v.same[i] = own ? v.same[i] : 0.0f;
    }
    return v;
  }

  __device__ __forceinline__ void write(uint32_t to, const Tokens &v) const {
    float sum = v.decay[0] + v.decay[1];
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const float lower = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += lower;
    }
    const float last = __shfl_sync(~0u, sum, 31), end = __shfl_sync(~0u, sum, lane | 3);
    float before = __shfl_up_sync(~0u, sum, 1);
    if (lane == 0) before = 0;
    const float decay[2] = {before + v.decay[0], sum};
    const auto put = [&](int row, float a, float b) {
      shared_store(to + row + lane * 8, make_float2(a, b));
    };
    shared_store(to + offsetof(TokenValues, decay) + lane * 16,
                 make_int4(__float_as_int(decay[0]), __float_as_int(v.later[0]),
                           __float_as_int(decay[1]), __float_as_int(v.later[1])));
    put(offsetof(TokenValues, grown), exp2_fast(decay[0]), exp2_fast(decay[1]));
    put(offsetof(TokenValues, weight), exp2_fast(last - decay[0]) * v.later[0],
        exp2_fast(last - decay[1]) * v.later[1]);
    put(offsetof(TokenValues, near), exp2_fast(end - decay[0]) * v.later[0],
        exp2_fast(end - decay[1]) * v.later[1]);
    if constexpr (kMode == kSiso) {
      put(offsetof(TokenValues, same), v.same[0], v.same[1]);
      put(offsetof(TokenValues, dt), v.dt[0], v.dt[1]);
    }
    if ((lane & 3) == 3)
      shared_store(to + offsetof(TokenValues, eighths) + lane / 4 * 4, __float_as_int(end));
    if (lane == 0)
      shared_store(to + offsetof(TokenValues, last), make_float2(exp2_fast(last), last));
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (part >= w.parts || w.begin >= w.end) return;
    const int row = w.row, head = head_of(plan, w, part);
    bias = p.dt_bias.given() ? load_at(p.dt_bias, head) : 0.0f;
    A = p.A.given() ? load_at(p.A, head) * kLog2e : 0.0f;
    Inputs inputs;
    // Where chunks are as long as can be it is known where the next one of this warp begins.
    int asked = -1;
    each_chunk<kMode != kSiso>(p, w, [&](int t, int tokens, bool) {
      const uint32_t chunk = chunks++;
      if (chunk % kWarps != mine) return;
      if (asked != t) inputs.ask(p, afresh(row), afresh(head), t + 2 * lane, w.end);
      const Tokens v = tokens_of(inputs, tokens, w.end - t);
      asked = t + kWarps * kChunk;
      if (asked < w.end) inputs.ask(p, afresh(row), afresh(head), asked + 2 * lane, w.end);
      const Place place = Place::of(chunk, kValuesPlaces);
      const uint32_t full = shared + at.value_gates(part) + place.stage * 16;
      gate_wait(full + 8, place.parity ^ 1);
      write(shared + at.values(part, place.stage), v);
      __syncwarp();
      if (lane == 0) gate_arrive(full);
    });
  }
};

}  // namespace ssmk::cuda
