// SPDX-License-Identifier: MIT
// Decode on the GPU: which kernel, how many blocks.  Nothing here depends on anything but sizes,
// dtypes and strides, so a captured launch stays right.
#include "cuda/state_update_channels_launch.cuh"
#include "cuda/state_update_heads.cuh"
#include "cuda/state_update_launch.cuh"
#include "cuda/state_update_packed.cuh"

namespace ssmk::cuda {
namespace {

constexpr int64_t kStageBytes = 24 << 10;  // of tokens in shared memory at a time

template <class S, class X, int kRows, int kChunks, int kThreads>
ssmk_status run_packed(const PackedProblem &p, const StateUpdateProblem &q, const Call &call) {
  const int64_t rows = int64_t(kThreads >> p.log_lanes) * kRows;
  return each_grid(p, update_packed<S, X, kRows, kChunks, kThreads>, (q.headdim + rows - 1) / rows,
                   q.nheads, q.batch, kThreads, 0, call);
}

template <class S>
ssmk_status run_heads(const Cut &cut, const StateUpdateProblem &q, const Call &call) {
  HeadsProblem p = {};
  p.x = q.x, p.dt = q.dt, p.z = q.z, p.out = q.out;
  p.A = q.A, p.B = q.B, p.C = q.C, p.D = q.D, p.dt_bias = q.dt_bias;
  p.state = q.state, p.intermediate = q.intermediate, p.slots = q.slots;
  p.dt_transform = q.dt_transform;
  p.ntokens = int(q.ntokens), p.headdim = int(q.headdim), p.dstate = int(q.dstate);
  p.heads_per_group = int(q.nheads / q.ngroups);
  p.packs = cut.packs, p.log_lanes = cut.log_lanes;
  p.padded = cut.lanes() * cut.chunks * kPack<S>;
  p.one_decay = one_decay(q);
  const int rows = kHeadsThreads >> cut.log_lanes;
  const int64_t token = heads_token_bytes(rows, p.padded);
  p.stage = int(kStageBytes / token < 1 ? 1 : kStageBytes / token);
  if (p.stage > p.ntokens) p.stage = p.ntokens;
  return each_grid(p, update_heads<kPack<S>>, (q.headdim + rows - 1) / rows, q.nheads, q.batch,
                   kHeadsThreads, token * p.stage, call);
}

// For the packed kernel, if it can do the call.
template <class S>
bool packed(const Cut &cut, const StateUpdateProblem &q, PackedProblem *p) {
  constexpr int64_t kMost = INT32_MAX, kMostHeads = 1 << 20;
  const auto packs = [&](const View<5> &v) {
    return v.dtype == q.x.dtype && packs_of(v, 4, kPack<S>);
  };
  // A wider x than the states are would need more registers than its use is worth.
  if (size_of(q.x.dtype) > size_of(q.state.dtype)) return false;
  if (size_of(q.state.dtype) == 2 && q.x.dtype != q.state.dtype) return false;
  if (q.out.dtype != q.x.dtype || (q.z.given() && q.z.dtype != q.x.dtype)) return false;
  if (q.dstate == 0 || q.dstate % kPack<S> || cut.chunks > 3 || !packs_along(q.state, 3, 16) ||
      !packs(q.B) || !packs(q.C) || q.ntokens == 0)
    return false;
  if (q.intermediate.given() &&
      (q.intermediate.dtype != q.state.dtype || !packs_along(q.intermediate, 4, 16)))
    return false;
  if (!one_decay(q) && (q.A.dtype != DType::kF32 || !packs_along(q.A, 2, 16) ||
                        (q.dt.dtype == DType::kF16 && q.x.dtype != DType::kF16)))
    return false;
  if (q.slots.pad.entries > kMost || q.slots.intermediate_entries > kMost || q.batch > kMost ||
      q.nheads > kMostHeads || q.headdim > kMostHeads || q.ntokens > kMostHeads)
    return false;
  p->slots = q.slots;
  p->dt_transform = q.dt_transform;
  p->ntokens = int(q.ntokens), p->headdim = int(q.headdim);
  p->groups_per_head = 1.0f / float(q.nheads / q.ngroups);
  p->packs = cut.packs, p->log_lanes = cut.log_lanes;
  View<2> out = q.slots.out;
  if (q.slots.out_per_token) out = {};
  return near(q.x, {0, 1, 2, 3}, &p->x) && near(q.dt, {0, 1, 2, 3}, &p->dt) &&
         near(q.z, {0, 1, 2, 3}, &p->z) && near(q.out, {0, 1, 3, 4}, &p->out) &&
         near(q.A, {0, 1, 2}, &p->A) && near(q.B, {0, 1, 3, 4}, &p->B) &&
         near(q.C, {0, 1, 3, 4}, &p->C) && near(q.D, {0, 1}, &p->D) &&
         near(q.dt_bias, {0, 1}, &p->dt_bias) && near(q.state, {0, 1, 2, 3}, &p->state) &&
         near(q.intermediate, {0, 1, 2, 3, 4}, &p->intermediate) &&
         near(q.slots.in, {0, 1}, &p->in) && near(out, {0, 1}, &p->one_out);
}

template <class S, class X>
ssmk_status pick_packed(const Cut &cut, const PackedProblem &p, const StateUpdateProblem &q,
                        const Call &call) {
  constexpr int kThreads = 128;
  if (cut.chunks == 3) return run_packed<S, X, 1, 3, kThreads>(p, q, call);
  if (cut.chunks == 2) return run_packed<S, X, 1, 2, kThreads>(p, q, call);
  // Rows of a thread share what it costs to prepare a token.
  if (cut.lanes() >= 4) return run_packed<S, X, 4, 1, kThreads>(p, q, call);
  if (cut.lanes() >= 2) return run_packed<S, X, 2, 1, kThreads>(p, q, call);
  return run_packed<S, X, 1, 1, kThreads>(p, q, call);
}

template <class S, class X>
ssmk_status run_any_packed(const Cut &cut, const PackedProblem &p, const StateUpdateProblem &q,
                           const Call &call) {
  // One decay and one token is state_update_tied()'s, but for odd layouts.
  if (one_decay(q)) return pick_packed<S, X>(cut, p, q, call);
  return channels<S, X>(cut, p, q, call);
}

template <class S>
ssmk_status heads(const StateUpdateProblem &q, const Call &call) {
  const Cut cut = cut_of(q.dstate, kPack<S>);
  if (cut.chunks == 0) return too_long(call, q.dstate, kMostLanes * kMostChunks * kPack<S>);
  PackedProblem p = {};
  if (!packed<S>(cut, q, &p)) return run_heads<S>(cut, q, call);
  if constexpr (sizeof(S) == 4) {
    if (q.x.dtype == DType::kF16) return run_any_packed<S, __half>(cut, p, q, call);
    if (q.x.dtype == DType::kBF16) return run_any_packed<S, __nv_bfloat16>(cut, p, q, call);
  }
  return run_any_packed<S, S>(cut, p, q, call);
}

}  // namespace

ssmk_status state_update(const StateUpdateProblem &p, const Call &call) {
  if (p.batch == 0 || p.nheads == 0 || p.headdim == 0) return SSMK_OK;
  if (p.is_mamba3()) return state_update_mamba3(p, call);
  ssmk_status status = SSMK_OK;
  if (state_update_tied(p, call, &status)) return status;
  if (p.state.dtype == DType::kF32) return heads<float>(p, call);
  if (p.state.dtype == DType::kF16) return heads<__half>(p, call);
  return heads<__nv_bfloat16>(p, call);
}

}  // namespace ssmk::cuda
