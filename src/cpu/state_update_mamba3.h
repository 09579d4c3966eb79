// SPDX-License-Identifier: MIT
// Decode of Mamba-3; the formulas stand in ssmk.h.
//
// A task owns one head of one batch row: its rows p share the rotated keys and queries, and the
// norm wants all of them.  Keys, old keys and queries of all ranks are laid side by side, vector by
// vector of dstate, so a row of states streams once along one array in L1:
//   h[p,n] = a h[p,n] + sum_r (w_r[p] k'_r[n] + u_r[p] k_r[n]),   y_r[p] = sum_n h[p,n] q_r[n]
// One token on packed states goes from pool to pool.  Other layouts pass each row through scratch,
// and several tokens hold all rows in float32 between the first read and the last write: the same
// arithmetic, hence the same bits.
#pragma once

#include <type_traits>

#include "cpu/dt.h"
#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/mamba3.h"
#include "cpu/rows.h"
#include "cpu/state_update_slots.h"

namespace ssmk::cpu::SSMK_ISA {

// Two vectors of a row: even and odd elements where that is the cheaper order.
template <class T>
SSMK_INLINE void load_two(const T *p, vf *a, vf *b) {
  if constexpr (std::is_same_v<T, bf16>) {
    load_pairs(p, a, b);
  } else {
    *a = load(p);
    *b = load(p + kLanes);
  }
}
template <class T>
SSMK_INLINE void store_two(T *p, vf a, vf b) {
  if constexpr (std::is_same_v<T, bf16>) {
    store_pairs(p, a, b);
  } else {
    store(p, a);
    store(p + kLanes, b);
  }
}

// States are asked for that long before they are read, so that memory works while keys are made and
// sums added up; into the second level, as the first has no room for them that long.
constexpr int64_t kAheadBytes = 8192;

SSMK_INLINE void ask_for(const void *from, int64_t bytes) {
  const char *const p = static_cast<const char *>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// One row of n states.  keys: for every vector of states R keys, R old ones if kTrap, R queries.
// coefs: u of the row, then w if kTrap, `ld` apart.  Lane sums of h q_r go to
// sums[r * kLanes * kLanes].
template <int R, bool kTrap, class T>
SSMK_INLINE void update_heads_row(const T *from, T *to, const float *keys, int64_t n, float decay,
                                  const float *coefs, int64_t ld, float *sums) {
  constexpr int kKeys = kTrap ? 2 * R : R, kStep = (kKeys + R) * kLanes;
  constexpr int kSums = R <= 2 ? 2 : 1;  // enough to hide the latency of an addition
  vf coef[kKeys], sum[kSums * R] = {};
  SSMK_UNROLL
  for (int r = 0; r < kKeys; ++r) coef[r] = splat(coefs[r * ld]);
  const vf a = splat(decay);
  const auto step = [&](vf h, const float *k) {
    vf change = coef[0] * load(k);
    SSMK_UNROLL
    for (int r = 1; r < kKeys; ++r) change = fused(coef[r], load(k + r * kLanes), change);
    return fused(a, h, change);
  };
  const auto add = [&](vf h, const float *k, vf *into) {
    SSMK_UNROLL
    for (int r = 0; r < R; ++r) into[r] = fused(h, load(k + (kKeys + r) * kLanes), into[r]);
  };
  vf *const second = sum + (kSums - 1) * R;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes, keys += 2 * kStep) {
    vf h0, h1;
    load_two(from + i, &h0, &h1);
    h0 = step(h0, keys);
    h1 = step(h1, keys + kStep);
    store_two(to + i, h0, h1);
    add(h0, keys, sum);
    add(h1, keys + kStep, second);
  }
  if constexpr (!std::is_same_v<T, bf16>) {
    for (; i < n; i += kLanes, keys += kStep) {
      const vf h = step(load(from + i), keys);
      store(to + i, h);
      if (i + kLanes <= n) {
        add(h, keys, sum);
        continue;
      }
      // Lanes past the end are dropped, not multiplied by a padded 0: 0 * inf would be NaN.
      const vi inside = bitcast<vi>(lane_numbers() < vi{} + int32_t(n - i));
      SSMK_UNROLL
      for (int r = 0; r < R; ++r)
        sum[r] = select(inside, fused(h, load(keys + (kKeys + r) * kLanes), sum[r]), sum[r]);
    }
  }
  SSMK_UNROLL
  for (int r = 0; r < R; ++r)
    store(sums + r * kLanes * kLanes, kSums == 2 ? sum[r] + second[r] : sum[r]);
}

struct Mamba3Update {
  const StateUpdateProblem &p;
  const int64_t b, head, group;
  const RowSlots slots;
  const int64_t rank, width, height;  // width: dstate, height: headdim, in whole vectors
  float *next;                        // of the scratch

