// SPDX-License-Identifier: MIT
// One chunk of one head: the arithmetic of ssd_chunk.
//
// Within a chunk of tokens i (rank rows r), with cs_i the sum of the log decays up to i, Ht the
// state before the chunk, u = psi x, and gamma_i = lambda_i dt_i:
//
//   y_i^r = exp(cs_i) Ht q_i^r + sum_{j<i, r'} exp(cs_i - cs_j) s_j (q_i^r . k_j^r') u_j^r'
//                              + gamma_i sum_r' (q_i^r . k_i^r') u_i^r'
//   Ht   <- exp(cs_end) Ht + sum_{j, r'} exp(cs_end - cs_j) s_j u_j^r' (k_j^r')^T
//   s_j   = gamma_j + (1 - lambda_{j+1}) dt_{j+1}
//
// (the specification's prefill form of the recurrence).  The last token of a chunk has s = gamma,
// so Ht is then the state h itself; the next chunk begins by adding what its first token owes to
// the last one, (1 - lambda) dt sum_r (psi^r x)(k^r)^T.  So a chunk may end anywhere. The state
// lies transposed, (dstate, headdim): vectors run over headdim in every product.
#pragma once

#include "cpu/dt.h"
#include "cpu/gemm.h"
#include "cpu/mamba3.h"
#include "cpu/rows.h"
#include "cpu/ssd_chunk_plan.h"

namespace ssmk::cpu::SSMK_ISA {

// exp of anything below is 0 in float32, of its negative infinite: cutting the log decays off there
// changes no decay, and keeps their sums finite.
constexpr double kLogDecayLimit = 200;

// What a head carries from chunk to chunk.
struct HeadScratch {
  float *h, *theta, *theta_low, *k, *v;
  bool h_is_zero;       // nothing was written to h yet
  bool before_is_zero;  // nor to k and v
  bool turned;          // theta has seen a token; before, it is as the caller gave it
};

// Tokens of one head, of the same row.
struct TokenSpan {
  int64_t head, begin, tokens;
};

struct SsdHead {
  const SsdChunkProblem &p;
  const SsdChunkPlan &plan;
  float *scratch;  // the worker's
  HeadScratch &state;
  int64_t row, head, group;  // of the batch; of all heads
  int64_t begin, tokens;     // the chunk
  TokenSpan next;            // what the worker computes after it

  float *at(int64_t offset) const { return scratch + offset; }
  int64_t rank() const { return p.mamba3.rank; }
  int64_t rows() const { return tokens * rank(); }

  // Parameters

  void read_ranks(int64_t to, const View<3> &v, int64_t n, int64_t ld) const {
    for (int64_t r = 0; v.given() && r < rank(); ++r)
      read_padded(at(to) + r * ld, v.at(head, r), v.dtype, v.stride[2], n);
  }

  void read_parameters() const {
    const Mamba3 &m = p.mamba3;
    read_ranks(plan.at.psi, m.mimo_x, p.headdim, plan.headdim);
    read_ranks(plan.at.zeta, m.mimo_z, p.headdim, plan.headdim);
    read_ranks(plan.at.phi, m.mimo_out, p.headdim, plan.headdim);
    read_ranks(plan.at.B_bias, m.B_bias, p.dstate, plan.dstate);
    read_ranks(plan.at.C_bias, m.C_bias, p.dstate, plan.dstate);
    if (p.D.given()) read_padded(at(plan.at.D), p.D.at(head), p.D.dtype, p.D.stride[1], p.headdim);
    if (m.norm_weight.given())
      read_padded(at(plan.at.norm), m.norm_weight.at(head), m.norm_weight.dtype,
                  m.norm_weight.stride[1], p.headdim);
  }

  // dt, decays and weights of the chunk's tokens, then spread over their rank rows.

  void read_tokens(float *dst, const View<3> &v) const {
    read_row(dst, v.at(row, begin, head), v.dtype, v.stride[1], tokens);
  }

