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
//
// A source of its own: beside it in one the compiler inlines less of the Mamba-2 kernel.
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/state_update_mamba3_row.h"
#include "cpu/state_update_mamba3_token.h"
#include "cpu/state_update_slots.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

// A Mamba3Token with the states of its head.
struct Mamba3Update : Mamba3Token {
  const RowSlots slots;

  Mamba3Update(const StateUpdateProblem &problem, int64_t row_of_batch, int64_t h, float *scratch)
      : Mamba3Token(problem, row_of_batch, h, scratch), slots(row_slots(problem, row_of_batch)) {}

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
        fetch(reinterpret_cast<const char *>(from + i * from_row) + kAheadBytes,
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

  // The call

  void one_token() const {
    if (can_stream()) fetch(p.state.at(slots.in, head), kAheadBytes);
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

}  // namespace

void state_update_mamba3(const StateUpdateProblem &p) {
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
