// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 with float32 inputs on tensor cores.
//
// As ssd_chunk_mma.cuh, with chunks of 32 tokens and factors in three products
// (ssd_chunk_tf32_products.cuh), so that results are those of float32.  A chunk takes two barriers:
//
//     S = Q K^T weighed to M        tiles of 16 x 8 by some of the warps
//     Y^T = h Q^T                   over half of the states a warp
//     ---
//     Y^T = e Y^T + U^T M^T         half of the tokens a warp; D, the gate
//     h = exp(cs_end) h + (w U)^T K
//     ---
//
// On 9.0 the two products with h are those of warpgroups, whose factors in shared memory are split
// before: one barrier more (ssd_chunk_tf32_group.cuh).
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ssd_chunk_mma_output.cuh"
#include "cuda/ssd_chunk_mma_prepare.cuh"
#include "cuda/ssd_chunk_tf32_group.cuh"

namespace ssmk::cuda {

// In shared memory.  kGroups: products with the state are those of warpgroups.
template <int kN, bool kGroups>
struct WidePlaces {
  static constexpr int kStages = kGroups ? 1 : 2;
  static constexpr int kAhead = kGroups ? 4 : 8;  // chunks that are prepared together, a warp each

  WideRows rows[kAhead];
  BlockFacts facts;
  double decays;  // of the segment so far
  float D[kSlice];
  // Of B and of C, in stages; keys turned round, and the rests of both.
  alignas(1024) char queries[kGroups ? 2 : kStages][kWideTile<kN>];
  alignas(1024) char turned[kGroups ? 2 : 1][kGroups ? kWideTile<kN> : 16];
  alignas(1024) char keys[kStages][kWideTile<kN>];
  alignas(128) char x[kTokens * kWideBytes];
  alignas(128) char z[kTokens * kWideBytes];  // and the outputs
  alignas(128) char weights[kPartTile];
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
    const int64_t row = head.span.row, token = begin + lane;
    dt = transform_dt(p.dt_transform, load_at(p.dt, row, token, head.slice.head) + head.bias);
    sum = log2_decay(p.adt.given() ? double(load_at(p.adt, row, token, head.slice.head))
                                   : double(dt) * head.A);
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

// The sums over half of the states: those of the other warp's half of the tokens go to `sums`.
__device__ __forceinline__ void send_half(const MmaTile<kTokens> &y, WideHalf &own, uint32_t sums,
                                          const MmaLane &t) {
  const uint32_t at = sums + t.pair * 2048 + t.half * 1024 + t.lane * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sent[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sent[k] = t.half ? y.v[i][k] : y.v[2 + i][k];
      own.v[i][k] = t.half ? y.v[2 + i][k] : y.v[i][k];
    }
    store_four_words(at + i * 512, {__float_as_uint(sent[0]), __float_as_uint(sent[1]),
                                    __float_as_uint(sent[2]), __float_as_uint(sent[3])});
  }
}
// And the other warp's for this one's come from there; all times exp(cs) of the tokens.
__device__ __forceinline__ void join_half(WideHalf &y, uint32_t sums, const float *decay,
                                          const MmaLane &t) {
  const uint32_t at = sums + t.pair * 2048 + (t.half ^ 1) * 1024 + t.lane * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 v = load_four_words(at + i * 512);
    const float2 e =
        *reinterpret_cast<const float2 *>(decay + t.half * 16 + i * 8 + 2 * (t.lane & 3));
    y.v[i][0] = (y.v[i][0] + __uint_as_float(v.x)) * e.x;
    y.v[i][1] = (y.v[i][1] + __uint_as_float(v.y)) * e.y;
    y.v[i][2] = (y.v[i][2] + __uint_as_float(v.z)) * e.x;
    y.v[i][3] = (y.v[i][3] + __uint_as_float(v.w)) * e.y;
  }
}

// Gated, to the tile in which the gates are: a thread reads and writes its own.
__device__ __forceinline__ void gate_rows(const WideHalf &y, bool gated, uint32_t tile,
                                          const MmaLane &t) {
  const int g = t.lane >> 2, q = t.lane & 3;
  const uint32_t at =
      tile + piece_at(t.half * 16 + 2 * q, 4 * t.pair + (g >> 2), kWideBytes) + (g & 3) * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t to = (at ^ (k >> 1) << 5 ^ (k & 1) << 4) + (8 * i + (k & 1)) * kWideBytes;
      float v = y.v[i][k];
      if (gated) {
        const float z = __uint_as_float(load_word(to));
        v *= gate(z);
      }
      store_word(to, __float_as_uint(v));
    }
}

