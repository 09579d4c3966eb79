// SPDX-License-Identifier: MIT
// Decode of Mamba-3 on tensor cores: which calls it takes.
#include "cuda/state_update_mamba3_mma.cuh"

#include "cuda/state_update_tied_call.cuh"

namespace ssmk::cuda {
namespace {

// What has one piece along its last axis, and there neighbours in pairs.
template <int Rank>
bool pairs(const View<Rank> &v) {
  return !v.given() || packs_along(v, Rank - 1, 2 * size_of(v.dtype));
}

// Of ranks, at the place of `other` if not given.
bool per_rank(const View<3> &v, const char *other, PerRank *to) {
  *to = {v.given() ? v.data : other, 0, 0};
  return narrow_stride(v.stride[0], v.dtype, &to->head) &&
         narrow_stride(v.stride[1], v.dtype, &to->rank);
}

template <int Rank>
bool per_slot(const View<Rank> &v, int head_axis, PerSlot *to) {
  to->data = v.data;
  return narrow_stride(v.stride[0], v.dtype, &to->slot) &&
         narrow_stride(v.stride[head_axis], v.dtype, &to->head);
}

bool fits(const StateUpdateProblem &q, Mamba3Mma *p) {
  const Mamba3 &m = q.mamba3;
  const auto is = [](const auto &v, DType dtype) { return !v.given() || v.dtype == dtype; };
  const auto either = [](const auto &v) {
    return !v.given() || v.dtype == DType::kF32 || v.dtype == DType::kBF16;
  };
  if (q.dstate != kMma3States || q.headdim < 2 || q.headdim > kMma3Rows || q.headdim % 2 ||
      m.nangles > kMma3Angles || q.ntokens > kMma3Tokens || m.norm_weight.given() ||
      !q.trap.given() || m.rotary_half != (m.rank > 1) ||
      (m.rank == 1 ? m.mimo_x.given() || m.mimo_z.given() || m.mimo_out.given() : m.rank != 4))
    return false;
  if (!q.adt.given() && !(one_decay(q) && q.A.stride[1] == 0)) return false;
  constexpr DType kX = DType::kBF16;
  if (q.x.dtype != kX || !is(q.k_state, kX) || !is(q.v_state, kX) ||
      !is(q.angle_state, DType::kF32) || !either(q.out) || !either(q.A) || !either(q.adt) ||
      !either(q.trap) || !either(q.angles) || !either(m.B_bias) || !either(m.C_bias) ||
      !either(m.mimo_x) || !either(m.mimo_z) || !either(m.mimo_out) || !tied_call(q, p))
    return false;
  if (!pairs(q.x) || !pairs(q.z) || !pairs(q.out) || !pairs(q.B) || !pairs(q.C) ||
      !pairs(q.k_state) || !pairs(q.v_state) || !pairs(m.B_bias) || !pairs(m.C_bias) ||
      !pairs(m.mimo_x) || !pairs(m.mimo_z) || !pairs(m.mimo_out) ||
      (q.angles.given() && (q.angles.stride[3] != 1 || q.angle_state.stride[2] != 1)))
    return false;

  const auto flag = [](bool given, uint32_t bit) { return given ? bit : 0; };
  const auto wide = [&](const auto &v, uint32_t bit) { return flag(v.dtype == DType::kF32, bit); };
  View<4> rate;  // (batch, token, -, head), as dt
  if (q.adt.given()) {
    rate.data = q.adt.data, rate.dtype = q.adt.dtype;
    for (int i = 0; i < 3; ++i) rate.stride[i] = q.adt.stride[i];
  } else {
    rate.data = q.A.data, rate.dtype = q.A.dtype, rate.stride[2] = q.A.stride[0];
  }
  p->parts = flag(q.adt.given(), kHasAdt) | wide(rate, kWideRate) | wide(q.trap, kWideTrap) |
             flag(m.trap_sigmoid, kTrapSigmoid) | wide(q.angles, kWideAngles) |
             flag(m.B_bias.given(), kHasKeyBias) | flag(m.C_bias.given(), kHasQueryBias) |
             wide(m.B_bias, kWideKeyBias) | wide(m.C_bias, kWideQueryBias) |
             flag(m.mimo_x.given(), kHasPsi) | flag(m.mimo_z.given(), kHasZeta) |
             flag(m.mimo_out.given(), kHasPhi) | wide(m.mimo_x, kWidePsi) |
             wide(m.mimo_z, kWideZeta) | wide(m.mimo_out, kWidePhi) |
             flag(q.slots.keep_state, kKeepState) | wide(q.out, kWideOut);
  p->nangles = q.angles.given() ? int(m.nangles) : 0;
  // What is not given is read all the same, in the place of something as large.
  if (!q.slots.in.given()) p->in = {q.x.data, 0};
  if (!q.slots.out.given()) p->out_slots = {q.x.data, 0};
  View<2> other;
  other.data = q.x.data;
  return per_head(q.D.given() ? q.D : other, &p->D) &&
         per_head(q.dt_bias.given() ? q.dt_bias : other, &p->dt_bias) &&
         per_token(rate, 2, &p->rate) && per_token(q.trap, 2, &p->trap) &&
         per_token(q.angles, 2, &p->angles) && per_rank(m.B_bias, q.B.data, &p->key_bias) &&
         per_rank(m.C_bias, q.B.data, &p->query_bias) && per_rank(m.mimo_x, q.x.data, &p->psi) &&
         per_rank(m.mimo_z, q.x.data, &p->zeta) && per_rank(m.mimo_out, q.x.data, &p->phi) &&
         per_slot(q.angle_state, 1, &p->angle_state) && per_slot(q.v_state, 1, &p->v_state) &&
         per_slot(q.k_state, 2, &p->k_state) &&
         narrow_stride(q.k_state.stride[1], q.k_state.dtype, &p->k_rank) &&
         narrow_stride(q.B.stride[2], q.B.dtype, &p->B_rank) &&
         narrow_stride(q.C.stride[2], q.C.dtype, &p->C_rank) &&
         narrow_stride(q.out.stride[2], q.out.dtype, &p->out_rank);
}

template <class S, int kRank, int kTokens, int kTiles, bool kHeld, int kBlocks>
ssmk_status run(const Mamba3Mma &p, const StateUpdateProblem &q, const Call &call) {
  constexpr bool kMany = kRank > 1 && kTokens > 1;
  return each_grid(p, update_mamba3_mma<S, kRank, kTokens, kTiles, kHeld, kBlocks>, 1, q.nheads,
                   q.batch, 128 / kTiles, MmaRoom<S, kMany, kTokens, kHeld>::bytes, call);
}

// As measured on 9.0, of those that need no more registers than there are.
template <class S>
ssmk_status take(const Mamba3Mma &p, const StateUpdateProblem &q, const Call &call) {
  constexpr bool kWide = sizeof(S) == 4;
  if (q.mamba3.rank == 1) return run<S, 1, kMma3Tokens, 1, true, kWide ? 4 : 5>(p, q, call);
  if constexpr (!kWide)
    if (q.ntokens == 1) return run<S, 4, 1, 2, false, 8>(p, q, call);
  if (q.ntokens == 2) return run<S, 4, 2, 1, false, kWide ? 4 : 5>(p, q, call);
  return run<S, 4, kMma3Tokens, 1, false, kWide ? 3 : 4>(p, q, call);
}

}  // namespace

bool state_update_mamba3_mma(const StateUpdateProblem &q, const Call &call, ssmk_status *status) {
  Mamba3Mma p = {};
  const bool wide = q.state.dtype == DType::kF32;
  // One token is bound by the memory without this where there is one rank, or the states are wide.
  if (q.state.dtype == DType::kF16 || (q.ntokens == 1 && (wide || q.mamba3.rank == 1)) ||
      !fits(q, &p))
    return false;
  *status = wide ? take<float>(p, q, call) : take<__nv_bfloat16>(p, q, call);
  return true;
}

}  // namespace ssmk::cuda
