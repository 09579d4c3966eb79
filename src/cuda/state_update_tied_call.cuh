// SPDX-License-Identifier: MIT
// A StateUpdateProblem as a TiedProblem: what Mamba-2 and 3 share.
#pragma once

#include <cmath>

#include "cuda/near.cuh"
#include "cuda/state_update_launch.cuh"
#include "cuda/state_update_tied.cuh"

namespace ssmk::cuda {

constexpr int64_t kMostHeads = 1 << 15;  // group_of() is exact

template <int Rank>
bool per_token(const View<Rank> &v, int group_axis, PerToken *to) {
  to->data = v.data;
  return narrow_stride(v.stride[0], v.dtype, &to->batch) &&
         narrow_stride(v.stride[1], v.dtype, &to->token) &&
         narrow_stride(v.stride[group_axis], v.dtype, &to->head);
}

inline bool per_head(const View<2> &v, PerHead *to) {
  to->data = v.data;
  return v.stride[1] == 0 && narrow_stride(v.stride[0], v.dtype, &to->head);
}

inline bool slot_list(const View<2> &v, SlotList *to) {
  to->data = v.data;
  return narrow_stride(v.stride[0], v.dtype, &to->batch);
}

// All but A, D and dt_bias, and what depends on the rank.  False if the call is not tied.
inline bool tied_call(const StateUpdateProblem &q, TiedProblem *p) {
  const Slots &s = q.slots;
  if (q.intermediate.given() || s.num_accepted.given() || s.out_per_token || s.in_choices != 1 ||
      q.ntokens == 0)
    return false;
  if (s.pad.entries < 1 || s.pad.entries > INT32_MAX || q.batch > INT32_MAX ||
      q.nheads > kMostHeads || q.headdim > kMostHeads || q.ntokens > kMostHeads)
    return false;
  const auto either = [&](DType t) { return t == DType::kF32 || t == q.x.dtype; };
  if (q.B.dtype != q.x.dtype || q.C.dtype != q.x.dtype || !either(q.dt.dtype) ||
      (q.z.given() && q.z.dtype != q.x.dtype) || (q.D.given() && !either(q.D.dtype)) ||
      (q.dt_bias.given() && !either(q.dt_bias.dtype)))
    return false;
  if (q.dt.stride[3] != 0 || q.state.stride[2] != q.dstate || !packs_along(q.state, 3, 16))
    return false;

  const auto flag = [](bool given, uint32_t bit) { return given ? bit : 0; };
  const auto wide = [&](DType t, uint32_t bit) { return flag(t == DType::kF32, bit); };
  p->flags = flag(s.in.given(), kHasSlots) | flag(s.out.given(), kHasOutSlots) |
             flag(s.in.dtype == DType::kI64, kWideSlots) |
             flag(s.out.dtype == DType::kI64, kWideOutSlots) | wide(q.dt.dtype, kWideDt) |
             flag(q.dt_bias.given(), kHasBias) | wide(q.dt_bias.dtype, kWideBias) |
             flag(q.dt_transform.softplus, kSoftplus) | flag(q.z.given(), kHasZ) |
             flag(q.D.given(), kHasD) | wide(q.D.dtype, kWideD);
  p->headdim = int(q.headdim), p->ntokens = int(q.ntokens);
  p->entries = uint32_t(s.pad.entries);
  const bool pads = s.pad.has_pad_slot && s.pad.pad_slot >= 0 && s.pad.pad_slot < s.pad.entries;
  p->pad_slot = pads ? uint32_t(s.pad.pad_slot) : p->entries;
  const uint64_t heads = uint64_t(q.nheads / q.ngroups);
  p->heads_inverse = uint32_t(((uint64_t(1) << 31) + heads - 1) / heads);
  p->dt_lo = q.dt_transform.clamp ? q.dt_transform.lo : -INFINITY;
  p->dt_hi = q.dt_transform.clamp ? q.dt_transform.hi : INFINITY;
  p->state = q.state.data;
  p->num_tokens = s.num_tokens;
  return narrow_stride(q.state.stride[0], q.state.dtype, &p->state_slot) &&
         narrow_stride(q.state.stride[1], q.state.dtype, &p->state_head) &&
         slot_list(s.in, &p->in) && slot_list(s.out, &p->out_slots) && per_token(q.x, 2, &p->x) &&
         per_token(q.dt, 2, &p->dt) && per_token(q.z.given() ? q.z : q.x, 2, &p->z) &&
         per_token(q.out, 3, &p->out) && per_token(q.B, 3, &p->B) && per_token(q.C, 3, &p->C);
}

}  // namespace ssmk::cuda
