// SPDX-License-Identifier: MIT
// What a token of a Mamba-3 head needs beside its states: decay, rotated keys and queries, the
// coefficients of each row; and the way from the sums of its rows to its output.
#pragma once

#include <initializer_list>

#include "cpu/dt.h"
#include "cpu/mamba3.h"
#include "cpu/rows.h"

namespace ssmk::cpu::SSMK_ISA {

// One head of one batch row.
struct Mamba3Token {
  const StateUpdateProblem &p;
  const int64_t b, head, group, rank;
  const int64_t width, height;  // dstate and headdim in whole vectors
  float *next;                  // of the scratch

  // Over dstate, a row a rank: this token's keys, the last one's, queries; all laid out in `keys`.
  float *k, *before, *q, *keys;
  float *row, *rates, *line;  // a row of states, of A, of anything
  // Over headdim.  coefs and y have a row a rank: what update_heads_row() takes, and its sums.
  float *coefs, *y, *x, *v, *dt, *decay, *gate, *scale_a, *scale_b, *bias, *total;
  float *sums;                                // lane sums of kLanes rows, rank by rank
  float *theta, *low, *turn, *sine, *cosine;  // over nangles
  float *held;                                // the states in float32, if there are several tokens

  // One array more or less is one in mamba3_update_floats() (dispatch.cc).
  Mamba3Token(const StateUpdateProblem &problem, int64_t row_of_batch, int64_t h, float *scratch)
      : p(problem),
        b(row_of_batch),
        head(h),
        group(h / (problem.nheads / problem.ngroups)),
        rank(problem.mamba3.rank),
        width(whole_vectors(problem.dstate)),
        height(whole_vectors(problem.headdim)),
        next(scratch) {
    for (float **over_dstate : {&k, &before, &q}) *over_dstate = take(rank * width);
    keys = take(3 * rank * width);
    for (float **over_dstate : {&row, &rates, &line}) *over_dstate = take(width);
    coefs = take(2 * rank * height);
    y = take(rank * height);
    for (float **over_headdim : {&x, &v, &dt, &decay, &gate, &scale_a, &scale_b, &bias, &total})
      *over_headdim = take(height);
    sums = take(rank * kLanes * kLanes);
    for (float **over_angles : {&theta, &low, &turn, &sine, &cosine})
      *over_angles = take(whole_vectors(problem.mamba3.nangles));
    held = next;
  }

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
  // Reading

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
    const float *skip = p.D.given() ? parameters(scale_b, p.D) : nullptr;
    for (int64_t r = 0; r < rank; ++r) {
      const float *psi = p.mamba3.mimo_x.given() ? weights(scale_a, p.mamba3.mimo_x, r) : nullptr;
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

  // The end of a token

  void finish(int64_t t) const {
    const Mamba3 &m = p.mamba3;
    const float *weight = m.norm_weight.given() ? parameters(scale_b, m.norm_weight) : nullptr;
    const float *z = p.z.given() ? values(dt, p.z, t) : nullptr;
    for (int64_t r = 0; r < rank; ++r) {
      float *const o = y + r * height;
      const float *gated = z;
      if (z && m.mimo_z.given()) {
        weights(scale_a, m.mimo_z, r);
        for (int64_t i = 0; i < height; i += kLanes)
          store(gate + i, load(scale_a + i) * load(z + i));
        gated = gate;
      }
      normalise_and_gate(o, weight, m.norm_eps, gated, p.headdim);
      if (m.mimo_out.given()) {
        weights(scale_a, m.mimo_out, r);
        for (int64_t i = 0; i < height; i += kLanes) {
          const vf part = load(scale_a + i) * load(o + i);
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
};

}  // namespace ssmk::cpu::SSMK_ISA