  // Arrays over dstate, a row a rank: this token's keys, the last one's, queries; all in `keys`.
  float *const k, *const before, *const q, *const keys;
  float *const row, *const rates, *const line;  // a row of states, of A; anything over dstate
  // Arrays over headdim.
  float *const coefs,
      *const y, *const x, *const v, *const dt, *const decay, *const gate, *const rows_a,
                                                                              *const rows_b,
                                                                                  *const bias,
                                                                                      *const total;
  float *const sums;
  float *const theta, *const low, *const turn, *const sine, *const cosine;
  float *const held;  // the states in float32, if there are several tokens

  // What one take more or less means for mamba3_update_floats() (dispatch.cc).
  Mamba3Update(const StateUpdateProblem &problem, int64_t row_of_batch, int64_t h, float *scratch)
      : p(problem),
        b(row_of_batch),
        head(h),
        group(h / (problem.nheads / problem.ngroups)),
        slots(row_slots(problem, row_of_batch)),
        rank(problem.mamba3.rank),
        width(whole_vectors(problem.dstate)),
        height(whole_vectors(problem.headdim)),
        next(scratch),
        k(take(rank * width)),
        before(take(rank * width)),
        q(take(rank * width)),
        keys(take(3 * rank * width)),
        row(take(width)),
        rates(take(width)),
        line(take(width)),
        coefs(take(2 * rank * height)),
        y(take(rank * height)),
        x(take(height)),
        v(take(height)),
        dt(take(height)),
        decay(take(height)),
        gate(take(height)),
        rows_a(take(height)),
        rows_b(take(height)),
        bias(take(height)),
        total(take(height)),
        sums(take(rank * kLanes * kLanes)),
        theta(take(whole_vectors(problem.mamba3.nangles))),
        low(take(whole_vectors(problem.mamba3.nangles))),
        turn(take(whole_vectors(problem.mamba3.nangles))),
        sine(take(whole_vectors(problem.mamba3.nangles))),
        cosine(take(whole_vectors(problem.mamba3.nangles))),
        held(next) {}

  float *take(int64_t n) {
    float *const at = next;
    next += (n + 15) / 16 * 16;
    return at;
  }

  // How

  bool has_trap() const { return p.trap.given(); }
  bool one_decay() const { return p.adt.given() || p.A.stride[2] == 0 || p.dstate == 1; }
  // Ranks that update_heads_row() is compiled for; the others take update_any_row().
  bool compiled() const {
    return one_decay() && (rank == 1 || rank == 2 || rank == 4 || rank == 8);
  }
  // bfloat16 states are summed in another order.  That order belongs to the dtype and sizes, not to
  // the strides: every path keeps it.
  bool in_pairs() const {
    return p.state.dtype == DType::kBF16 && compiled() && p.dstate % (2 * kLanes) == 0;
  }
  bool can_stream() const {
    const bool whole = p.state.dtype == DType::kBF16 ? in_pairs() : p.dstate % kLanes == 0;
    return whole && compiled() && p.ntokens == 1 && p.state.stride[3] == 1 &&
           !p.intermediate.given() && !p.slots.out_per_token && !p.slots.keep_state;
  }