__device__ __forceinline__ MmaLane lane_of(int thread) {
  return {thread, thread & 31, thread >> 5 & 3, thread >> 7};
}

// ---- The walk over the chunks of a sequence, or of a segment of one

// kCaptures: states are captured, which takes more registers.
template <int kN, bool kGroups, bool kCaptures>
__device__ __forceinline__ void walk_wide(const SsdChunkProblem &p, const MmaPlan &plan) {
  using Places = WidePlaces<kN, kGroups>;
  constexpr int kAhead = Places::kAhead, kSlicePieces = kSlice / 4;

  MmaLane t = lane_of(thread_number());
  const unsigned unit = blockIdx.x / unsigned(plan.slices);
  const HeadSlice of =
      slice_of(p, int(unit % unsigned(p.nheads)), int(blockIdx.x % unsigned(plan.slices)));
  MmaSpan s;
  if (!span_of(p, plan, unit / unsigned(p.nheads), &s)) return;
  if (plan.states_only && (s.last || s.pad)) return;
  auto &own = *reinterpret_cast<Places *>(mma_shared);

  if (s.pad) {
    clear_rows(p.out.at(s.row, 0, 0, of.head, of.channel), plan.out_token, 0, 0, s.begin, s.end,
               of.channels / 4, t.thread);
    return;
  }
  if (s.begin == s.end) {  // a sequence without tokens
    if (!plan.states_only)
      pass_states(p, s.has_initial, s.slot, of, p.initial, p.final, s.slot, t.thread, kTeam);
    return;
  }

  // What does not change from chunk to chunk.
  BlockFacts *const facts = &own.facts;
  if (t.thread == 0) {
    *facts = facts_of(p, of, s);
    own.decays = 0;
  }
  if (t.thread < kSlice)
    own.D[t.thread] =
        t.thread < of.channels && p.D.given() ? load_at(p.D, of.head, of.channel + t.thread) : 0.0f;
  __syncthreads();
  const MmaSpan &span = facts->span;

  MmaState<kN, true> h;
  // For states, before the first chunk and after the last.
  float *const area = reinterpret_cast<float *>(own.queries[0]);
  if (plan.states_only || (!plan.prepared && !(span.has_initial && p.initial.h.given())))
    clear(h);
  else if (plan.prepared)
    read_kept<kN>(h, kept_state<kN>(p, plan, span.index, {t, of}));
  else
    read_state<kN>(h, p.initial.h, span.slot, {t, of}, int(p.dstate), area);
  __syncthreads();

  const auto tokens_from = [&](int begin) { return max(min(span.end - begin, kTokens), 0); };
  const auto bring_tiles = [&](char *to, const char *from, int64_t token, int tokens) {
#pragma unroll
    for (int part = 0; part < kN / 32; ++part)
      bring_rows<8, kTokens>(shared_address(to) + part * kPartTile, from + part * kPartBytes, token,
                             0, 0, tokens, kTokens, int(p.dstate) / 4 - part * 8, t.thread);
  };
  const auto bring_keys = [&](int begin, int stage) {
    const int tokens = tokens_from(begin);
    if (tokens > 0) {
      bring_tiles(own.keys[stage], facts->B + begin * plan.B_token, plan.B_token, tokens);
      if (!plan.states_only)
        bring_tiles(own.queries[stage], facts->C + begin * plan.C_token, plan.C_token, tokens);
    }
    end_copies();
  };
  const auto bring_values = [&](int begin) {
    const int tokens = tokens_from(begin), pieces = facts->slice.channels / 4;
    const auto bring = [&](char *to, const char *from, int64_t token) {
      asm volatile("" : "+l"(token));  // its multiples, too, are found anew
      bring_rows<kSlicePieces, kTokens>(shared_address(to), from + begin * token, token, 0, 0,
                                        tokens, kTokens, pieces, t.thread);
    };
    if (tokens > 0) {
      bring(own.x, facts->x, plan.x_token);
      if (p.z.given() && !plan.states_only) bring(own.z, facts->z, plan.z_token);
    }
    end_copies();
  };

  const auto prepare = [&](int begin) {
    if (t.thread / 32 >= kAhead) return;
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
  if (!kGroups) bring_keys(span.begin + kTokens, 1);
  wait_for_all_but<kGroups ? 1 : 2>();
  __syncthreads();

#pragma unroll 1
  for (int chunk = 0;; ++chunk) {
    // What follows from the chunk's number, as from the thread's, is found anew where it is used.
    const auto forget = [&] {
      asm volatile("" : "+r"(chunk));
      t = lane_of(thread_number());
    };
    const auto begin = [&] { return span.begin + chunk * kTokens; };
    const auto stage = [&] { return kGroups ? 0 : chunk & 1; };
    const auto rows = [&]() -> const WideRows & { return own.rows[chunk % kAhead]; };
    const auto keys = [&] { return shared_address(own.keys[stage()]); };
    const auto queries = [&] { return shared_address(own.queries[stage()]); };
    const auto warp = [&] { return __shfl_sync(~0u, t.thread / 32, 0); };
    forget();
    if (chunk % kAhead == 0) {
      prepare(begin());
      if (!kGroups) __syncthreads();
    }
    forget();
    if constexpr (kGroups) {
      split_tiles<kN>(queries(), keys(), shared_address(own.turned[0]), !plan.states_only,
                      t.thread);
      show_to_products();
      __syncthreads();
      forget();
    }
    WideHalf y;
    if (!plan.states_only) {
      MmaTile<kTokens> all;
      const auto products = [&] {
        const int w = warp();
        if (kGroups ? w < 3 : w < 6)
          multiply_keys<kN, kGroups>(queries(), keys(), rows(), shared_address(own.weights),
                                     w < (kGroups ? 2 : 4) ? 1 : 0,
                                     kGroups ? (w == 1 ? 2 : 0) : w & 3, t.lane);
      };
      if constexpr (kGroups) {
        multiply_state_group<kN>(all, h, queries(), warp() / 4, products);
      } else {
        products();
        forget();
        multiply_state<kN>(all, h, queries(), t.half, t.lane);
      }
      send_half(all, y, shared_address(own.sums), t);
    } else if (t.thread == 0) {
      own.decays += rows().all;
    }
    wait_for_all_but<kGroups ? 0 : 1>();  // values, and gates, are there
    __syncthreads();

    forget();
    if (kGroups) bring_keys(begin() + kTokens, 0);
    WideValues u;
    load_values(u, shared_address(own.x), t.pair, t.lane);
    if (!plan.states_only) {
      join_half(y, shared_address(own.sums), rows().decay, t);
      const bool finite = __all_sync(~0u, all_finite(u));
      NotFinite from = {{kRows, kRows}};
      if (!finite) from = set_apart(u, t.lane);
      if (t.half)
        multiply_half<1, kGroups>(y, u, shared_address(own.weights), t.lane);
      else
        multiply_half<0, kGroups>(y, u, shared_address(own.weights), t.lane);
      if (!finite) {
        forbid(y, from, t);
        load_values(u, shared_address(own.x), t.pair, t.lane);
      }
      if (p.D.given()) add_skip(y, u, own.D, t);
      forget();
      gate_rows(y, p.z.given(), shared_address(own.z), t);
    }
    forget();
    if constexpr (kCaptures)
      if (!plan.states_only) capture(u, keys(), rows(), begin());
    if constexpr (kGroups)
      add_to_state_group<kN>(h, u, shared_address(own.turned[0]), rows(), warp() / 4, t.lane);
    else
      add_to_state<kN>(h, u, keys(), rows(), t.half, t.lane);
    wait_for_all_but<0>();  // the next chunk's keys
    __syncthreads();

    forget();
    if (!plan.states_only)
      store_rows<kSlicePieces, kTokens>(shared_address(own.z),
                                        facts->out + begin() * plan.out_token, plan.out_token, 0, 0,
                                        tokens_from(begin()), facts->slice.channels / 4, t.thread);
    const int next = begin() + kTokens;
    if (next >= span.end) break;
    bring_values(next);
    // This chunk's stage, in other words: what stage() found earlier would wait in a register.
    if (!kGroups) bring_keys(next + kTokens, ((next - span.begin) / kTokens + 1) & 1);
  }

  t = lane_of(thread_number());
  if (plan.states_only) {
    keep_state<kN>(h, kept_state<kN>(p, plan, span.index, {t, facts->slice}));
    if (t.thread == 0) plan.decays[span.index * p.nheads + facts->slice.head] = float(own.decays);
  } else if (span.last && p.final.h.given()) {
    write_state<kN>(h, p.final.h, span.slot, {t, facts->slice}, int(p.dstate), area);
  }
}

template <int kN, bool kGroups, bool kCaptures>
__global__ void __launch_bounds__(kTeam, kCaptures ? 1 : 2)
    ssd_tf32(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kHere = true;
#else
  constexpr bool kHere = !kGroups;
#endif
  if constexpr (kHere) {
    wait_for_previous();
    start_next();
    walk_wide<kN, kGroups, kCaptures>(p, plan);
  }
}

}  // namespace ssmk::cuda
