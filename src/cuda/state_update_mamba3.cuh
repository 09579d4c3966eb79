// SPDX-License-Identifier: MIT
// Decode of Mamba-3, whatever the strides; the formulas stand in ssmk.h.
//
// One block owns a head of a batch row: all of its states, so that old angles, keys and values are
// read before new ones are written.  It asks for the states of its first rows; while they are on
// the way it makes the keys and queries of all ranks in shared memory, with the coefficients of
// each row.  Threads then update their packs of one row in registers:
//   h[p,n] = a h[p,n] + sum_r (w_r[p] k'_r[n] + u_r[p] k_r[n]),   y_r[p] = sum_n h[p,n] q_r[n]
// A head with more rows than the block has room for takes several passes, and each pass walks all
// tokens; the last one writes the small states.
#pragma once

#include "cuda/state_update_mamba3_common.cuh"

namespace ssmk::cuda {

struct Mamba3Launch {
  StateUpdateProblem p;
  int64_t first_batch, first_head;
  int packs, log_lanes, padded, passes;
  bool one_decay;
};

// Floats of shared memory: keys, old keys, queries; coefficients u and w; y of one token, or of
// all if there are several passes; x, v, dt', decay; angles with sine and cosine; a scale a rank.
inline int64_t mamba3_shared_floats(const StateUpdateProblem &p, int padded, int passes) {
  const int64_t rank = p.mamba3.rank;
  return rank * (3 * padded + 2 * p.headdim + (passes > 1 ? p.ntokens : 1) * p.headdim + 1) +
         4 * p.headdim + 3 * p.mamba3.nangles;
}

template <int kChunks>
__global__ void __launch_bounds__(kMamba3Threads, 1)
    update_mamba3(const __grid_constant__ Mamba3Launch launch) {
  constexpr int K = kEight, kThreads = kMamba3Threads;
  extern __shared__ float4 shared[];
  __shared__ float partial[kThreads / 32];
  begin();

  const StateUpdateProblem &p = launch.p;
  const Mamba3 &m = p.mamba3;
  const int64_t head = launch.first_head + blockIdx.y, group = head / (p.nheads / p.ngroups);
  const int64_t b = launch.first_batch + blockIdx.z;
  const int rank = int(m.rank), headdim = int(p.headdim), n = int(p.dstate),
            nangles = int(m.nangles), padded = launch.padded, thread = threadIdx.x;
  const bool trap = p.trap.given(), one_decay = launch.one_decay;
  const RowSlots slots = row_slots(p, b);
  const auto zero_output = [&](int from_token) {
    const int ranks = m.mimo_out.given() ? 1 : rank;
    for (int t = from_token; t < p.ntokens; ++t)
      for (int i = thread; i < ranks * headdim; i += kThreads)
        store_at(p.out, 0.0f, b, t, i / headdim, head, i % headdim);
  };
  const bool writes = !p.slots.keep_state && !p.slots.out_per_token;
  if (slots.pad || (slots.tokens == 0 && slots.start < 0 && slots.in == slots.out))
    return zero_output(0);

  float *next = reinterpret_cast<float *>(shared);
  const auto take = [&](int count) {
    float *const at = next;
    next += count;
    return at;
  };
  float *k = take(rank * padded), *before = take(rank * padded), *const q = take(rank * padded);
  float *const u = take(rank * headdim), *const w = take(rank * headdim);
  float *const ys = take((launch.passes > 1 ? int(p.ntokens) : 1) * rank * headdim);
  float *x = take(headdim), *v = take(headdim);
  float *const dts = take(headdim), *const decays = take(headdim);
  float *const theta = take(nangles), *const sine = take(nangles), *const cosine = take(nangles);
  float *const scales = take(rank);

  const int lanes = 1 << launch.log_lanes, lane = thread & (lanes - 1);
  const int block_rows = kThreads >> launch.log_lanes, mine = thread >> launch.log_lanes;

  const States source = slots.start >= 0 ? states_after(p, slots.intermediate, slots.start, head)
                                         : states_in(p, slots.in, head);

  // Angles, keys and values at the places that the four kinds of states share.
  const auto small_in = [&](int64_t slot, const auto &f) {
    if (p.angles.given())
      for (int i = thread; i < nangles; i += kThreads)
        f(theta[i], p.angle_state.at(slot, head, i), p.angle_state.dtype);
    if (!trap) return;
    for (int r = 0; r < rank; ++r)
      for (int i = thread; i < n; i += kThreads)
        f(before[r * padded + place<K>(i, padded)], p.k_state.at(slot, r, head, i),
          p.k_state.dtype);
    for (int i = thread; i < headdim; i += kThreads)
      f(v[i], p.v_state.at(slot, head, i), p.v_state.dtype);
  };
  const auto small_after = [&](int64_t t, const auto &f) {
    const int64_t row = slots.intermediate;
    if (p.angles.given())
      for (int i = thread; i < nangles; i += kThreads)
        f(theta[i], p.intermediate_angle.at(row, t, head, i), p.intermediate_angle.dtype);
    if (!trap) return;
    for (int r = 0; r < rank; ++r)
      for (int i = thread; i < n; i += kThreads)
        f(before[r * padded + place<K>(i, padded)], p.intermediate_k.at(row, t, r, head, i),
          p.intermediate_k.dtype);
    for (int i = thread; i < headdim; i += kThreads)
      f(v[i], p.intermediate_v.at(row, t, head, i), p.intermediate_v.dtype);
  };
  const auto read_small = [](float &to, const char *from, DType dtype) { to = load(from, dtype); };
  const auto write_small = [](float from, char *to, DType dtype) { store(to, dtype, from); };

  // dt' of a row.
  const auto dt_of = [&](int t, int row) {
    float dt = load_at(p.dt, b, t, head, row);
    if (p.dt_bias.given()) dt += load_at(p.dt_bias, head, row);
    return transform_dt(p.dt_transform, dt);
  };
  // Element i of B or C, biased, before and after the rotation.
  const auto projected = [&](const View<5> &from, const View<3> &bias, int t, int r, int i) {
    const float value = load_at(from, b, t, r, group, i);
    return bias.given() ? value + load_at(bias, head, r, i) : value;
  };
  const auto rotated = [&](const View<5> &from, const View<3> &bias, int t, int r, int i) {
    float value = projected(from, bias, t, r, i);
    const int half = n / 2;
    const bool second = m.rotary_half ? i >= half : i & 1;
    const int j = m.rotary_half ? (second ? i - half : i) : i / 2;
    if (j >= nangles) return value;
    const int other = m.rotary_half ? (second ? j : j + half) : i ^ 1;
    float partner = projected(from, bias, t, r, other);
    if (second) {
      turn_pair(&partner, &value, sine[j], cosine[j]);
    } else {
      turn_pair(&value, &partner, sine[j], cosine[j]);
    }
    return value;
  };
  const auto prepare = [&](int t) {
    for (int i = thread; i < headdim; i += kThreads) {
      const float dt = dt_of(t, i);
      dts[i] = dt;
      x[i] = load_at(p.x, b, t, head, i);
      decays[i] = p.adt.given() ? exp2_fast(load_at(p.adt, b, t, head) * kLog2e)
                  : one_decay   ? exp2_fast(dt * (load_at(p.A, head, i) * kLog2e))
                                : 0.0f;
    }
    for (int i = thread; i < nangles; i += kThreads) {
      theta[i] = turned(theta[i], tanhf(load_at(p.angles, b, t, head, i)) * dt_of(t, 0));
      sine_cosine(theta[i], &sine[i], &cosine[i]);
    }
    __syncthreads();
    for (int r = 0; r < rank; ++r)
      for (int i = thread; i < n; i += kThreads) {
        k[r * padded + place<K>(i, padded)] = rotated(p.B, m.B_bias, t, r, i);
        q[r * padded + place<K>(i, padded)] = rotated(p.C, m.C_bias, t, r, i);
      }
    Trapezoid f;
    if (trap) f = trapezoid(m.trap_sigmoid, load_at(p.trap, b, t, head));
    for (int r = 0; r < rank; ++r)
      for (int i = thread; i < headdim; i += kThreads) {
        const float psi = m.mimo_x.given() ? load_at(m.mimo_x, head, r, i) : 1.0f, dt = dts[i];
        u[r * headdim + i] = new_coefficient(f, dt, psi * x[i]);
        if (trap)
          // A decay of its own for each state is multiplied to it below.
          w[r * headdim + i] = old_coefficient(f, dt, one_decay ? decays[i] : 1.0f, psi * v[i]);
      }
    __syncthreads();
  };

  // The end of a token: y of all rows to out.
  const auto finish = [&](int t, float *y) {
    for (int r = 0; r < rank; ++r)
      for (int i = thread; i < headdim; i += kThreads)
        if (p.D.given()) {
          const float psi = m.mimo_x.given() ? load_at(m.mimo_x, head, r, i) : 1.0f;
          y[r * headdim + i] =
              fmaf(load_at(p.D, head, i), psi * load_at(p.x, b, t, head, i), y[r * headdim + i]);
        }
    if (m.norm_weight.given()) {
      __syncthreads();
      for (int r = thread / 32; r < rank; r += kThreads / 32) {
        const float scale = norm_scale(y + r * headdim, headdim, m.norm_eps);
        if (thread % 32 == 0) scales[r] = scale;
      }
      __syncthreads();
    }
    for (int i = thread; i < headdim; i += kThreads) {
      const float z = p.z.given() ? load_at(p.z, b, t, head, i) : 0.0f;
      float total = 0.0f;
      for (int r = 0; r < rank; ++r) {
        float o = y[r * headdim + i];
        if (m.norm_weight.given()) o = o * scales[r] * load_at(m.norm_weight, head, i);
        if (p.z.given())
          o *= silu(m.mimo_z.given() ? __fmul_rn(load_at(m.mimo_z, head, r, i), z) : z);
        if (m.mimo_out.given()) {
          const float part = __fmul_rn(load_at(m.mimo_out, head, r, i), o);
          total = r ? total + part : part;
        } else {
          store_at(p.out, o, b, t, r, head, i);
        }
      }
      if (m.mimo_out.given()) store_at(p.out, total, b, t, 0, head, i);
    }
  };

  for (int pass = 0; pass < launch.passes; ++pass) {
    const int row = pass * block_rows + mine;
    const bool last_pass = pass == launch.passes - 1, mine_too = row < headdim;
    const auto here = [&](int c) { return mine_too && c * lanes + lane < launch.packs; };
    float h[kChunks][K];
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (here(c)) read_any<K>(source, row, (c * lanes + lane) * K, n, h[c]);
    // One token needs its keys made once.
    const bool made = pass > 0 && slots.tokens == 1;
    if (made) {
      float *const old_k = k, *const old_x = x;
      k = before, before = old_k, x = v, v = old_x;
    } else {
      __syncthreads();
      slots.start >= 0 ? small_after(slots.start, read_small) : small_in(slots.in, read_small);
      __syncthreads();
    }
    if (!made && slots.tokens > 0) prepare(0);
    const auto keep = [&](const States &to) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (here(c)) write_any<K>(to, row, (c * lanes + lane) * K, n, h[c]);
    };

    for (int t = 0; t < slots.tokens; ++t) {
      if (t > 0) prepare(t);
      float *const y = ys + (launch.passes > 1 ? t : 0) * rank * headdim;
      const auto add_keys = [&](const float *keys, float coef, int r) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (!here(c)) continue;
          float key[K];
          read_row<K>(keys + r * padded, c * lanes + lane, padded, key);
#pragma unroll
          for (int e = 0; e < K; ++e) h[c][e] = fmaf(coef, key[e], h[c][e]);
        }
      };
      if (!one_decay && trap && mine_too)
        for (int r = 0; r < rank; ++r) add_keys(before, w[r * headdim + row], r);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (!here(c)) continue;
        if (one_decay) {
#pragma unroll
          for (int e = 0; e < K; ++e) h[c][e] *= decays[row];
        } else {
          float rate[K];
          read_any<K>({p.A.at(head), p.A.dtype, p.A.stride[1], p.A.stride[2]}, row,
                      (c * lanes + lane) * K, n, rate);
#pragma unroll
          for (int e = 0; e < K; ++e) h[c][e] *= exp2_fast(dts[row] * kLog2e * rate[e]);
        }
      }
      for (int r = 0; mine_too && r < rank; ++r) {
        if (one_decay && trap) add_keys(before, w[r * headdim + row], r);
        add_keys(k, u[r * headdim + row], r);
      }
      for (int r = 0; r < rank; ++r) {
        float even = 0.0f, odd = 0.0f;  // fours of states
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (!here(c)) continue;
          float query[K];
          read_row<K>(q + r * padded, c * lanes + lane, padded, query);
#pragma unroll
          for (int e = 0; e < K; ++e)
            // States past the end are dropped, not multiplied by a padded 0.
            if ((c * lanes + lane) * K + e < n) {
              float &sum = e < 4 ? even : odd;
              sum = fmaf(h[c][e], query[e], sum);
            }
        }
        float sum[1] = {even + odd};
        sum_neighbours<1>(sum, lane, lanes < 32 ? lanes : 32);
        if (lanes > 32) {
          __syncthreads();
          if (thread % 32 == 0) partial[thread / 32] = sum[0];
          __syncthreads();
          sum[0] = 0;
          for (int i = 0; i < lanes / 32; ++i) sum[0] += partial[mine * (lanes / 32) + i];
        }
        if (lane == 0 && mine_too) y[r * headdim + row] = sum[0];
      }
      __syncthreads();
      if (launch.passes == 1) finish(t, y);

      // What the next token finds before it, and this state to wherever it goes.
      float *const old_k = before, *const old_v = v;
      before = k, k = old_k, v = x, x = old_v;
      if (slots.intermediate >= 0) {
        keep(states_after(p, slots.intermediate, t, head));
        if (last_pass) small_after(t, write_small);
      }
      if (p.slots.out_per_token && !p.slots.keep_state) {
        const int64_t slot = read_index(p.slots.out, b, t);
        if (!p.slots.pad.is_pad(slot)) {
          keep(states_in(p, slot, head));
          if (last_pass) small_in(slot, write_small);
        }
      }
      __syncthreads();
    }
    if (writes) keep(states_in(p, slots.out, head));
  }
  if (launch.passes > 1)
    for (int t = 0; t < slots.tokens; ++t) finish(t, ys + t * rank * headdim);
  zero_output(slots.tokens);
  if (writes) small_in(slots.out, write_small);
}

}  // namespace ssmk::cuda