  // Where

  States states_in(int64_t slot) const {
    return {p.state.at(slot, head), p.state.dtype, p.state.stride[2], p.state.stride[3]};
  }
  States states_after(int64_t t) const {
    return {p.intermediate.at(slots.intermediate, t, head), p.intermediate.dtype,
            p.intermediate.stride[3], p.intermediate.stride[4]};
  }

  // Angles, keys and values of the row at the places that the four kinds of states share: a slot,
  // or the token of an intermediate state.
  template <class F>
  void small_states_in(int64_t slot, const F &f) const {
    if (p.angle_state.given())
      f(theta, p.angle_state.at(slot, head), p.angle_state.dtype, p.angle_state.stride[2],
        p.mamba3.nangles);
    if (!has_trap()) return;
    for (int64_t r = 0; r < rank; ++r)
      f(before + r * width, p.k_state.at(slot, r, head), p.k_state.dtype, p.k_state.stride[3],
        p.dstate);
    f(v, p.v_state.at(slot, head), p.v_state.dtype, p.v_state.stride[2], p.headdim);
  }
  template <class F>
  void small_states_after(int64_t t, const F &f) const {
    const int64_t i = slots.intermediate;
    if (p.angle_state.given())
      f(theta, p.intermediate_angle.at(i, t, head), p.intermediate_angle.dtype,
        p.intermediate_angle.stride[3], p.mamba3.nangles);
    if (!has_trap()) return;
    for (int64_t r = 0; r < rank; ++r)
      f(before + r * width, p.intermediate_k.at(i, t, r, head), p.intermediate_k.dtype,
        p.intermediate_k.stride[4], p.dstate);
    f(v, p.intermediate_v.at(i, t, head), p.intermediate_v.dtype, p.intermediate_v.stride[3],
      p.headdim);
  }

  void read_small() const {
    const auto read = [](float *to, const char *from, DType dtype, int64_t stride, int64_t n) {
      read_padded(to, from, dtype, stride, n);
    };
    slots.start >= 0 ? small_states_after(slots.start, read) : small_states_in(slots.in, read);
  }
  static void write_small(float *from, char *to, DType dtype, int64_t stride, int64_t n) {
    write_row(to, dtype, stride, from, n);
  }

  // Reading

  static void read_padded(float *dst, const char *src, DType dtype, int64_t stride, int64_t n) {
    read_row(dst, src, dtype, stride, n);
    for (int64_t i = n; i % kLanes; ++i) dst[i] = 0;
  }

  // headdim values of this head, of a weight or of a token.
  const float *weights(float *dst, const View<3> &w, int64_t r) const {
    read_padded(dst, w.at(head, r), w.dtype, w.stride[2], p.headdim);
    return dst;
  }
  const float *parameters(float *dst, const View<2> &w) const {
    read_padded(dst, w.at(head), w.dtype, w.stride[1], p.headdim);
    return dst;
  }
  const float *values(float *dst, const View<4> &from, int64_t t) const {
    read_padded(dst, from.at(b, t, head), from.dtype, from.stride[3], p.headdim);
    return dst;
  }

  // One token: decay, keys, coefficients

  void read_steps(int64_t t) const {
    values(dt, p.dt, t);
    if (p.dt_bias.given()) {
      parameters(bias, p.dt_bias);
      for (int64_t i = 0; i < height; i += kLanes) store(dt + i, load(dt + i) + load(bias + i));
    }
    for (int64_t i = 0; i < height; i += kLanes)
      store(dt + i, transform_dt(p.dt_transform, load(dt + i)));
    if (p.adt.given()) {
      const vf a = exp(splat(read_one(p.adt.at(b, t, head), p.adt.dtype)));
      for (int64_t i = 0; i < height; i += kLanes) store(decay + i, a);
    } else if (one_decay()) {
      read_padded(decay, p.A.at(head), p.A.dtype, p.A.stride[1], p.headdim);
      for (int64_t i = 0; i < height; i += kLanes)
        store(decay + i, exp2(load(dt + i) * (load(decay + i) * kLog2e)));
    }
  }

