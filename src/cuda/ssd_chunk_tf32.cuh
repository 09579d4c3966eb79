// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 with float32 inputs on tensor cores.
//
// As ssd_chunk_mma.cuh, with chunks of 32 tokens and factors in three products
// (ssd_chunk_tf32_products.cuh), so that results are those of float32.  A chunk takes two barriers:
//
//     S = Q K^T weighed to M        six warps have a tile each, one prepares the next chunk's tokens
//     Y^T = h Q^T                   over half of the states a warp
//     ---
//     Y^T = e Y^T + U^T M^T         half of the tokens a warp; D, the gate
//     h = exp(cs_end) h + (w U)^T K
//     ---
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ssd_chunk_mma_output.cuh"
#include "cuda/ssd_chunk_mma_prepare.cuh"
#include "cuda/ssd_chunk_tf32_products.cuh"

namespace ssmk::cuda {

constexpr int kAhead = kTeam / 32;  // chunks that are prepared together, one by each warp

template <int kN>
struct WidePlaces {
  WideRows rows[kAhead];
  BlockFacts facts;
  double decays;  // of the segment so far
  float D[kSlice];
  // Of B and of C, in stages.
  alignas(1024) char raw[2][2][kTokens * kN * 4];
  alignas(128) char x[kTokens * kWideSlice];
  alignas(128) char z[kTokens * kWideSlice];  // and the outputs
  alignas(128) char weights[kTokens * kWeightBytes];
  alignas(128) char sums[kJoinBytes];
};

// A warp prepares a chunk of `tokens`.
__device__ __forceinline__ void prepare_chunk(WideRows &to, const SsdChunkProblem &p,
                                              const BlockFacts &head, int begin, int tokens,
                                              int lane) {
  const bool own = lane < tokens;
  float dt = 0.0f;
  double sum = 0.0;
  if (own) {
    const TokenBits b = read_token(p, head.span.row, begin + lane, head.slice.head);
    dt = transformed(p.dt_transform, value_of(b.dt, p.dt.dtype) + head.bias);
    sum = log2_decay(p, b, dt, head.A);
  }
#pragma unroll
  for (int off = 1; off < 32; off *= 2) {
    const double below = __shfl_up_sync(~0u, sum, off);
    if (lane >= off) sum += below;
  }
  const double all = __shfl_sync(~0u, sum, 31);
  const float rounded = float(sum);
  to.sum[lane] = rounded;
  to.rest[lane] = float(sum - double(rounded));
  to.later[lane] = dt;
  to.decay[lane] = exp2_fast(rounded);
  to.ending[lane] = own ? exp2_fast(float(all - sum)) * dt : 0.0f;
  if (lane == 0) {
    to.all = all;
    to.last = float(exp2(all));  // its errors add up over the chunks
  }
}

// ---- The end of a chunk's outputs

// As set_apart() of 16-bit values.
__device__ __forceinline__ bool all_finite(const WideValues &u) {
  float sum = 0.0f;  // of zeros
#pragma unroll
  for (int s = 0; s < kTokens / 8; ++s)
#pragma unroll
    for (int k = 0; k < 4; ++k) sum = fmaf(u.v[s][k], 0.0f, sum);
  return sum == 0.0f;
}
__device__ __forceinline__ NotFinite set_apart(WideValues &u, int lane) {
  NotFinite found = {{kRows, kRows}};
#pragma unroll
  for (int s = kTokens / 8 - 1; s >= 0; --s)
#pragma unroll
    for (int k = 3; k >= 0; --k)
      if (!(fabsf(u.v[s][k]) < __int_as_float(0x7f800000))) {
        found.from[k & 1] = s * 8 + 2 * (lane & 3) + (k >> 1);
        u.v[s][k] = 0.0f;
      }
  found.join();
  return found;
}

// y += D u.
__device__ __forceinline__ void add_skip(WideHalf &y, const WideValues &u, const float *by,
                                         const MmaLane &t) {
  const float D[2] = {by[t.own()], by[t.own() + 8]};
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int from = (k & 1) * 2 + (k >> 1);  // tiles are transposed fragments
      y.v[i][k] = fmaf(D[k >> 1], t.half ? u.v[2 + i][from] : u.v[i][from], y.v[i][k]);
    }
}

