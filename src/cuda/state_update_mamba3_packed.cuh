// SPDX-License-Identifier: MIT
// Decode of Mamba-3 on packed states: the fast path of state_update_mamba3.cuh.
//
// One block owns a head of a batch row.  It asks for the states of its first rows before anything
// else that depends on the slot; while they are on the way its threads make, for all tokens at
// once, the keys and queries of every rank and the coefficients of every row in shared memory.
// Then no thread waits for another: each updates its packs of kRows rows in registers token by
// token, and the lanes of a row add up and store its output.
//   h[p,n] = a h[p,n] + sum_r (w_r[p] k'_r[n] + u_r[p] k_r[n]),   y_r[p] = sum_n h[p,n] q_r[n]
// Small values come as raw bits first, so that a dtype known only when running does not make one
// load wait for another.  The arithmetic is that of update_mamba3(), operation by operation.
#pragma once

#include "cuda/state_update_mamba3_parts.cuh"

namespace ssmk::cuda {

// Floats of a row's coefficients: its decay, nothing, then u and w of each rank.
__host__ __device__ constexpr int coefs_of(int rank) { return (2 + 2 * rank + 3) / 4 * 4; }

// Where things stand in shared memory, in floats: keys, from the one before the first token on;
// queries; of each token and row the coefficients, and of each rank what the output needs (psi x,
// its gate); of each rank and row D and phi; sines and cosines.  With a norm also y of all tokens,
// and the scale of each rank.
struct Mamba3Room {
  int queries, coefs, finals, ends, turns, ys, scales, floats;