  void turn_angles(int64_t t) const {
    read_padded(turn, p.angles.at(b, t, head), p.angles.dtype, p.angles.stride[3],
                p.mamba3.nangles);
    // Errors are not carried along: a call of several tokens is as exact as calls of one, which
    // have nothing but the float32 angles of the pool.
    for (int64_t i = 0; i < p.mamba3.nangles; i += kLanes) store(low + i, vf{});
    advance_angles(theta, low, turn, dt[0], p.mamba3.nangles, sine, cosine);
  }

  // One rank of B or C, biased and rotated.
  void project(float *dst, const View<5> &from, const View<3> &bias_of, int64_t t,
               int64_t r) const {
    read_padded(dst, from.at(b, t, r, group), from.dtype, from.stride[4], p.dstate);
    if (bias_of.given()) {
      read_padded(line, bias_of.at(head, r), bias_of.dtype, bias_of.stride[2], p.dstate);
      for (int64_t i = 0; i < width; i += kLanes) store(dst + i, load(dst + i) + load(line + i));
    }
    if (p.angles.given())
      rotate(dst, sine, cosine, p.mamba3.nangles, p.dstate, p.mamba3.rotary_half);
  }

  int64_t ranks_in_keys() const { return (has_trap() ? 3 : 2) * rank; }

  // A row of keys or queries to its place in every vector of `keys`.
  void lay(const float *from, int64_t place) const {
    const int64_t step = ranks_in_keys() * kLanes;
    float *to = keys + place * kLanes;
    if (in_pairs()) {
      alignas(64) float two[2 * kLanes];
      for (int64_t i = 0; i < width; i += 2 * kLanes, to += 2 * step) {
        deinterleave(two, from + i);
        store(to, load(two));
        store(to + step, load(two + kLanes));
      }
    } else {
      for (int64_t i = 0; i < width; i += kLanes, to += step) store(to, load(from + i));
    }
  }

  void prepare(int64_t t) const {
    read_steps(t);
    values(x, p.x, t);
    if (p.angles.given()) turn_angles(t);
    for (int64_t r = 0; r < rank; ++r) {
      project(k + r * width, p.B, p.mamba3.B_bias, t, r);
      project(q + r * width, p.C, p.mamba3.C_bias, t, r);
      lay(k + r * width, r);
      if (has_trap()) lay(before + r * width, rank + r);
      lay(q + r * width, ranks_in_keys() - rank + r);
    }

    vf now = splat(1.f), then{};
    if (has_trap()) {
      const vf trap = splat(read_one(p.trap.at(b, t, head), p.trap.dtype));
      now = p.mamba3.trap_sigmoid ? trap : sigmoid(trap);
      then = p.mamba3.trap_sigmoid ? 1.f - trap : sigmoid(-trap);
    }
    const float *skip = p.D.given() ? parameters(rows_b, p.D) : nullptr;
    for (int64_t r = 0; r < rank; ++r) {
      const float *psi = p.mamba3.mimo_x.given() ? weights(rows_a, p.mamba3.mimo_x, r) : nullptr;
      float *u = coefs + r * height, *w = coefs + (rank + r) * height;
      for (int64_t i = 0; i < height; i += kLanes) {
        const vf input = psi ? load(psi + i) * load(x + i) : load(x + i);
        const vf size = has_trap() ? now * load(dt + i) : load(dt + i);
        store(u + i, size * input);
        // Without D not 0 x: x may be infinite.
        store(y + r * height + i, skip ? load(skip + i) * input : vf{});
        if (has_trap()) {
          const vf last = psi ? load(psi + i) * load(v + i) : load(v + i);
          // A decay for each state is multiplied to it in update_any_row().
          const vf scale = then * load(dt + i);
          store(w + i, (one_decay() ? scale * load(decay + i) : scale) * last);
        }
      }
    }
  }