// Gated, to the tile in which the gates are: a thread reads and writes its own.
__device__ __forceinline__ void gate_rows(const WideHalf &y, bool gated, uint32_t tile,
                                          const MmaLane &t) {
  const int g = t.lane >> 2, q = t.lane & 3;
  const uint32_t at = tile + (t.half * 16 + 2 * q) * kWideSlice +
                      ((4 * t.pair + (g >> 2)) ^ WideMix::of(2 * q)) * 16 + (g & 3) * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t to =
          ((at ^ (k >> 1 ? 32 : 0)) ^ (k & 1 ? 64 : 0)) + (8 * i + (k & 1)) * kWideSlice;
      float v = y.v[i][k];
      if (gated) {
        const float z = __uint_as_float(load_word(to));
        v *= gate(z);
      }
      store_word(to, __float_as_uint(v));
    }
}

// ---- The walk over the chunks of a sequence, or of a segment of one

// kCaptures: states are captured, which takes more registers.
template <int kN, bool kCaptures>
__global__ void __launch_bounds__(kTeam, kCaptures ? 1 : 2)
    ssd_tf32(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
  constexpr int kPieces = kN / 4, kSlicePieces = kSlice / 4, kTile = kTokens * kN * 4;
  wait_for_previous();
  start_next();

  MmaLane t;
  t.thread = threadIdx.x;
  t.lane = t.thread & 31;
  t.pair = t.thread >> 5 & 3;
  t.half = t.thread >> 7;
  const unsigned unit = blockIdx.x / unsigned(plan.slices);
  const MmaSlice of = slice_of(p, int(unit % unsigned(p.nheads)),
                               int(blockIdx.x % unsigned(plan.slices)));
  MmaSpan s;
  if (!span_of(p, plan, unit / unsigned(p.nheads), &s)) return;
  if (plan.states_only && (s.last || s.pad)) return;
  auto &own = *reinterpret_cast<WidePlaces<kN> *>(mma_shared);

  if (s.pad) {
    clear_rows(p.out.at(s.row, 0, 0, of.head, of.channel), plan.out_token, 0, 0, s.begin, s.end, of.channels / 4, t.thread);
    return;
  }
  if (s.begin == s.end) {  // a sequence without tokens
    if (!plan.states_only) pass_states(p, s, {t, of}, p.initial, p.final, s.slot);
    return;
  }

  // What does not change from chunk to chunk.
  BlockFacts *const facts = &own.facts;
  if (t.thread == 0) {
    *facts = facts_of(p, of, s);
    own.decays = 0;
  }
  if (t.thread < kSlice)
    own.D[t.thread] = t.thread < of.channels && p.D.given()
                          ? load_at(p.D, of.head, of.channel + t.thread)
                          : 0.0f;
  __syncthreads();
  const MmaSpan &span = facts->span;

  MmaState<kN, true> h;
  // For states, before the first chunk and after the last.
  float *const area = reinterpret_cast<float *>(own.raw[0]);
  if (plan.states_only || (!plan.prepared && !(span.has_initial && p.initial.h.given())))
    clear(h);
  else if (plan.prepared)
    read_kept<kN>(h, kept_state<kN>(p, plan, span.index, {t, of}));
  else
    read_state<kN>(h, p.initial.h, span.slot, {t, of}, int(p.dstate), area);
  __syncthreads();

  const auto tokens_from = [&](int begin) { return max(min(span.end - begin, kTokens), 0); };
  const auto bring_keys = [&](int begin, int stage) {
    const int tokens = tokens_from(begin);
    if (tokens > 0) {
      const uint32_t to = shared_address(own.raw[stage]);
      bring_rows<kPieces, kTokens, WideMix>(to, facts->B + begin * plan.B_token, plan.B_token, 0, 0,
                                            tokens, kTokens, int(p.dstate) / 4, t.thread);
      if (!plan.states_only)
        bring_rows<kPieces, kTokens, WideMix>(to + kTile, facts->C + begin * plan.C_token,
                                              plan.C_token, 0, 0, tokens, kTokens,
                                              int(p.dstate) / 4, t.thread);
    }
    end_copies();
  };
  const auto bring_values = [&](int begin) {
    const int tokens = tokens_from(begin), pieces = facts->slice.channels / 4;
    if (tokens > 0) {
      bring_rows<kSlicePieces, kTokens, WideMix>(shared_address(own.x),
                                                 facts->x + begin * plan.x_token, plan.x_token, 0,
                                                 0, tokens, kTokens, pieces, t.thread);
      if (p.z.given() && !plan.states_only)
        bring_rows<kSlicePieces, kTokens, WideMix>(shared_address(own.z),
                                                   facts->z + begin * plan.z_token, plan.z_token, 0,
                                                   0, tokens, kTokens, pieces, t.thread);
    }
    end_copies();
  };

  const auto prepare = [&](int begin) {
    const int first = begin + t.thread / 32 * kTokens;
    if (tokens_from(first) > 0)
      prepare_chunk(own.rows[t.thread / 32], p, *facts, first, tokens_from(first), t.lane);
    // The next time's are on their way to the second-level cache.
    if (t.lane < tokens_from(first + kAhead * kTokens)) {
      const int64_t token = first + kAhead * kTokens + t.lane;
      fetch(p.dt.at(span.row, token, facts->slice.head));
      if (p.adt.given()) fetch(p.adt.at(span.row, token, facts->slice.head));
    }
  };

  const auto capture = [&](const WideValues &u, uint32_t keys, const WideRows &w, int begin) {
#pragma unroll 1
    for (int64_t i = 0; i < p.ncaptures; i += 32) {
      const int64_t mine =
          i + t.lane < p.ncaptures ? read_index(p.capture_positions, i + t.lane) : -1;
      const int64_t token = mine - span.row * p.seqlen - begin;
      uint32_t here = __ballot_sync(~0u, mine >= 0 && token >= 0 && token < tokens_from(begin));
#pragma unroll 1
      for (; here; here &= here - 1) {
        const int lane = __ffs(here) - 1;
        write_state_after(h, u, keys, w, __shfl_sync(~0u, int(token), lane), p.captured.h, i + lane,
                          {t, facts->slice}, int(p.dstate));
      }
    }
  };

  bring_keys(span.begin, 0);
  bring_values(span.begin);
  bring_keys(span.begin + kTokens, 1);
  wait_for_all_but<2>();

#pragma unroll 1
  for (int chunk = 0;; ++chunk) {
    t.forget();
    const int begin = span.begin + chunk * kTokens, stage = chunk & 1;
    if (chunk % kAhead == 0) {
      prepare(begin);
      __syncthreads();
    }
    t.forget();
    const WideRows &w = own.rows[chunk % kAhead];
    const uint32_t keys = shared_address(own.raw[stage]), queries = keys + kTile;
    const uint32_t weights = shared_address(own.weights), sums = shared_address(own.sums);
    WideHalf y;
    if (!plan.states_only) {
      const int warp = t.thread / 32;
      if (warp < 6)
        multiply_keys_wide<kN>(queries, keys, w, weights, warp < 4 ? 1 : 0, warp & 3, t.lane);
    } else if (t.thread == 0) {
      own.decays += w.all;
    }
    if (!plan.states_only) {
      t.forget();
      MmaTile<kTokens> all;
      multiply_state_wide<kN>(all, h, queries, t.half, t.lane);
      send_half(all, y, sums, t.pair, t.half, t.lane);
    }
    wait_for_all_but<1>();  // values, and gates, are there
    __syncthreads();

    t.forget();
    WideValues u;
    load_values(u, shared_address(own.x), t.pair, t.lane);
    if (!plan.states_only) {
      join_half(y, sums, w.decay, t.pair, t.half, t.lane);
      const bool finite = __all_sync(~0u, all_finite(u));
      NotFinite from = {{kRows, kRows}};
      if (!finite) from = set_apart(u, t.lane);
      if (t.half)
        multiply_half_wide<1>(y, u, weights, t.lane);
      else
        multiply_half_wide<0>(y, u, weights, t.lane);
      if (!finite) {
        forbid(y, from, t);
        load_values(u, shared_address(own.x), t.pair, t.lane);
      }
      if (p.D.given()) add_skip(y, u, own.D, t);
      t.forget();
      gate_rows(y, p.z.given(), shared_address(own.z), t);
    }
    t.forget();
    if (kCaptures && !plan.states_only) capture(u, keys, w, begin);
    add_to_state_wide<kN>(h, u, keys, w, t.half, t.lane);
    wait_for_all_but<0>();  // the next chunk's keys
    __syncthreads();

    t.forget();
    if (!plan.states_only)
      store_rows<kSlicePieces, kTokens, WideMix>(
          shared_address(own.z), facts->out + begin * plan.out_token, plan.out_token, 0, 0,
          tokens_from(begin), facts->slice.channels / 4, t.thread);
    const int next = begin + kTokens;
    if (next >= span.end) break;
    bring_values(next);
    bring_keys(next + kTokens, stage);
  }

  if (plan.states_only) {
    keep_state<kN>(h, kept_state<kN>(p, plan, span.index, {t, facts->slice}));
    if (t.thread == 0) plan.decays[span.index * p.nheads + facts->slice.head] = float(own.decays);
  } else if (span.last && p.final.h.given()) {
    write_state<kN>(h, p.final.h, span.slot, {t, facts->slice}, int(p.dstate), area);
  }
}

}  // namespace ssmk::cuda