  __host__ __device__ Mamba3Room(int ntokens, int rank, int padded, int rows, int nangles,
                                 bool norm) {
    queries = (ntokens + 1) * rank * padded;
    coefs = queries + ntokens * rank * padded;
    finals = coefs + ntokens * rows * coefs_of(rank);
    ends = finals + 2 * ntokens * rank * rows;
    turns = ends + 2 * rank * rows;
    ys = turns + 2 * ntokens * nangles;
    scales = ys + (norm ? ntokens * rank * rows : 0);
    floats = (scales + (norm ? ntokens * rank : 0) + 3) / 4 * 4;
  }
};

// S: states.  kLogLanes, kRank: -1 and 0 if known only when running.
template <class S, int kRows, int kChunks, int kLogLanes, int kRank, int kBlocks>
__global__ void __launch_bounds__(kMamba3Threads, kBlocks)
    update_mamba3_packed(const __grid_constant__ Mamba3Packed p) {
  constexpr int K = kPack<S>;
  extern __shared__ float4 shared[];
  begin();

  const int thread = threadIdx.x, threads = blockDim.x;
  // f(i, is it the first) for each i of this thread below `end`.
  const auto each = [&](int first, int end, const auto &f) {
    for (int i = first; i < end; i += threads) f(i, i == first);
  };
  const int head = p.first_head + blockIdx.y, b = p.first_batch + blockIdx.z;
  const int group = group_of(p.groups_per_head, head);
  const int rank = kRank ? kRank : p.rank, headdim = p.headdim, half = p.dstate / 2;
  const bool trap = p.trap.given(), turning = p.angles.given();
  // Different warps begin with different work.
  const int row_thread = thread ^ (threads > 64 ? 64 : 0), angle_thread = threads - 1 - thread;

  const RowSlots slots = row_slots(p, b);
  const int tokens = slots.tokens;

  float *const keys = reinterpret_cast<float *>(shared);
  constexpr bool kMayNorm = kRank == 0;
  const bool norm = kMayNorm && p.norm_weight.given();
  const Mamba3Room room(p.ntokens, rank, p.padded, p.rows, p.nangles, norm);
  float *const queries = keys + room.queries;
  const int coef_step = coefs_of(rank), rows = p.rows;
  float *const coefs = keys + room.coefs;
  float2 *const finals = reinterpret_cast<float2 *>(keys + room.finals);
  float2 *const ends = reinterpret_cast<float2 *>(keys + room.ends);
  float2 *const turns = reinterpret_cast<float2 *>(keys + room.turns);

  // Four number i of all tokens, of B and of C, and of all ranks: elements at, at + 1, at + apart
  // and at + apart + 1.
  struct Quad {
    int t, r, at, apart;
    bool query, here;
  };
  const auto quad_of = [&](int i) {
    Quad quad;
    const int all = i >> p.log_quads, m = i & ((1 << p.log_quads) - 1);
    quad.t = int((float(all) + 0.5f) * p.tokens_per_quad);
    quad.r = all - quad.t * 2 * rank;
    quad.query = quad.r >= rank;
    quad.here = 4 * m < p.dstate && quad.t < p.ntokens;
    quad.r -= quad.query ? rank : 0;
    quad.at = p.rotary_half ? 2 * m : 4 * m;
    quad.apart = p.rotary_half ? half : 2;
    return quad;
  };
  const auto load_quad = [&](const Quad &quad) {
    QuadBits bits = {};
    if (!quad.here) return bits;
    const Stepped<5> &from = p.projected[quad.query];
    const char *const at = from.at(b, quad.t, quad.r, group, quad.at);
    bits.value[0] = load_two(at, from.dtype);
    bits.value[1] = load_two(at + quad.apart * from.stride[4], from.dtype);
    const Stepped<3> &bias = p.bias[quad.query];
    if (!bias.given()) return bits;
    const char *const bias_at = bias.at(head, quad.r, quad.at);
    bits.bias[0] = load_two(bias_at, bias.dtype);
    bits.bias[1] = load_two(bias_at + quad.apart * bias.stride[2], bias.dtype);
    return bits;
  };
  constexpr int kRanks = kRank ? kRank : 4;
  const auto load_ranks = [&](int row, int r0, RowBits<kRanks> *bits) {
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const int from = min(r0 + r, rank - 1);
      bits->psi[r] = p.mimo_x.given() ? bits_at(p.mimo_x, head, from, row) : 0u;
      bits->zeta[r] = p.mimo_z.given() ? bits_at(p.mimo_z, head, from, row) : 0u;
      bits->phi[r] = p.mimo_out.given() ? bits_at(p.mimo_out, head, from, row) : 0u;
    }
  };
  const auto load_row = [&](int i) {
    const int t = i >> p.log_rows, row = i & ((1 << p.log_rows) - 1);
    RowBits<kRanks> bits = {};
    if (row >= headdim || t >= p.ntokens) return bits;
    bits.dt = bits_at(p.dt, b, t, head, row);
    bits.rate = p.adt.given() ? bits_at(p.adt, b, t, head) : bits_at(p.A, head, row);
    bits.x = bits_at(p.x, b, t, head, row);
    if (trap) bits.trap = bits_at(p.trap, b, t, head);
    if (p.dt_bias.given()) bits.bias = bits_at(p.dt_bias, head, row);
    if (p.z.given()) bits.z = bits_at(p.z, b, t, head, row);
    if (p.D.given()) bits.D = bits_at(p.D, head, row);
    if (trap && t > 0) bits.before = bits_at(p.x, b, t - 1, head, row);
    load_ranks(row, 0, &bits);
    return bits;
  };
  const auto load_angle = [&](int i) {
    const int t = i >> p.log_angles, j = i & ((1 << p.log_angles) - 1);
    AngleBits bits = {};
    if (j >= p.nangles || t >= p.ntokens) return bits;
    bits.angle = bits_at(p.angles, b, t, head, j);
    bits.dt = bits_at(p.dt, b, t, head, 0);
    if (p.dt_bias.given()) bits.bias = bits_at(p.dt_bias, head, 0);
    return bits;
  };
  const auto dt_of = [&](uint32_t dt_bits, uint32_t bias_bits) {
    float dt = value_of(dt_bits, p.dt);
    if (p.dt_bias.given()) dt += value_of(bias_bits, p.dt_bias);
    return transform_dt(p.dt_transform, dt);
  };
  const Quad first_quad = quad_of(thread);
  const QuadBits first_bits = load_quad(first_quad);
  const RowBits<kRanks> first_row = load_row(row_thread);
  const AngleBits first_angle = turning ? load_angle(angle_thread) : AngleBits();

  const auto zero_output = [&](int from_token) {
    const int ranks = p.mimo_out.given() ? 1 : rank;
    for (int t = from_token; t < p.ntokens; ++t)
      for (int r = 0; r < ranks; ++r)
        for (int i = thread; i < headdim; i += threads) store_at(p.out, 0.0f, b, t, r, head, i);
  };
  const bool back = slots.start >= 0;  // to an intermediate state
  if (slots.pad || (tokens == 0 && !back && slots.in == slots.out)) return zero_output(0);