  // Rows of states

  // One row of padded float32 states at h: any rank, any decay.  Lane sums of rank r go to
  // at[r * kLanes * kLanes].
  void update_any_row(float *h, int64_t i, float *at) const {
    const int64_t step = ranks_in_keys() * kLanes, nkeys = ranks_in_keys() - rank;
    const bool one = one_decay();
    if (!one) read_padded(rates, p.A.at(head, i), p.A.dtype, p.A.stride[2], p.dstate);
    const float *keys_here = keys;
    for (int64_t n = 0; n < p.dstate; n += kLanes, keys_here += step) {
      vf added{}, last{};
      for (int64_t r = 0; r < rank; ++r)
        added = fused(splat(coefs[r * height + i]), load(keys_here + r * kLanes), added);
      for (int64_t r = rank; r < nkeys; ++r)
        last = fused(splat(coefs[r * height + i]), load(keys_here + r * kLanes), last);
      if (one) {
        store(h + n, fused(splat(decay[i]), load(h + n), last + added));
      } else {
        const vf a = exp2(splat(dt[i] * kLog2e) * load(rates + n));
        store(h + n, fused(a, has_trap() ? load(h + n) + last : load(h + n), added));
      }
    }
    for (int64_t r = 0; r < rank; ++r) {
      const float *query = keys + (nkeys + r) * kLanes;
      vf sum{};
      int64_t n = 0;
      for (; n + kLanes <= p.dstate; n += kLanes, query += step)
        sum = fused(load(h + n), load(query), sum);
      if (n < p.dstate) {
        const vi inside = bitcast<vi>(lane_numbers() < vi{} + int32_t(p.dstate - n));
        sum = select(inside, fused(load(h + n), load(query), sum), sum);
      }
      store(at + r * kLanes * kLanes, sum);
    }
  }

  void read_states(float *h, const States &from, int64_t i) const {
    read_padded(h, from.at(i, 0), from.dtype, from.state, p.dstate);
    for (int64_t n = 0; in_pairs() && n < p.dstate; n += 2 * kLanes) deinterleave(h + n, h + n);
  }

  void write_states(const States &to, int64_t i, const float *h) const {
    if (in_pairs()) {
      for (int64_t n = 0; n < p.dstate; n += 2 * kLanes) interleave(line + n, h + n);
      h = line;
    }
    write_row(to.at(i, 0), to.dtype, to.state, h, p.dstate);
  }

  // Row i after token t, to wherever it goes then.
  void keep_row(int64_t t, int64_t i, const float *h) const {
    if (slots.intermediate >= 0) write_states(states_after(t), i, h);
    if (!p.slots.out_per_token || p.slots.keep_state) return;
    const int64_t slot = read_index(p.slots.out, b, t);
    if (!p.slots.pad.is_pad(slot)) write_states(states_in(slot), i, h);
  }
  void keep_small(int64_t t) const {
    if (slots.intermediate >= 0) small_states_after(t, write_small);
    if (!p.slots.out_per_token || p.slots.keep_state) return;
    const int64_t slot = read_index(p.slots.out, b, t);
    if (!p.slots.pad.is_pad(slot)) small_states_in(slot, write_small);
  }
  bool writes_one_slot() const { return !p.slots.keep_state && !p.slots.out_per_token; }