  void prepare_dt() const {
    float *const dt = at(plan.at.dt), *const gamma = at(plan.at.gamma),
                 *const trap = at(plan.at.trap);
    read_tokens(dt, p.dt);
    const float bias = p.dt_bias.given() ? read_one(p.dt_bias.at(head), p.dt_bias.dtype) : 0;
    for (int64_t i = 0; i < tokens; i += kLanes)
      store(dt + i,
            transform_dt(p.dt_transform, p.dt_bias.given() ? load(dt + i) + bias : load(dt + i)));
    if (!p.trap.given()) {
      for (int64_t i = 0; i < tokens; i += kLanes) store(gamma + i, load(dt + i));
      return;
    }
    read_tokens(trap, p.trap);
    for (int64_t i = 0; i < tokens; i += kLanes) {
      const vf lambda = p.mamba3.trap_sigmoid ? load(trap + i) : sigmoid(load(trap + i));
      // 1 - sigmoid(x) = sigmoid(-x), without the cancellation.
      const vf rest = p.mamba3.trap_sigmoid ? 1.f - lambda : sigmoid(-load(trap + i));
      store(gamma + i, lambda * load(dt + i));
      store(trap + i, rest * load(dt + i));  // what the token adds for the one before it
    }
  }

  // The sums of the log decays, in units of log 2, as pairs high + low: late in a chunk of fast
  // decays their differences are still exact to the last bit of a float.
  void prepare_decays() const {
    float *const high = at(plan.at.log_decay), *const low = at(plan.at.log_decay_low);
    float *const adt = at(plan.at.weight);  // free until the weights are known
    if (p.adt.given()) read_tokens(adt, p.adt);
    const double A = p.A.given() ? double(read_one(p.A.at(head), p.A.dtype)) : 0;
    const float *const dt = at(plan.at.dt);
    double sum = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      double a = p.A.given() ? double(dt[i]) * A : double(adt[i]);
      a = a < -kLogDecayLimit ? -kLogDecayLimit : a > kLogDecayLimit ? kLogDecayLimit : a;
      sum += a * 1.4426950408889634074;
      high[i] = float(sum);
      low[i] = float(sum - double(high[i]));
    }
  }

  void spread_over_ranks(float *values) const {
    const int64_t R = rank();
    for (int64_t i = tokens; R > 1 && i-- > 0;)
      for (int64_t r = R; r-- > 0;) values[i * R + r] = values[i];
  }

  void prepare_rows() const {
    float *const high = at(plan.at.log_decay), *const low = at(plan.at.log_decay_low);
    float *const gamma = at(plan.at.gamma), *const s = at(plan.at.write);
    const float *const trap = at(plan.at.trap);
    for (int64_t i = 0; i < tokens; ++i)
      s[i] = p.trap.given() && i + 1 < tokens ? gamma[i] + trap[i + 1] : gamma[i];
    for (float *values : {high, low, gamma, s}) spread_over_ranks(values);
    int32_t *const token = reinterpret_cast<int32_t *>(at(plan.at.token));
    for (int64_t i = 0; i < plan.padded_rows; ++i) token[i] = int32_t(i / rank());

    const float last_high = high[rows() - 1], last_low = low[rows() - 1];
    for (int64_t i = 0; i < rows(); i += kLanes) {
      const vf h = load(high + i), l = load(low + i);
      store(at(plan.at.decay) + i, exp2<true>(h + l));
      store(at(plan.at.weight) + i, exp2<true>((last_high - h) + (last_low - l)) * load(s + i));
    }
  }

  // Keys and queries of a head that has its own; u = psi x.