  // Rows of this thread: a warp's are neighbours.
  const int log_lanes = kLogLanes >= 0 ? kLogLanes : p.log_lanes;
  const int lanes = 1 << log_lanes, lane = thread & (lanes - 1), apart = 32 >> log_lanes;
  const int block_rows = (threads >> log_lanes) * kRows;
  const int mine = thread / 32 * (apart * kRows) + (thread % 32 >> log_lanes);
  // Rows and packs past the end read the last ones again, and neither add to sums nor store.
  const int packs = kLogLanes >= 0 ? lanes : p.packs, padded = kLogLanes >= 0 ? 128 : p.padded;
  const auto pack_of = [&](int c) { return min(c * lanes + lane, packs - 1); };
  const auto at = [&](char *base, int row_stride, int row, int c) {
    return reinterpret_cast<S *>(base + int64_t(min(row, headdim - 1)) * row_stride) +
           pack_of(c) * K;
  };
  char *const source =
      back ? p.intermediate.at(slots.intermediate, slots.start, head) : p.state.at(slots.in, head);
  const int source_row = back ? p.intermediate.stride[3] : p.state.stride[2];
  // Each thread's packs wait for it in shared memory, where nobody else touches them.
  uint4 *const waiting = reinterpret_cast<uint4 *>(keys + room.floats) + thread;
  const auto waiting_at = [&](int pass, int r, int c) {
    return &waiting[((p.all_ahead ? pass * kRows + r : r) * kChunks + c) * threads];
  };
  const auto load_states = [&](int pass) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        copy_ahead(waiting_at(pass, r, c),
                   at(source, source_row, pass * block_rows + mine + r * apart, c));
  };