  // Every row, kLanes of them at a time, their sums to y.  update(i, at): row i, lane sums of rank
  // r to at[r * kLanes * kLanes].
  template <class F>
  SSMK_INLINE void each_row(const F &update) const {
    for (int64_t first = 0; first < p.headdim; first += kLanes) {
      const int64_t n = p.headdim - first < kLanes ? p.headdim - first : kLanes;
      for (int64_t i = 0; i < n; ++i) update(first + i, sums + i * kLanes);
      for (int64_t r = 0; r < rank; ++r) {
        vf each[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          each[i] = i < n ? load(sums + (r * kLanes + i) * kLanes) : vf{};
        float *const to = y + r * height + first;
        store(to, load(to) + sum_each(each));
      }
    }
  }

  template <int R, bool kTrap, bool kAsk, class T>
  void update_rows(const T *from, int64_t from_row, T *to, int64_t to_row) const {
    // Rows that follow one another: past the last one lies the next head, as a rule.
    const bool ask = kAsk && from_row == p.dstate;
    each_row([&](int64_t i, float *at) {
      if (ask)
        ask_for(reinterpret_cast<const char *>(from + i * from_row) + kAheadBytes,
                p.dstate * int64_t(sizeof(T)));
      update_heads_row<R, kTrap>(from + i * from_row, to + i * to_row, keys, p.dstate, decay[i],
                                 coefs + i, height, at);
    });
  }

  // kAsk: the states are in memory, not in scratch.
  template <bool kAsk, class T>
  void update_all(const T *from, int64_t from_row, T *to, int64_t to_row) const {
    const auto with_rank = [&](auto ranks) {
      constexpr int kRank = decltype(ranks)::value;
      has_trap() ? update_rows<kRank, true, kAsk>(from, from_row, to, to_row)
                 : update_rows<kRank, false, kAsk>(from, from_row, to, to_row);
    };
    rank == 1   ? with_rank(std::integral_constant<int, 1>{})
    : rank == 2 ? with_rank(std::integral_constant<int, 2>{})
    : rank == 4 ? with_rank(std::integral_constant<int, 4>{})
                : with_rank(std::integral_constant<int, 8>{});
  }

  // One token from slot or snapshot to wherever it goes, row by row through scratch.
  void update_through_scratch() const {
    const States from = slots.start >= 0 ? states_after(slots.start) : states_in(slots.in);
    each_row([&](int64_t i, float *at) {
      read_states(row, from, i);
      update_row(row, i, at);
      keep_row(0, i, row);
      if (writes_one_slot()) write_states(states_in(slots.out), i, row);
    });
  }

  void update_row(float *h, int64_t i, float *at) const {
    if (!compiled()) return update_any_row(h, i, at);
    const auto with_rank = [&](auto ranks) {
      constexpr int kRank = decltype(ranks)::value;
      has_trap()
          ? update_heads_row<kRank, true>(h, h, keys, p.dstate, decay[i], coefs + i, height, at)
          : update_heads_row<kRank, false>(h, h, keys, p.dstate, decay[i], coefs + i, height, at);
    };
    rank == 1   ? with_rank(std::integral_constant<int, 1>{})
    : rank == 2 ? with_rank(std::integral_constant<int, 2>{})
    : rank == 4 ? with_rank(std::integral_constant<int, 4>{})
                : with_rank(std::integral_constant<int, 8>{});
  }

  // The end of a token

  void finish(int64_t t) const {
    const Mamba3 &m = p.mamba3;
    const float *weight = m.norm_weight.given() ? parameters(rows_b, m.norm_weight) : nullptr;
    const float *z = p.z.given() ? values(dt, p.z, t) : nullptr;
    for (int64_t r = 0; r < rank; ++r) {
      float *const o = y + r * height;
      const float *gated = z;
      if (z && m.mimo_z.given()) {
        weights(rows_a, m.mimo_z, r);
        for (int64_t i = 0; i < height; i += kLanes)
          store(gate + i, load(rows_a + i) * load(z + i));
        gated = gate;
      }
      normalise_and_gate(o, weight, m.norm_eps, gated, p.headdim);
      if (m.mimo_out.given()) {
        weights(rows_a, m.mimo_out, r);
        for (int64_t i = 0; i < height; i += kLanes) {
          const vf part = load(rows_a + i) * load(o + i);
          store(total + i, r == 0 ? part : load(total + i) + part);
        }
      } else {
        write_row(p.out.at(b, t, r, head), p.out.dtype, p.out.stride[4], o, p.headdim);
      }
    }
    if (m.mimo_out.given())
      write_row(p.out.at(b, t, 0, head), p.out.dtype, p.out.stride[4], total, p.headdim);
  }

  // What the next token finds before it.
  void advance() const {
    if (!has_trap()) return;
    for (int64_t i = 0; i < rank * width; i += kLanes) store(before + i, load(k + i));
    for (int64_t i = 0; i < height; i += kLanes) store(v + i, load(x + i));
  }

  void zero_output(int64_t from_token) const {
    const int64_t ranks = p.mamba3.mimo_out.given() ? 1 : rank;
    for (int64_t t = from_token; t < p.ntokens; ++t)
      for (int64_t r = 0; r < ranks; ++r)
        zero_row(p.out.at(b, t, r, head), p.out.dtype, p.out.stride[4], p.headdim);
  }

  // The call

  void one_token() const {
    if (can_stream()) ask_for(p.state.at(slots.in, head), kAheadBytes);
    prepare(0);
    if (can_stream()) {
      const States from = states_in(slots.in), to = states_in(slots.out);
      with_type(p.state.dtype, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        update_all<true>(reinterpret_cast<const T *>(from.data), from.row,
                         reinterpret_cast<T *>(to.data), to.row);
      });
    } else {
      update_through_scratch();
    }
    finish(0);
    advance();
    keep_small(0);
  }