  // The sines and cosines of all tokens.  Only theta itself passes from token to token; the rest
  // is done in a second go, where nothing waits for it.
  void prepare_angles(bool new_angles) const {
    const int64_t n = p.mamba3.nangles, ld = plan.nangles;
    float *const turn = at(plan.at.turn), *const sine = at(plan.at.sine),
                 *const cosine = at(plan.at.cosine);
    for (int64_t i = 0; new_angles && i < tokens; ++i) {
      read_padded(turn + i * ld, p.angles.at(row, begin + i, head), p.angles.dtype,
                  p.angles.stride[3], n);
      for (int64_t j = 0; j < n; j += kLanes)
        store(turn + i * ld + j, tanh(load(turn + i * ld + j)));
    }
    for (int64_t j = 0; j < n; j += kLanes) {
      Angle a = {load(state.theta + j), load(state.theta_low + j)};
      if (!state.turned) a = wrapped(a);
      for (int64_t i = 0; i < tokens; ++i) {
        a = turned(a, load(turn + i * ld + j) * at(plan.at.dt)[i]);
        store(sine + i * ld + j, a.high);
        store(cosine + i * ld + j, a.low);
      }
      store(state.theta + j, a.high);
      store(state.theta_low + j, a.low);
    }
    state.turned = true;
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = i * ld; j < i * ld + n; j += kLanes) {
        vf s, c;
        sincos(Angle{load(sine + j), load(cosine + j)}, &s, &c);
        store(sine + j, s);
        store(cosine + j, c);
      }
  }

  void prepare_keys() const {
    const Mamba3 &m = p.mamba3;
    const int64_t ld = plan.dstate;
    for (int64_t i = 0; i < tokens; ++i) {
      const float *const sine = at(plan.at.sine) + i * plan.nangles, *const cosine =
                                                                         at(plan.at.cosine) +
                                                                         i * plan.nangles;
      for (int64_t r = 0; r < rank(); ++r) {
        const int64_t to = (i * rank() + r) * ld;
        add_bias(at(plan.at.K) + to, at(plan.at.B) + to, m.B_bias.given(),
                 at(plan.at.B_bias) + r * ld);
        add_bias(at(plan.at.Q) + to, at(plan.at.C) + to, m.C_bias.given(),
                 at(plan.at.C_bias) + r * ld);
        if (p.angles.given()) {
          rotate(at(plan.at.K) + to, sine, cosine, m.nangles, p.dstate, m.rotary_half);
          rotate(at(plan.at.Q) + to, sine, cosine, m.nangles, p.dstate, m.rotary_half);
        }
      }
    }
  }

  void add_bias(float *to, const float *from, bool given, const float *bias) const {
    for (int64_t n = 0; n < p.dstate; n += kLanes)
      store(to + n, given ? load(from + n) + load(bias + n) : load(from + n));
  }

  // Row r of psi x.
  void scale_by_psi(float *to, const float *x, int64_t r) const {
    const bool given = p.mamba3.mimo_x.given();
    const float *const psi = at(plan.at.psi) + r * plan.headdim;
    for (int64_t i = 0; i < p.headdim; i += kLanes)
      store(to + i, given ? load(x + i) * load(psi + i) : load(x + i));
  }

  // True if all values are finite.
  bool read_values() const {
    vf finite{};
    for (int64_t i = 0; i < tokens; ++i) {
      float *const first = at(plan.at.U) + i * rank() * plan.headdim;
      read_padded(first, p.x.at(row, begin + i, head), p.x.dtype, p.x.stride[3], p.headdim);
      for (int64_t r = rank(); r-- > 0;) {
        float *const u = first + r * plan.headdim;
        scale_by_psi(u, first, r);
        for (int64_t c = 0; c < p.headdim; c += kLanes) finite += load(u + c) - load(u + c);
      }
    }
    for (int i = 0; i < kLanes; ++i)
      if (!(finite[i] == 0)) return false;
    return true;
  }

  // What the first token owes to the last one of the chunk before.
  void add_before() const {
    if (!p.trap.given() || state.before_is_zero) return;
    float *const u = at(plan.at.before);
    const vf share = splat(at(plan.at.trap)[0]);
    for (int64_t r = 0; r < rank(); ++r) {
      scale_by_psi(u + r * plan.headdim, state.v, r);
      for (int64_t i = 0; i < p.headdim; i += kLanes)
        store(u + r * plan.headdim + i, load(u + r * plan.headdim + i) * share);
    }
    const float one = 1;
    gemm(state.h, plan.headdim, {state.k, 1, plan.dstate}, u, plan.headdim, p.dstate, p.headdim,
         rank(), state.h_is_zero ? GemmScale{} : GemmScale{&one, 0});
    state.h_is_zero = false;
  }

  // Keys for the next chunk, before anything scales them.
  void keep_last() const {
    if (!p.trap.given()) return;
    const int64_t last = tokens - 1;
    std::memcpy(state.k, at(plan.at.K) + last * rank() * plan.dstate,
                size_t(rank() * plan.dstate) * sizeof(float));
    read_padded(state.v, p.x.at(row, begin + last, head), p.x.dtype, p.x.stride[3], p.headdim);
    state.before_is_zero = false;
  }

  // A token's row of a head is too short for the processor to see a stream in it, and the next
  // token's is far.  So rows are fetched while products are computed: token i of a span, from the
  // rank rows that the product is at.
  template <int kRank>
  void prefetch(const View<kRank> &v, const char *first) const {
    if (v.stride[kRank - 1] == 1) fetch(first, p.headdim * size_of(v.dtype));
  }

  // Called with the rows of the product with Ht: of the same share of tokens, what this head still
  // reads and writes, and the x of the next.
  void prefetch_rows(int64_t i, int64_t end) const {
    for (int64_t t = (i + rank() - 1) / rank(); t * rank() < end; ++t) {
      if (p.z.given()) prefetch(p.z, p.z.at(row, begin + t, head));
      prefetch(p.out, p.out.at(row, begin + t, 0, head));
      if (t < next.tokens) prefetch(p.x, p.x.at(row, next.begin + t, next.head));
    }
  }

  // Products

  // One past the last row that row i may see: those of its own token, and of all before it.
  int64_t seen(int64_t i) const { return (i / rank() + 1) * rank(); }

  // G = Q K^T, for the rows of a token those up to it.
  void multiply_keys() const {
    const int64_t n = rows(), ld = plan.padded_rows;
    float *const transposed = at(plan.at.K_transposed);
    read_tile(transposed, ld, reinterpret_cast<const char *>(at(plan.at.K)), DType::kF32, 1,
              plan.dstate, p.dstate, n);
    gemm(
        at(plan.at.G), ld, {at(plan.at.Q), plan.dstate, 1}, transposed, ld, n, n, {},
        [&](int64_t) { return p.dstate; }, [&](int64_t i) { return seen(i); });
  }

  // M(i, j) = what u_j contributes to y_i; zeros where j is later than i, up to the end of the tile
  // that row i is in.
  void weigh() const {
    const float *const high = at(plan.at.log_decay), *const low = at(plan.at.log_decay_low),
                       *const s = at(plan.at.write), *const gamma = at(plan.at.gamma);
    const int32_t *const token = reinterpret_cast<const int32_t *>(at(plan.at.token));
    const int64_t n = rows(), ld = plan.padded_rows;
    for (int64_t i = 0; i < n; ++i) {
      const float *const G = at(plan.at.G) + i * ld;
      float *const M = at(plan.at.M) + i * ld;
      const int64_t last = i - i % kGemmRows + kGemmRows - 1, end = seen(last < n ? last : n - 1);
      const int64_t earlier = i / rank() * rank();
      int64_t j = 0;
      for (; j + kLanes <= earlier; j += kLanes)
        store(M + j, exp2<true>((high[i] - load(high + j)) + (low[i] - load(low + j))) *
                         load(s + j) * load(G + j));
      for (; j < end; j += kLanes) {
        const vi when = load_bits<int32_t, vi>(token + j), now = vi{} + token[i];
        const vf before =
            exp2<true>((high[i] - load(high + j)) + (low[i] - load(low + j))) * load(s + j);
        const vf weight = select(bitcast<vi>(when == now), splat(gamma[i]), before) * load(G + j);
        store(M + j, select(bitcast<vi>(when <= now), weight, vf{}));
      }
    }
  }

  // Y = exp(cs) Q Ht + M U.
  void multiply_values(bool finite) const {
    float *const Y = at(plan.at.Y);
    const int64_t n = rows(), ld = plan.headdim;
    if (!state.h_is_zero)
      gemm(
          Y, ld, {at(plan.at.Q), plan.dstate, 1}, state.h, ld, n, p.headdim, {},
          [&](int64_t) { return p.dstate; }, [&](int64_t) { return p.headdim; },
          [&](int64_t i, int64_t end) { prefetch_rows(i, end); });
    const GemmScale decay = state.h_is_zero ? GemmScale{} : GemmScale{at(plan.at.decay), 1};
    const GemmA M = {at(plan.at.M), plan.padded_rows, 1};
    if (finite) {
      gemm(
          Y, ld, M, at(plan.at.U), ld, n, p.headdim, decay, [&](int64_t i) { return seen(i); },
          [&](int64_t) { return p.headdim; });
      return;
    }
    // A zero in M would pass on what is not finite in a later row of U: row by row instead.
    for (int64_t i = 0; i < n; ++i) {
      const GemmScale scale = {decay.data ? decay.data + i : nullptr, 0};
      gemm(Y + i * ld, ld, {M.data + i * M.row, M.row, 1}, at(plan.at.U), ld, 1, p.headdim, seen(i),
           scale);
    }
  }

  void update_state() const {
    float *const U = at(plan.at.U);
    const int64_t n = rows();
    for (int64_t i = 0; i < n; ++i) {
      const vf weight = splat(at(plan.at.weight)[i]);
      for (int64_t c = 0; c < p.headdim; c += kLanes)
        store(U + i * plan.headdim + c, load(U + i * plan.headdim + c) * weight);
    }
    gemm(state.h, plan.headdim, {at(plan.at.K), 1, plan.dstate}, U, plan.headdim, p.dstate,
         p.headdim, n, state.h_is_zero ? GemmScale{} : GemmScale{at(plan.at.decay) + n - 1, 0});
    state.h_is_zero = false;
  }

  // D, norm, gate, the sum over the ranks.
  void write_outputs() const {
    const Mamba3 &m = p.mamba3;
    float *const gate = at(plan.at.gate), *const sum = at(plan.at.sum);
    float *const z = at(plan.at.before);  // free after add_before()
    for (int64_t i = 0; i < tokens; ++i) {
      if (p.z.given())
        read_padded(z, p.z.at(row, begin + i, head), p.z.dtype, p.z.stride[3], p.headdim);
      for (int64_t r = 0; r < rank(); ++r) {
        const int64_t from = (i * rank() + r) * plan.headdim;
        float *const y = at(plan.at.Y) + from;
        const float *const u = at(plan.at.U) + from, *const zeta =
                                                         at(plan.at.zeta) + r * plan.headdim;
        for (int64_t c = 0; p.D.given() && c < p.headdim; c += kLanes)
          store(y + c, fused(load(at(plan.at.D) + c), load(u + c), load(y + c)));
        for (int64_t c = 0; p.z.given() && c < p.headdim; c += kLanes)
          store(gate + c, m.mimo_z.given() ? load(z + c) * load(zeta + c) : load(z + c));
        if (m.norm_weight.given() || p.z.given())
          normalise_and_gate(y, m.norm_weight.given() ? at(plan.at.norm) : nullptr, m.norm_eps,
                             p.z.given() ? gate : nullptr, p.headdim);
        if (!m.mimo_out.given()) {
          write_row(p.out.at(row, begin + i, r, head), p.out.dtype, p.out.stride[4], y, p.headdim);
          continue;
        }
        const float *const phi = at(plan.at.phi) + r * plan.headdim;
        for (int64_t c = 0; c < p.headdim; c += kLanes)
          store(sum + c, r == 0 ? load(phi + c) * load(y + c)
                                : fused(load(phi + c), load(y + c), load(sum + c)));
      }
      if (m.mimo_out.given())
        write_row(p.out.at(row, begin + i, 0, head), p.out.dtype, p.out.stride[4], sum, p.headdim);
    }
  }

  // `first`: of the heads of the task, so nothing of what they share is there yet.
  void run(bool first) const {
    read_parameters();
    prepare_dt();
    prepare_decays();
    // While dt is one a token.
    if (p.angles.given()) prepare_angles(first || p.angles.stride[2] != 0);
    if (!plan.shared_keys) prepare_keys();
    prepare_rows();
    const bool finite = read_values();
    add_before();
    if (first || !plan.shared_keys) multiply_keys();
    weigh();
    multiply_values(finite);
    write_outputs();
    update_state();
    keep_last();
  }
};

}  // namespace ssmk::cpu::SSMK_ISA