#pragma unroll 1
  for (int pass = 0; pass < (p.all_ahead ? p.passes : 1); ++pass) load_states(pass);

  // The small states before the first token.
  const auto old_key = [&](int r, int n) {
    return back ? p.intermediate_k.at(slots.intermediate, slots.start, r, head, n)
                : p.k_state.at(slots.in, r, head, n);
  };
  const auto old_value = [&](int row) {
    return back ? p.intermediate_v.at(slots.intermediate, slots.start, head, row)
                : p.v_state.at(slots.in, head, row);
  };
  const auto old_angle = [&](int j) {
    return back ? p.intermediate_angle.at(slots.intermediate, slots.start, head, j)
                : p.angle_state.at(slots.in, head, j);
  };
  const DType key_dtype = back ? p.intermediate_k.dtype : p.k_state.dtype;
  const DType value_dtype = back ? p.intermediate_v.dtype : p.v_state.dtype;
  const DType angle_dtype = back ? p.intermediate_angle.dtype : p.angle_state.dtype;
  const int key_step = back ? p.intermediate_k.stride[4] : p.k_state.stride[3];
  // The fours of the first token's keys, which stand before its queries'.
  const int old_quads = trap ? rank << p.log_quads : 0;
  const auto load_old_key = [&](const Quad &quad, uint2(&bits)[2]) {
    if (!quad.here) return;
    const char *const at = old_key(quad.r, quad.at);
    bits[0] = load_two(at, key_dtype);
    bits[1] = load_two(at + quad.apart * key_step, key_dtype);
  };
  const auto put = [&](float *row, const Quad &quad, float2 one, float2 two) {
    *reinterpret_cast<float2 *>(row + place<K>(quad.at, padded)) = one;
    *reinterpret_cast<float2 *>(row + place<K>(quad.at + quad.apart, padded)) = two;
  };
  const auto put_old_key = [&](const Quad &quad, const uint2(&bits)[2]) {
    if (quad.here)
      put(keys + quad.r * padded, quad, two_values(bits[0], key_dtype),
          two_values(bits[1], key_dtype));
  };
  uint2 key_bits[2] = {};
  if (thread < old_quads) load_old_key(first_quad, key_bits);
  const uint32_t value_bits =
      trap && row_thread < headdim ? load_bits(old_value(row_thread), value_dtype) : 0u;
  const uint32_t angle_bits =
      turning && angle_thread < p.nangles ? load_bits(old_angle(angle_thread), angle_dtype) : 0u;

  // Where the small states after a token go: f(slot, row of the intermediate states) with -1 for
  // neither.
  const bool writes = !p.slots.keep_state && !p.slots.out_per_token;
  const auto slot_after = [&](int t) -> int64_t {
    if (p.slots.out_per_token && !p.slots.keep_state) {
      const int64_t slot = read_index(p.slots.out, b, t);
      return p.slots.pad.is_pad(slot) ? -1 : slot;
    }
    return writes && t == tokens - 1 ? slots.out : -1;
  };

  // Angles: the steps of all tokens, their sums, sines and cosines.
  if (turning) {
    const int last_angle = (1 << p.log_angles) - 1, all = tokens << p.log_angles;
    each(angle_thread, all, [&](int i, bool first) {
      const int t = i >> p.log_angles, j = i & last_angle;
      if (j >= p.nangles) return;
      const AngleBits bits = first ? first_angle : load_angle(i);
      turns[t * p.nangles + j].x =
          tanhf(value_of(bits.angle, p.angles)) * dt_of(bits.dt, bits.bias);
    });
    // One token's angles stay in one thread.
    if (tokens > 1) __syncthreads();
    each(angle_thread, p.nangles, [&](int j, bool first) {
      float theta =
          value_of(first ? angle_bits : load_bits(old_angle(j), angle_dtype), angle_dtype);
      for (int t = 0; t < tokens; ++t) {
        theta = turned(theta, turns[t * p.nangles + j].x);
        turns[t * p.nangles + j].x = theta;
        if (slots.intermediate >= 0)
          store_at(p.intermediate_angle, theta, slots.intermediate, t, head, j);
        const int64_t slot = slot_after(t);
        if (slot >= 0) store_at(p.angle_state, theta, slot, head, j);
      }
      if (tokens == 0 && writes) store_at(p.angle_state, theta, slots.out, head, j);
    });
    if (tokens > 1) __syncthreads();
    each(angle_thread, all, [&](int i, bool) {
      const int t = i >> p.log_angles, j = i & last_angle;
      if (j >= p.nangles) return;
      float2 turn;
      sine_cosine(turns[t * p.nangles + j].x, &turn.x, &turn.y);
      turns[t * p.nangles + j] = turn;
    });
  }

  // Rows.
  each(row_thread, tokens << p.log_rows, [&](int i, bool first) {
    const int t = i >> p.log_rows, row = i & ((1 << p.log_rows) - 1);
    if (row >= headdim) return;
    RowBits<kRanks> bits = first ? first_row : load_row(i);
    const float x = value_of(bits.x, p.x), dt = dt_of(bits.dt, bits.bias);
    float before = value_of(bits.before, p.x);
    if (t == 0)
      before = value_of(first || !trap ? value_bits : load_bits(old_value(row), value_dtype),
                        value_dtype);
    const float decay = p.adt.given() ? exp2_fast(value_of(bits.rate, p.adt) * kLog2e)
                                      : exp2_fast(dt * (value_of(bits.rate, p.A) * kLog2e));
    const float z = value_of(bits.z, p.z);
    Trapezoid f;
    if (trap) f = trapezoid(p.trap_sigmoid, value_of(bits.trap, p.trap));
    float *const coef = coefs + (t * rows + row) * coef_step;
    coef[0] = decay;
    for (int r0 = 0; r0 < rank; r0 += kRanks) {
      if (r0) load_ranks(row, r0, &bits);
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        const int r = r0 + i;
        if (!kRank && r >= rank) break;
        const float psi = p.mimo_x.given() ? value_of(bits.psi[i], p.mimo_x) : 1.0f;
        if (t == 0)
          ends[r * rows + row] = {value_of(bits.D, p.D), value_of(bits.phi[i], p.mimo_out)};
        float gate = 1.0f;
        if (p.z.given())
          gate = silu(p.mimo_z.given() ? __fmul_rn(value_of(bits.zeta[i], p.mimo_z), z) : z);
        *reinterpret_cast<float2 *>(coef + 2 + 2 * r) = {
            new_coefficient(f, dt, psi * x),
            trap ? old_coefficient(f, dt, decay, psi * before) : 0.0f};
        finals[(t * rank + r) * rows + row] = {psi * x, gate};
      }
    }
  });
  each(thread, old_quads, [&](int i, bool first) {
    const Quad quad = first ? first_quad : quad_of(i);
    if (!first) load_old_key(quad, key_bits);
    put_old_key(quad, key_bits);
  });
  // From here on old angles, keys and values have been read.
  __syncthreads();

  each(thread, (tokens * 2 * rank) << p.log_quads, [&](int i, bool first) {
    const Quad quad = first ? first_quad : quad_of(i);
    if (!quad.here) return;
    const QuadBits bits = first ? first_bits : load_quad(quad);
    const Stepped<5> &from = p.projected[quad.query];
    const Stepped<3> &bias = p.bias[quad.query];
    float2 one = two_values(bits.value[0], from.dtype), two = two_values(bits.value[1], from.dtype);
    if (bias.given()) {
      const float2 more = two_values(bits.bias[0], bias.dtype);
      const float2 still = two_values(bits.bias[1], bias.dtype);
      one.x += more.x, one.y += more.y, two.x += still.x, two.y += still.y;
    }
    turn_quad(&one, &two, p.rotary_half, (i & ((1 << p.log_quads) - 1)) * 2, p.nangles,
              turns + quad.t * p.nangles);
    put((quad.query ? queries : keys + rank * padded) + (quad.t * rank + quad.r) * padded, quad,
        one, two);
    if (quad.query || !trap) return;
    if (slots.intermediate >= 0) {
      char *const at = p.intermediate_k.at(slots.intermediate, quad.t, quad.r, head, quad.at);
      store_two(at, p.intermediate_k.dtype, one);
      store_two(at + quad.apart * p.intermediate_k.stride[4], p.intermediate_k.dtype, two);
    }
    const int64_t slot = slot_after(quad.t);
    if (slot >= 0) {
      char *const at = p.k_state.at(slot, quad.r, head, quad.at);
      store_two(at, p.k_state.dtype, one);
      store_two(at + quad.apart * p.k_state.stride[3], p.k_state.dtype, two);
    }
  });
  if (trap) {
    for (int i = row_thread; i < tokens << p.log_rows; i += threads) {
      const int t = i >> p.log_rows, row = i & ((1 << p.log_rows) - 1);
      if (row >= headdim) continue;
      const float x = value_of(bits_at(p.x, b, t, head, row), p.x);
      if (slots.intermediate >= 0) store_at(p.intermediate_v, x, slots.intermediate, t, head, row);
      const int64_t slot = slot_after(t);
      if (slot >= 0) store_at(p.v_state, x, slot, head, row);
    }
    if (tokens == 0 && writes) {
      for (int i = thread; i < headdim; i += threads)
        store_at(p.v_state, load(old_value(i), value_dtype), slots.out, head, i);
      for (int r = 0; r < rank; ++r)
        for (int i = thread; i < p.dstate; i += threads)
          store_at(p.k_state, keys[r * padded + place<K>(i, padded)], slots.out, r, head, i);
    }
  }
  __syncthreads();

  for (int pass = 0; pass < p.passes; ++pass) {
    const int row0 = pass * block_rows + mine;
    if (pass > 0 && !p.all_ahead) load_states(pass);
    wait_for_copies();
    float h[kRows][kChunks][K];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) widen_pack<S>(*waiting_at(pass, r, c), h[r][c]);
    const auto keep = [&](char *to, int row_stride) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          if (row0 + r * apart < headdim && c * lanes + lane < packs)
            store_pack_once(at(to, row_stride, row0 + r * apart, c), narrow_pack<S>(h[r][c]));
    };

    for (int t = 0; t < tokens; ++t) {
      const float *const coef = coefs + (t * rows + row0) * coef_step;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float decay = coef[i * apart * coef_step];
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int e = 0; e < K; ++e) h[i][c][e] *= decay;
      }