  void several_tokens() const {
    const States from = slots.start >= 0 ? states_after(slots.start) : states_in(slots.in);
    for (int64_t i = 0; i < p.headdim; ++i) read_states(held + i * width, from, i);
    for (int64_t t = 0; t < slots.tokens; ++t) {
      prepare(t);
      if (compiled()) {
        update_all<false>(held, width, held, width);
      } else {
        each_row([&](int64_t i, float *at) { update_any_row(held + i * width, i, at); });
      }
      finish(t);
      advance();
      for (int64_t i = 0; i < p.headdim; ++i) keep_row(t, i, held + i * width);
      keep_small(t);
    }
    if (writes_one_slot())
      for (int64_t i = 0; i < p.headdim; ++i)
        write_states(states_in(slots.out), i, held + i * width);
  }

  // No tokens: the states pass through.
  void pass_through() const {
    const States from = slots.start >= 0 ? states_after(slots.start) : states_in(slots.in);
    for (int64_t i = 0; i < p.headdim; ++i) {
      read_states(row, from, i);
      write_states(states_in(slots.out), i, row);
    }
  }

  void run() const {
    if (slots.pad) return zero_output(0);
    if (slots.tokens == 0 && slots.start < 0 && slots.in == slots.out) return zero_output(0);
    read_small();
    if (slots.tokens == 0) {
      if (writes_one_slot()) pass_through();
    } else if (p.ntokens == 1) {
      one_token();
    } else {
      several_tokens();
    }
    zero_output(slots.tokens);
    // Last: what stands in the slot was needed above.
    if (writes_one_slot()) small_states_in(slots.out, write_small);
  }
};

inline void state_update_mamba3(const StateUpdateProblem &p) {
  const int64_t floats = mamba3_update_floats(p);
  parallel(p.batch * p.nheads, p.batch * p.nheads * p.headdim * (p.dstate + 8) * p.ntokens,
           [&](int64_t i) {
             alignas(64) float stack[kMamba3StackFloats];
             float *const scratch = floats <= kMamba3StackFloats
                                        ? stack
                                        : static_cast<float *>(p.workspace.data) + i * floats;
             Mamba3Update(p, i / p.nheads, i % p.nheads, scratch).run();
           });
}

}  // namespace ssmk::cpu::SSMK_ISA
