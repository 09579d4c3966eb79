// SPDX-License-Identifier: MIT
// The walk over the chunks of a sequence or of a segment of one.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ssd_chunk_mma_output.cuh"
#include "cuda/ssd_chunk_mma_segments.cuh"

namespace ssmk::cuda {

// The first captured token in [begin, end), or end: by all threads of a block.
__device__ __forceinline__ int next_capture(const SsdChunkProblem &p, int64_t row,
                                                int begin, int end, int *found) {
  __syncthreads();
  if (threadIdx.x == 0) *found = 0x7fffffff;
  __syncthreads();
  int mine = 0x7fffffff;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < p.ncaptures; i += blockDim.x) {
    const int64_t t = read_index(p.capture_positions, i) - row * p.seqlen;
    if (t >= begin && t < end && t - begin < mine) mine = int(t - begin);
  }
  if (mine != 0x7fffffff) atomicMin(found, mine);
  __syncthreads();
  return *found == 0x7fffffff ? end : begin + *found;
}

// State before a sequence's first token, with what that owes to the tokens before.
template <int kN>
__device__ __forceinline__ void begin_state(MmaState<kN> &h, const SsdChunkProblem &p,
                                            const MmaSpan &s, const MmaThread &t, float *area) {
  if (s.has_initial && p.initial.h.given()) {
    read_state<kN>(h, p.initial.h, s.slot, t, int(p.dstate), area);
  } else {
    clear<kN>(h);
  }
  if (s.has_initial && p.trap.given() && (p.initial.k.given() || p.initial.v.given()) &&
      s.seq_begin < s.seq_end)
    add_before<kN>(h, p, s.slot, t, first_share(p, s.row, s.seq_begin, t.head), area);
}