#pragma unroll(kRank ? kRank : 1)
      for (int r = 0; r < rank; ++r) {
        const float *const key_at = keys + ((t + 1) * rank + r) * padded;
        float2 c2[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          c2[i] = *reinterpret_cast<const float2 *>(coef + i * apart * coef_step + 2 + 2 * r);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          float key[K];
          if (trap) {
            read_row<K>(key_at - rank * padded, pack_of(c), padded, key);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
              for (int e = 0; e < K; ++e) h[i][c][e] = fmaf(c2[i].y, key[e], h[i][c][e]);
          }
          read_row<K>(key_at, pack_of(c), padded, key);
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int e = 0; e < K; ++e) h[i][c][e] = fmaf(c2[i].x, key[e], h[i][c][e]);
        }
      }
      // The sum over this lane's states: of each four of a pack its own, then together.
      const auto read_queries = [&](int r, float (&query)[kChunks][K]) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          read_row<K>(queries + (t * rank + r) * padded, pack_of(c), padded, query[c]);
      };
      const auto sum_of = [&](int i, const float (&query)[kChunks][K]) {
        float fours[K / 4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          if (c * lanes + lane < packs) {
#pragma unroll
            for (int e = 0; e < K; ++e) fours[e / 4] = fmaf(h[i][c][e], query[c][e], fours[e / 4]);
          }
        return K == 8 ? fours[0] + fours[K / 8] : fours[0];
      };
      // y of a row to what the rank gives to out.
      const auto finished = [&](int r, int row, float y) {
        const float2 final = finals[(t * rank + r) * rows + row], end = ends[r * rows + row];
        if (p.D.given()) y = fmaf(end.x, final.x, y);
        if (norm) return y;
        y *= final.y;
        return p.mimo_out.given() ? __fmul_rn(end.y, y) : y;
      };
      if constexpr (kLogLanes >= 0 && kRank > 0) {
        // Rows whose sums are added up at a time: every lane gets that of one row and rank.
        constexpr int kLanes = 1 << kLogLanes;
        constexpr int kGroup = kRows * kRank < kLanes ? kRows : kLanes / kRank;
        constexpr int kSums = kGroup * kRank;
#pragma unroll
        for (int from = 0; from < kRows; from += kGroup) {
          float sums[kSums];
#pragma unroll
          for (int r = 0; r < kRank; ++r) {
            float query[kChunks][K];
            read_queries(r, query);
#pragma unroll
            for (int i = 0; i < kGroup; ++i) sums[i * kRank + r] = sum_of(from + i, query);
          }
          const int item = sum_neighbours<kSums>(sums, lane, lanes);
          const int r = item % kRank, own = row0 + (from + item / kRank) * apart;
          float y = finished(r, own, sums[0]);
          if (p.mimo_out.given()) {
            // Other ranks are in the lanes that differ in the upper bits of the sums.
            const float first = y;
#pragma unroll
            for (int i = 1; i < kRank; ++i)
              y += __shfl_xor_sync(~0u, first, (i & 1) * (kSums / 2) | (i & 2) * (kSums / 8));
          }
          if (lane < kSums && own < headdim && (r == 0 || !p.mimo_out.given()))
            store_at(p.out, y, b, t, r, head, own);
        }
      } else {
        float total = 0.0f;
        int own = row0;
        for (int r = 0; r < rank; ++r) {
          float query[kChunks][K], sums[kRows];
          read_queries(r, query);
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums[i] = sum_of(i, query);
          own = row0 + sum_neighbours<kRows>(sums, lane, lanes) * apart;
          const float part = finished(r, own, sums[0]);
          if (norm) {
            if (lane < kRows && own < headdim)
              keys[room.ys + (t * rank + r) * headdim + own] = part;
            continue;
          }
          total = r ? total + part : part;
          if (!p.mimo_out.given() && lane < kRows && own < headdim)
            store_at(p.out, part, b, t, r, head, own);
        }
        if (!norm && p.mimo_out.given() && lane < kRows && own < headdim)
          store_at(p.out, total, b, t, 0, head, own);
      }

      if (slots.intermediate >= 0)
        keep(p.intermediate.at(slots.intermediate, t, head), p.intermediate.stride[3]);
      if (p.slots.out_per_token) {
        const int64_t slot = slot_after(t);
        if (slot >= 0) keep(p.state.at(slot, head), p.state.stride[2]);
      }
    }
    if (writes) keep(p.state.at(slots.out, head), p.state.stride[2]);
  }
  if (kMayNorm && norm) {
    float *const scales = keys + room.scales;
    const float *const ys = keys + room.ys;
    __syncthreads();
    for (int i = thread / 32; i < tokens * rank; i += threads / 32) {
      const float scale = norm_scale(ys + i * headdim, headdim, p.norm_eps);
      if (thread % 32 == 0) scales[i] = scale;
    }
    __syncthreads();
    for (int t = 0; t < tokens; ++t)
      for (int row = thread; row < headdim; row += threads) {
        const float weight = value_of(bits_at(p.norm_weight, head, row), p.norm_weight);
        float total = 0.0f;
        for (int r = 0; r < rank; ++r) {
          const int i = (t * rank + r) * headdim + row;
          const float gate = finals[(t * rank + r) * rows + row].y;
          const float y = ys[i] * scales[t * rank + r] * weight * gate;
          if (p.mimo_out.given()) {
            const float part = __fmul_rn(ends[r * rows + row].y, y);
            total = r ? total + part : part;
          } else {
            store_at(p.out, y, b, t, r, head, row);
          }
        }
        if (p.mimo_out.given()) store_at(p.out, total, b, t, 0, head, row);
      }
  }
  zero_output(tokens);
}

}  // namespace ssmk::cuda
