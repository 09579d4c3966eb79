// SPDX-License-Identifier: MIT
// The walk over the chunks of a sequence or of a segment of one.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ssd_chunk_mma_output.cuh"
#include "cuda/ssd_chunk_mma_segments.cuh"

namespace ssmk::cuda {

// The first captured token in [begin, end), or end: by all threads of a block.
__device__ __forceinline__ int next_capture(const SsdChunkProblem &p, int64_t row, int begin,
                                            int end, int *found) {
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

template <class T, int kN, int kKind>
__global__ void __launch_bounds__(kTeam, 2)
    ssd_mma(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ MmaPlan plan) {
  constexpr bool kMamba3 = kKind != kMamba2, kRanks = kKind == kMimo;
  constexpr int kBytes = kN * 2, kPieces = kN / 8;
  wait_for_previous();
  start_next();

  const MmaShared &at = plan.at;
  MmaLane t;
  t.thread = threadIdx.x;
  t.lane = t.thread & 31;
  t.pair = t.thread >> 5 & 3;
  t.half = t.thread >> 7;
  const unsigned unit = blockIdx.x / unsigned(plan.slices);
  const HeadSlice of =
      slice_of(p, int(unit % unsigned(p.nheads)), int(blockIdx.x % unsigned(plan.slices)));
  MmaSpan s;
  if (!span_of(p, plan, unit / unsigned(p.nheads), &s)) return;
  if (plan.states_only && (s.last || s.pad)) return;

  const Mamba3 &m = p.mamba3;
  const int log_rank = kRanks ? plan.log_rank : 0, ranks = 1 << log_rank, nangles = int(m.nangles);
  const bool apart = kRanks && plan.out_rank != 0;  // rows of out are rows, not tokens
  const int out_log_rank = apart ? log_rank : 0;
  auto &own = *reinterpret_cast<MmaPlaces<kN, kKind> *>(mma_shared);
  const uint32_t shared = shared_address(mma_shared);
  const auto floats = [&](int offset) { return reinterpret_cast<float *>(mma_shared + offset); };
  const auto words = [&](int offset) { return reinterpret_cast<uint32_t *>(mma_shared + offset); };
  const auto u_at = [&] { return kRanks ? shared + at.u : shared_address(own.x); };
  const auto rows_out = [&] { return kRanks && at.out ? shared + at.out : shared_address(own.z); };
  float *const area = reinterpret_cast<float *>(own.weights);  // for states: free between chunks
  int *const found = &own.found;

  if (s.pad) {
    clear_rows(p.out.at(s.row, 0, 0, of.head, of.channel), plan.out_token, plan.out_rank,
               out_log_rank, s.begin, s.end, of.channels / 8, t.thread);
    return;
  }
  if (s.begin == s.end) {  // a sequence without tokens
    if (plan.states_only) return;
    pass_states(p, s.has_initial, s.slot, of, p.initial, p.final, s.slot, t.thread, kTeam);
    return;
  }

  // What does not change from chunk to chunk.
  BlockFacts *const facts = &own.facts;
  if (t.thread == 0) {
    *facts = facts_of(p, of, s);
    own.decays = 0;
  }
  __syncthreads();
  const MmaSpan &span = facts->span;
  if (t.thread < kSlice) {
    const int c = t.thread;
    const bool there = c < of.channels;
    own.D[c] = there && p.D.given() ? load_at(p.D, of.head, of.channel + c) : 0.0f;
    own.norm[c] =
        there && m.norm_weight.given() ? load_at(m.norm_weight, of.head, of.channel + c) : 0.0f;
  }
  if constexpr (kMamba3) {
    float *const bias = floats(at.bias), *const mimo = floats(at.mimo);
#pragma unroll 1
    for (int i = t.thread; i < 2 * ranks * kN; i += kTeam) {
      const int r = i / kN % ranks, n = i % kN;
      const bool of_B = i < ranks * kN, given = of_B ? m.B_bias.given() : m.C_bias.given();
      bias[i] = !given || n >= p.dstate ? 0.0f
                : of_B                  ? load_at(m.B_bias, of.head, r, n)
                                        : load_at(m.C_bias, of.head, r, n);
    }
#pragma unroll 1
    for (int i = t.thread; kRanks && i < 3 * ranks * kSlice; i += kTeam) {
      const int which = i / (ranks * kSlice), r = i / kSlice % ranks, c = i % kSlice;
      const auto value = [&](const View<3> &v) {
        return !v.given() ? 1.0f : c < of.channels ? load_at(v, of.head, r, of.channel + c) : 0.0f;
      };
      mimo[i] = which == 0 ? value(m.mimo_x) : which == 1 ? value(m.mimo_z) : value(m.mimo_out);
    }
    // Angles before the segment.
#pragma unroll 1
    for (int i = t.thread; i < nangles; i += kTeam) {
      uint32_t turns = 0;
      if (plan.turns) {
        turns = turns_before(p, plan, span, of.head, i);
      } else if (span.has_initial && p.initial.angle.given()) {
        turns = turns_of_angle(load_at(p.initial.angle, span.slot, of.head, i));
      }
      words(at.carry)[i] = turns;
    }
  }

  MmaState<kN> h;
  if (plan.states_only) {
    clear<kN>(h);
  } else if (plan.prepared) {
    read_kept<kN>(h, kept_state<kN>(p, plan, span.index, {t, of}));
  } else {
    begin_state<kN>(h, p, span, {t, of}, area);
  }
  __syncthreads();

  // Copies ahead.
  const bool captures = p.ncaptures > 0 && !plan.states_only;
  const auto chunk_end = [&](int begin) {
    const int end = span.end;
    int stop = end - begin > plan.tokens ? begin + plan.tokens : end;
    if (captures) {
      const int token = next_capture(p, span.row, begin, stop, found);
      if (token < stop) stop = token + 1;
    }
    return stop;
  };
  const auto is_captured = [&](int stop) {
    return captures && next_capture(p, span.row, stop - 1, stop, found) < stop;
  };
  const auto bring_keys = [&](int begin, int tokens, int stage) {
    if (tokens > 0) {
      const uint32_t to = shared_address(own.raw[stage]);
      const int rows = tokens << log_rank, there = int(p.dstate) / 8;
      bring_rows<kPieces, kRows>(to, facts->B + begin * plan.B_token, plan.B_token, plan.B_rank,
                                 log_rank, rows, kRows, there, t.thread);
      if (!plan.states_only)
        bring_rows<kPieces, kRows>(to + kRows * kBytes, facts->C + begin * plan.C_token,
                                   plan.C_token, plan.C_rank, log_rank, rows, kRows, there,
                                   t.thread);
      if (kMamba3 && nangles > 0) {
        const int n = nangles * size_of(p.angles.dtype) / 16, piece = t.thread % 16;
        const uint32_t to = shared + at.angles + piece * 16;
        const char *from = facts->angles + (begin + t.thread / 16) * plan.angles_token + piece * 16;
#pragma unroll 1
        for (int i = t.thread / 16; i < plan.tokens; i += kTeam / 16) {
          if (piece < n) copy_ahead_if(i < tokens, to + i * n * 16, from);
          from += kTeam / 16 * plan.angles_token;
        }
      }
    }
    end_copies();
  };
  const auto bring_values = [&](int begin, int tokens) {
    if (tokens > 0)
      bring_rows<8, kRows>(shared_address(own.x), facts->x + begin * plan.x_token, plan.x_token, 0,
                           0, tokens, plan.tokens, facts->slice.channels / 8, t.thread);
    end_copies();
  };
  const auto bring_gates = [&](int begin, int tokens) {
    if (tokens > 0 && p.z.given() && !plan.states_only)
      bring_rows<8, kRows>(shared_address(own.z), facts->z + begin * plan.z_token, plan.z_token, 0,
                           0, tokens, plan.tokens, facts->slice.channels / 8, t.thread);
    end_copies();
  };

  // Rows are prepared a chunk ahead, tokens by the last 96 threads.
  const auto token_of = [&] { return t.thread - (kTeam - 96); };
  const auto read_ahead = [&](int begin, int stop) {
    const int i = token_of();
    return i >= 0 && i <= plan.tokens && begin < stop && begin + i < span.seq_end
               ? read_token(p, span.row, begin + i, facts->slice.head)
               : TokenBits{};
  };
  const auto prepare_tokens = [&](const TokenBits &bits, const MmaStep &step, int parity) {
    const int i = token_of();
    if (i >= 0 && i <= plan.tokens && step.begin < step.stop)
      prepare_token(own.terms, own.rows[parity].dt, bits, p, *facts, i, step.stop - step.begin,
                    step.stop < span.seq_end, plan.tokens);
  };
  const auto prepare_sums = [&](const MmaStep &step) {
    if (t.thread >= 32 || step.begin == step.stop) return;
    sum_decays(own.terms, plan.tokens, t.lane);
    if (t.lane == 31) own.decays += float(own.terms.all);
  };
  const auto prepare_rows = [&](const MmaStep &step, int parity) {
    if (t.thread < kRows && step.begin < step.stop)
      prepare_row(own.rows[parity], own.terms, t.thread, step.stop - step.begin, !step.captured,
                  log_rank);
  };

  int parity = 0;  // of the chunk's number
  {
    const int begin = span.begin, stop = chunk_end(begin);
    const bool captured = is_captured(stop);
    if (t.thread == 0) own.steps[0] = {begin, stop, captured};
    bring_keys(begin, stop - begin, 0);
    bring_values(begin, stop - begin);
    bring_gates(begin, stop - begin);
    const TokenBits bits = read_ahead(begin, stop);
    __syncthreads();
    prepare_tokens(bits, own.steps[0], 0);
    __syncthreads();
    prepare_sums(own.steps[0]);
    __syncthreads();
    prepare_rows(own.steps[0], 0);
    __syncthreads();
  }

#pragma unroll 1
  for (;;) {
    t.forget();
    RowArrays &rows = own.rows[parity];
    const MmaStep &now = own.steps[parity];
    MmaStep &then = own.steps[parity ^ 1];
    TokenBits bits;
    {
      const int next = now.stop, stop = next < span.end ? chunk_end(next) : next;
      const bool captured = next < span.end && is_captured(stop);
      if (t.thread == 0) then = {next, stop, captured};
      bits = read_ahead(next, stop);
    }

    // Keys are there; values too where they are spread over ranks now.
    if (kRanks)
      wait_for_all_but<1>();
    else
      wait_for_all_but<2>();
    __syncthreads();
    prepare_tokens(bits, then, parity ^ 1);
    t.forget();
    uint32_t keys = shared_address(own.raw[kMamba3 ? 0 : parity]), queries = keys + kRows * kBytes;
    const auto carried = [&](int of) { return words(at.carry) + (of ? nangles : 0); };
    if constexpr (kMamba3) {
      const KeyTiles tiles = {keys, queries, shared_address(own.keys[0]),
                              shared_address(own.keys[1]), !plan.states_only};
      const float *const bias = floats(at.bias);
      if (nangles > 0) {
        const TurnCut &cut = plan.turn_cut;
        sum_turns<4>(cut, shared + at.angles, p.angles.dtype, nangles, rows.dt,
                     shared_address(own.weights), own.totals, t.thread);
        __syncthreads();
        const TurnBase base =
            turn_base(cut, nangles, own.totals, carried(parity), carried(parity ^ 1), t.thread);
        if (m.rotary_half)
          turn_keys<T, KeyRows<kN>, kRanks, true, 4>(cut, tiles, int(p.dstate), nangles, log_rank,
                                                     shared_address(own.weights), base, bias,
                                                     t.thread);
        else
          turn_keys<T, KeyRows<kN>, kRanks, false, 4>(cut, tiles, int(p.dstate), nangles, log_rank,
                                                      shared_address(own.weights), base, bias,
                                                      t.thread);
      }
      copy_keys<T, KeyRows<kN>, kRanks, 2>(tiles, int(p.dstate), nangles, m.rotary_half, log_rank,
                                           bias, t.thread, kTeam);
      if (kRanks)
        spread_values<T>(shared_address(own.x), shared + at.u, floats(at.mimo), log_rank, t.thread);
      __syncthreads();
      keys = shared_address(own.keys[0]), queries = shared_address(own.keys[1]);
    }
    bring_keys(then.begin, then.stop - then.begin, kMamba3 ? 0 : parity ^ 1);

    t.forget();
    MmaValues u;
    if (plan.states_only) {
      wait_for_all_but<1>();
      __syncthreads();
      prepare_sums(then);
      load_values(u, u_at(), t.pair, t.lane);
      __syncthreads();
    } else {
      MmaRows sums;
      multiply_keys<T, kN>(queries, keys, rows, shared_address(own.weights), t.pair, t.half,
                           log_rank, t.lane);
      multiply_state<T, kN>(sums, h, queries, t.half, t.lane);
      wait_for_all_but<1>();
      __syncthreads();

      t.forget();
      MmaHalf y;
      join_halves(y, sums, kN < 128 ? shared + at.sums : queries, rows.decay, t.pair, t.half,
                  t.lane);
      load_values(u, u_at(), t.pair, t.lane);
      const bool finite = __all_sync(~0u, all_finite<T>(u));
      NotFinite from = {{kRows, kRows}};
      if (!finite) from = set_apart<T>(u, t.lane);
      multiply_values<T>(y, u, shared_address(own.weights), t.half, t.lane);
      if (!finite) {
        forbid(y, from, t);
        load_values(u, u_at(), t.pair, t.lane);
      }
      prepare_sums(then);
      if (p.D.given()) add_skip<T>(y, u, own.D, t);
      if (kMamba3 && m.norm_weight.given())
        normalise(y, own.norm, m.norm_eps, own.squares, {t, facts->slice});
      t.forget();
      if (kRanks) {
        const float *const zeta = floats(at.mimo) + ranks * kSlice;
        gate_ranks<T>(y, p.z.given(), shared_address(own.z), rows_out(), zeta,
                      zeta + ranks * kSlice, m.mimo_out.given(), log_rank, t.pair, t.half, t.lane);
      } else {
        gate_rows<T>(y, p.z.given(), shared_address(own.z), rows_out(), t.pair, t.half, t.lane);
      }
      t.forget();
      __syncthreads();
      store_rows(rows_out(), facts->out + now.begin * plan.out_token, plan.out_token, plan.out_rank,
                 out_log_rank, (now.stop - now.begin) << out_log_rank, facts->slice.channels / 8,
                 t.thread);
    }
    prepare_rows(then, parity ^ 1);
    if (!now.captured) bring_values(then.begin, then.stop - then.begin);
    t.forget();

    add_to_state<T, kN>(h, u, keys, rows.ending, rows.last[0], t.half, t.lane);
    const bool ends = now.stop == span.end, captured = now.captured;
    const int stop = now.stop;
    if (captured || (ends && span.last)) {
      const MmaThread who = {t, facts->slice};
      const int64_t position = span.row * p.seqlen + stop - 1;
      // Entries of the captured states, then the sequence's own.
#pragma unroll 1
      for (int64_t i = captured ? 0 : p.ncaptures; i <= p.ncaptures; ++i) {
        const bool own_end = i == p.ncaptures;
        if (own_end ? !(ends && span.last) : read_index(p.capture_positions, i) != position)
          continue;
        const HeadStates &to = own_end ? p.final : p.captured;
        const int64_t entry = own_end ? span.slot : i;
        if (to.h.given()) write_state<kN>(h, to.h, entry, who, int(p.dstate), area);
        if (kMamba3)
          write_parts(p, span.row, stop - 1, HeadSlice(who), to, entry, carried(parity ^ 1),
                      t.thread, kTeam);
      }
      if (p.trap.given() && stop < span.seq_end) {
        // The weight of the last token alone.
        const int last = (stop - now.begin) << log_rank;
        __syncthreads();
        if (t.thread < kRows)
          rows.ending[t.thread] = t.thread >= last - ranks && t.thread < last ? rows.last[1] : 0.0f;
        __syncthreads();
        load_values(u, u_at(), t.pair, t.lane);
        add_to_state<T, kN>(h, u, keys, rows.ending, 1.0f, t.half, t.lane);
        __syncthreads();
      }
      if (captured) bring_values(then.begin, then.stop - then.begin);
    }
    if (ends) {
      if (plan.states_only) {
        const int index = span.index;
        keep_state<kN>(h, kept_state<kN>(p, plan, index, {t, facts->slice}));
        if (t.thread == 0) plan.decays[index * p.nheads + facts->slice.head] = own.decays;
      }
      return;
    }
    __syncthreads();
    bring_gates(then.begin, then.stop - then.begin);
    parity ^= 1;
  }
}

}  // namespace ssmk::cuda