template <class T, int kN, bool kMamba3>
__global__ void __launch_bounds__(2 * kTeam, 1)
    ssd_mma(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
  constexpr int kBytes = kN * 2, kPieces = kN / 8;
  wait_for_previous();
  start_next();

  const MmaShared &at = plan.at;
  const int blocks = plan.blocks_per_group * int(p.ngroups);
  const int64_t index = blockIdx.x / blocks;
  const int block = int(blockIdx.x % blocks);
  MmaSpan s;
  if (!span_of(p, plan, index, &s)) return;
  if (plan.states_only && s.last) return;

  MmaThread t;
  t.team = threadIdx.x / kTeam;
  t.thread = threadIdx.x % kTeam;
  t.warp = t.thread >> 5;
  t.lane = t.thread & 31;
  // Units of a block: slices of heads.  The last block of a group may have too few: its last unit
  // is then done twice, with the same bits.
  const int per_group = int(p.nheads / p.ngroups), units = per_group * plan.slices;
  t.group = block / plan.blocks_per_group;
  const int wanted = (block % plan.blocks_per_group) * plan.heads + t.team;
  const bool spare = wanted >= units;
  const int unit = spare ? units - 1 : wanted;
  t.head = t.group * per_group + unit / plan.slices;
  t.slice = unit % plan.slices;
  t.channel = t.slice * kSlice;
  t.channels = min(int(p.headdim) - t.channel, kSlice);

  const Mamba3 &m = p.mamba3;
  const int ranks = 1 << plan.log_rank, nangles = int(m.nangles);
  const bool apart = p.out.stride[2] != 0;  // rows of out are rows, not tokens
  const int out_log_rank = apart ? plan.log_rank : 0;
  const int pieces = t.channels / 8;
  const uint32_t shared = shared_address(mma_shared);
  char *const own = mma_shared + at.teams + t.team * at.head;
  const uint32_t mine = shared_address(own);
  const auto floats = [&](int offset) { return reinterpret_cast<float *>(own + offset); };
  float *const area = floats(at.weights);  // for states: free between chunks
  int *const found = reinterpret_cast<int *>(mma_shared + at.total) - 1;

  char *const out_at = p.out.at(s.row, 0, 0, t.head, t.channel);
  const int64_t out_token = p.out.stride[1] * 2, out_rank = p.out.stride[2] * 2;
  if (s.pad) {
    if (plan.states_only || spare) return;
    const int rows_each = 1 << out_log_rank;
#pragma unroll 1
    for (int64_t i = t.thread; i < int64_t(s.end - s.begin) * rows_each * pieces; i += kTeam) {
      const int64_t row = i / pieces;
      *reinterpret_cast<uint4 *>(out_at + (s.begin + row / rows_each) * out_token +
                                 row % rows_each * out_rank + i % pieces * 16) = {0, 0, 0, 0};
    }
    return;
  }
  if (s.begin == s.end) {  // a sequence without tokens
    if (plan.states_only || spare) return;
    MmaState<kN> h;
    if (p.final.h.given()) {
      if (s.has_initial && p.initial.h.given())
        read_state<kN>(h, p.initial.h, s.slot, t, int(p.dstate), area);
      else
        clear<kN>(h);
      write_state<kN>(h, p.final.h, s.slot, t, int(p.dstate), area);
    }
    if (kMamba3) pass_parts(p, s, t, p.initial, p.final, s.slot);
    return;
  }

  // What does not change from chunk to chunk.
  TeamFacts *const facts = reinterpret_cast<TeamFacts *>(own + at.facts);
  if (t.thread == 0) {
    TeamFacts f;
    f.B = p.B.at(s.row, 0, 0, t.group, 0);
    f.C = p.C.at(s.row, 0, 0, t.group, 0);
    f.x = p.x.at(s.row, 0, t.head, t.channel);
    f.z = p.z.given() ? p.z.at(s.row, 0, t.head, t.channel) : nullptr;
    f.angles = nangles > 0 ? p.angles.at(s.row, 0, t.head, 0) : nullptr;
    f.out = out_at;
    f.A = p.A.given() ? load_at(p.A, t.head) : 0;
    f.bias = p.dt_bias.given() ? load_at(p.dt_bias, t.head) : 0;
    f.span = s;
    *facts = f;
  }
  for (int c = t.thread; c < kSlice; c += kTeam) {
    const bool there = c < t.channels;
    floats(at.D)[c] = there && p.D.given() ? load_at(p.D, t.head, t.channel + c) : 0.0f;
    floats(at.norm)[c] =
        there && m.norm_weight.given() ? load_at(m.norm_weight, t.head, t.channel + c) : 0.0f;
  }
  if constexpr (kMamba3) {
    float *const bias = floats(at.bias), *const mimo = floats(at.mimo);
#pragma unroll 1
    for (int i = t.thread; i < 2 * ranks * kN; i += kTeam) {
      const int r = i / kN % ranks, n = i % kN;
      const bool of_B = i < ranks * kN, given = of_B ? m.B_bias.given() : m.C_bias.given();
      bias[i] = !given || n >= p.dstate ? 0.0f
                : of_B                  ? load_at(m.B_bias, t.head, r, n)
                                        : load_at(m.C_bias, t.head, r, n);
    }
#pragma unroll 1
    for (int i = t.thread; at.mimo && i < 3 * ranks * kSlice; i += kTeam) {
      const int which = i / (ranks * kSlice), r = i / kSlice % ranks, c = i % kSlice;
      const auto value = [&](const View<3> &v) {
        return !v.given() ? 1.0f : c < t.channels ? load_at(v, t.head, r, t.channel + c) : 0.0f;
      };
      mimo[i] = which == 0 ? value(m.mimo_x) : which == 1 ? value(m.mimo_z) : value(m.mimo_out);
    }
    // Angles before the segment.
    uint32_t *const carry = reinterpret_cast<uint32_t *>(own + at.carry);
#pragma unroll 1
    for (int i = t.thread; i < nangles; i += kTeam) {
      uint32_t turns = 0;
      if (plan.turns) {
        turns = turns_before(p, plan, s, t.head, i);
      } else if (s.has_initial && p.initial.angle.given()) {
        turns = turns_of_angle(load_at(p.initial.angle, s.slot, t.head, i));
      }
      carry[i] = turns;
    }
  }

  MmaState<kN> h;
  if (plan.states_only) {
    clear<kN>(h);
  } else if (plan.prepared) {
    read_kept<kN>(h, kept_state<kN>(p, plan, s.index, t));
  } else {
    begin_state<kN>(h, p, s, t, area);
  }

  __syncthreads();

  // Copies ahead.
  const int end = s.end;
  const bool captures = p.ncaptures > 0 && !plan.states_only;
  const auto chunk_end = [&](int begin) {
    int stop = end - begin > plan.tokens ? begin + plan.tokens : end;
    if (captures) {
      const int token = next_capture(p, facts->span.row, begin, stop, found);
      if (token < stop) stop = token + 1;
    }
    return stop;
  };
  const auto bring_keys = [&](int begin, int tokens, int stage) {
    if (tokens > 0) {
      const uint32_t to = shared + stage * at.raw;
      const int rows = tokens << plan.log_rank, there = int(p.dstate) / 8;
      bring_rows<kPieces>(to, facts->B + begin * p.B.stride[1] * 2, p.B.stride[1] * 2,
                          p.B.stride[2] * 2, plan.log_rank, rows, kRows, there, threadIdx.x,
                          blockDim.x);
      if (!plan.states_only)
        bring_rows<kPieces>(to + kRows * kBytes, facts->C + begin * p.C.stride[1] * 2,
                            p.C.stride[1] * 2, p.C.stride[2] * 2, plan.log_rank, rows, kRows,
                            there, threadIdx.x, blockDim.x);
      if (kMamba3 && nangles > 0) {
        const int bytes = nangles * size_of(p.angles.dtype), n = bytes / 16;
        const int64_t next = p.angles.stride[1] * size_of(p.angles.dtype);
        const char *const from = facts->angles + begin * next;
#pragma unroll 1
        for (int i = t.thread; i < plan.tokens * n; i += kTeam) {
          const bool given = i / n < tokens;
          copy_ahead_if(given, mine + at.angles + i * 16,
                        given ? from + i / n * next + i % n * 16 : nullptr);
        }
      }
    }
    end_copies();
  };
  const auto bring_values = [&](int begin, int tokens) {
    if (tokens > 0)
      bring_rows<8>(mine + at.x, facts->x + begin * p.x.stride[1] * 2, p.x.stride[1] * 2, 0, 0, tokens,
                    plan.tokens, pieces, t.thread, kTeam);
    end_copies();
  };
  const auto bring_gates = [&](int begin, int tokens) {
    if (tokens > 0 && p.z.given() && !plan.states_only)
      bring_rows<8>(mine + at.z, facts->z + begin * p.z.stride[1] * 2, p.z.stride[1] * 2, 0, 0, tokens,
                    plan.tokens, pieces, t.thread, kTeam);
    end_copies();
  };

  const TokenArrays to = {floats(at.rows),
                          floats(at.rows) + kRows,
                          floats(at.rows) + 2 * kRows,
                          floats(at.rows) + 3 * kRows,
                          floats(at.rows) + 4 * kRows,
                          floats(at.dt),
                          floats(at.last)};
  const RowArrays rows_of = {to.sum, to.later, to.same, to.decay, to.ending};
  TokenBits bits;
  const auto read_ahead = [&](int begin) {
    if (t.warp == 0)
      read_tokens(bits, p, facts->span.row, begin, facts->span.seq_end, plan.tokens, t.head,
                  t.lane);
  };

  int begin = s.begin, stop = chunk_end(begin);
  read_ahead(begin);
  bring_keys(begin, stop - begin, 0);
  bring_values(begin, stop - begin);
  bring_gates(begin, stop - begin);
  float decays = 0;  // of the segment so far, in the first warp
  int stage = 0, parity = 0;
  const int block16 = t.team & 1 ? 3 - t.warp : t.warp;  // rows of S that the warp computes

  for (;;) {
    const int tokens = stop - begin, rows = tokens << plan.log_rank;
    const int next = stop, next_stop = next < end ? chunk_end(next) : next;
    const int next_tokens = next_stop - next;
    // A state that leaves after this chunk must not hold what later tokens add.
    const bool captured =
        captures && next_capture(p, facts->span.row, stop - 1, stop, found) < stop;
    const bool follows = stop < facts->span.seq_end;

    if (t.warp == 0)
      decays += prepare_rows(to, bits, p, *facts, tokens, follows, !captured, plan.tokens,
                             plan.log_rank, t.lane);
    if (next < end) read_ahead(next);

    // Keys are there; values too where they are spread over ranks now.
    if (kMamba3 && at.mimo) wait_for_all_but<1>(); else wait_for_all_but<2>();
    __syncthreads();
    uint32_t keys = shared + stage * at.raw, queries = keys + kRows * kBytes;
    uint32_t *const carry = reinterpret_cast<uint32_t *>(own + at.carry) + parity * nangles;
    uint32_t *const next_carry =
        reinterpret_cast<uint32_t *>(own + at.carry) + (parity ^ 1) * nangles;
    if constexpr (kMamba3) {
      const KeyTiles tiles = {keys, queries, mine + at.keys, mine + at.queries,
                              !plan.states_only};
      const float *const bias = floats(at.bias);
      if (nangles > 0) {
        const TurnCut cut(nangles, plan.tokens);
        uint32_t *const totals = reinterpret_cast<uint32_t *>(own + at.totals);
        sum_turns(cut, mine + at.angles, p.angles.dtype, nangles, to.dt, mine + at.turns, totals,
                  t.thread);
        meet(t.team);
        if (m.rotary_half)
          turn_keys<T, kN, true>(cut, tiles, int(p.dstate), nangles, plan.log_rank,
                                 mine + at.turns, totals, carry, next_carry, bias, t.thread);
        else
          turn_keys<T, kN, false>(cut, tiles, int(p.dstate), nangles, plan.log_rank,
                                  mine + at.turns, totals, carry, next_carry, bias, t.thread);
      }
      copy_keys<T, kN>(tiles, int(p.dstate), nangles, m.rotary_half, plan.log_rank, bias,
                       t.thread);
      if (at.mimo)
        spread_values<T>(mine + at.x, mine + at.u, floats(at.mimo), plan.log_rank, t.thread);
      __syncthreads();
      keys = mine + at.keys, queries = mine + at.queries;
      bring_keys(next, next_tokens, 0);
    } else {
      bring_keys(next, next_tokens, stage ^ 1);
    }

    MmaTile y;
    if (!plan.states_only) {
      {
        MmaTile scores;
        multiply_keys<T, kN>(scores, queries, keys, block16, t.lane);
        weigh<T>(scores, rows_of, mine + at.weights, block16, plan.log_rank, t.lane);
      }
      multiply_state<T, kN>(y, h, queries, to.decay, t.lane);
    }
    wait_for_all_but<1>();
    meet(t.team);

    MmaValues u;
    load_values(u, mine + at.u, t.warp, t.lane);
    NotFinite from = {{kRows, kRows}};
    const bool finite = __all_sync(~0u, all_finite<T>(u));
    if (!finite) from = set_apart<T>(u, t.lane);
    if (!plan.states_only) {
      multiply_values<T>(y, u, mine + at.weights, t.lane);
      if (p.D.given()) add_skip<T>(y, u, floats(at.D), t);
      if (!finite) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (i * 8 + 2 * (t.lane & 3) + (k & 1) >= from.from[k >> 1])
              y.v[i][k] = __int_as_float(0x7fffffff);
      }
      if (kMamba3 && m.norm_weight.given())
        normalise(y, floats(at.norm), m.norm_eps, floats(at.squares), t);
      if (kMamba3 && at.mimo) {
        const float *const zeta = floats(at.mimo) + ranks * kSlice;
        gate_ranks<T>(y, p.z.given(), mine + at.z, mine + at.out, zeta, zeta + ranks * kSlice,
                      m.mimo_out.given(), plan.log_rank, t.warp, t.lane);
      } else {
        gate_rows<T>(y, p.z.given(), mine + at.z, mine + at.out, t.warp, t.lane);
      }
      meet(t.team);
      if (!spare)
        store_rows(mine + at.out, facts->out + begin * out_token, out_token, out_rank, out_log_rank,
                   tokens << out_log_rank, pieces, t.thread);
    } else {
      meet(t.team);
    }
    bring_values(next, next_tokens);

    add_to_state<T, kN>(h, u, keys, to.ending, to.last[0], t.lane);
    if (!finite) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (from.from[k >> 1] < kRows) h.v[n][k] = __int_as_float(0x7fffffff);
    }
    if (captured) {
      const int row = facts->span.row;
      const int64_t position = row * p.seqlen + stop - 1;
#pragma unroll 1
      for (int64_t i = 0; i < p.ncaptures && !spare; ++i)
        if (read_index(p.capture_positions, i) == position) {
          if (p.captured.h.given()) write_state<kN>(h, p.captured.h, i, t, int(p.dstate), area);
          if (kMamba3) write_parts(p, row, stop - 1, t, p.captured, i, next_carry);
        }
      if (follows && p.trap.given()) {
        // The weight of the last token alone.
        meet(t.team);
        if (t.thread < kRows)
          to.ending[t.thread] =
              t.thread >= rows - ranks && t.thread < rows ? to.last[1] : 0.0f;
        meet(t.team);
        add_to_state<T, kN>(h, u, keys, to.ending, 1.0f, t.lane);
      }
    }
    if (next == end) {
      const MmaSpan &of = facts->span;
      if (plan.states_only) {
        keep_state<kN>(h, kept_state<kN>(p, plan, of.index, t));
        if (t.thread == 0) plan.decays[of.index * p.nheads + t.head] = decays;
      } else if (of.last && !spare) {
        if (p.final.h.given()) write_state<kN>(h, p.final.h, of.slot, t, int(p.dstate), area);
        if (kMamba3) write_parts(p, of.row, of.seq_end - 1, t, p.final, of.slot, next_carry);
      }
      return;
    }
    meet(t.team);
    bring_gates(next, next_tokens);
    begin = next, stop = next_stop;
    if (!kMamba3) stage ^= 1;
    parity ^= 1;
  }
}

}  // namespace ssmk::cuda
