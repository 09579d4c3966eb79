// SPDX-License-Identifier: MIT
// Decode of Mamba-3 on the GPU: which kernel, how many blocks.
#include "cuda/state_update_mamba3.cuh"

#include "cuda/state_update_launch.cuh"
#include "cuda/state_update_mamba3_one.cuh"
#include "cuda/state_update_mamba3_packed.cuh"

namespace ssmk::cuda {
namespace {

// Shared memory of a block that any GPU has.
constexpr int64_t kMostPackedShared = 99 << 10, kMostAhead = 40 << 10;

ssmk_status run_any(const Cut &cut, const StateUpdateProblem &q, const Call &call) {
  Mamba3Launch p = {};
  p.p = q;
  p.packs = cut.packs, p.log_lanes = cut.log_lanes;
  p.padded = cut.lanes() * cut.chunks * kEight;
  p.one_decay = q.adt.given() || one_decay(q);
  const int64_t rows = kMamba3Threads >> cut.log_lanes;
  p.passes = int((q.headdim + rows - 1) / rows);
  const int64_t shared = mamba3_shared_floats(q, p.padded, p.passes) * int64_t(sizeof(float));
  const auto kernel = cut.chunks == 1 ? update_mamba3<1> : update_mamba3<kMamba3Chunks>;
  return each_grid(p, kernel, 1, q.nheads, q.batch, kMamba3Threads, shared, call);
}

int log2_up(int64_t n) {
  int log = 0;
  while ((int64_t(1) << log) < n) ++log;
  return log;
}

// For the packed kernel, if it can do the call.
template <class S>
bool packed(const Cut &cut, const StateUpdateProblem &q, Mamba3Packed *p) {
  constexpr int64_t kMost = INT32_MAX, kMostItems = 1 << 20;
  const Mamba3 &m = q.mamba3;
  if (q.dstate == 0 || cut.chunks > 3 || cut.lanes() > 16 || q.dstate % kPack<S> ||
      !packs_along(q.state, 3, 16) || !(q.adt.given() || one_decay(q)))
    return false;
  if (q.intermediate.given() &&
      (q.intermediate.dtype != q.state.dtype || !packs_along(q.intermediate, 4, 16)))
    return false;
  const auto pairs = [](const auto &v, int axis) {
    return !v.given() || packs_along(v, axis, 2 * size_of(v.dtype));
  };
  if (!pairs(q.B, 4) || !pairs(q.C, 4) || !pairs(m.B_bias, 2) || !pairs(m.C_bias, 2) ||
      !pairs(q.k_state, 3) || !pairs(q.intermediate_k, 4))
    return false;
  if (q.slots.pad.entries > kMost || q.slots.intermediate_entries > kMost || q.batch > kMost ||
      q.nheads > kMostItems || q.headdim > kMostItems || q.ntokens * m.rank > kMostItems ||
      q.ntokens > kMostItems || m.rank > kMostItems)
    return false;
  p->slots = q.slots;
  p->dt_transform = q.dt_transform;
  p->ntokens = int(q.ntokens), p->headdim = int(q.headdim), p->dstate = int(q.dstate);
  p->rank = int(m.rank), p->nangles = q.angles.given() ? int(m.nangles) : 0;
  p->packs = int(q.dstate / kPack<S>);
  p->log_lanes = cut.log_lanes + (kPack<S> == 4 ? 1 : 0);
  p->padded = cut.lanes() * cut.chunks * kEight;
  p->log_quads = log2_up(q.dstate / 4), p->log_rows = log2_up(q.headdim);
  p->log_angles = log2_up(p->nangles);
  p->groups_per_head = 1.0f / float(q.nheads / q.ngroups);
  p->tokens_per_quad = 0.5f / float(m.rank);
  p->norm_eps = m.norm_eps;
  p->rotary_half = m.rotary_half, p->trap_sigmoid = m.trap_sigmoid;
  View<2> out = q.slots.out;
  if (q.slots.out_per_token) out = {};
  return near(q.slots.in, {0}, &p->in) && near(out, {0}, &p->one_out) && near(q.x, &p->x) &&
         near(q.z, &p->z) && near(q.dt, &p->dt) && near(q.angles, &p->angles) &&
         near(q.state, &p->state) && near(q.k_state, &p->k_state) &&
         near(q.intermediate_angle, &p->intermediate_angle) &&
         near(q.intermediate_v, &p->intermediate_v) && near(q.out, &p->out) &&
         near(q.B, &p->projected[0]) && near(q.C, &p->projected[1]) &&
         near(q.intermediate, &p->intermediate) && near(q.intermediate_k, &p->intermediate_k) &&
         near(q.A, &p->A) && near(q.adt, &p->adt) && near(q.trap, &p->trap) &&
         near(m.B_bias, &p->bias[0]) && near(m.C_bias, &p->bias[1]) && near(m.mimo_x, &p->mimo_x) &&
         near(m.mimo_z, &p->mimo_z) && near(m.mimo_out, &p->mimo_out) &&
         near(q.angle_state, &p->angle_state) && near(q.v_state, &p->v_state) && near(q.D, &p->D) &&
         near(q.dt_bias, &p->dt_bias) && near(m.norm_weight, &p->norm_weight);
}

template <class S, int kRows, int kChunks, int kLogLanes, int kRank, int kBlocks>
ssmk_status run_packed(const Cut &cut, Mamba3Packed &p, const StateUpdateProblem &q,
                       const Call &call) {
  // As many threads as the rows need, a power of two.
  int threads = 64;
  const auto rows = [&] { return int64_t(threads >> p.log_lanes) * kRows; };
  while (threads < kMamba3Threads && rows() < q.headdim) threads *= 2;
  p.passes = int((q.headdim + rows() - 1) / rows());
  p.rows = int(p.passes * rows());
  if ((q.ntokens + 1) * p.rank * (p.padded + p.rows) > kMostPackedShared)
    return run_any(cut, q, call);
  const int64_t states = int64_t(threads) * kRows * kChunks * 16;
  p.all_ahead = states * p.passes <= kMostAhead;
  const Mamba3Room room(p.ntokens, p.rank, p.padded, p.rows, p.nangles,
                        q.mamba3.norm_weight.given());
  const int64_t shared =
      room.floats * int64_t(sizeof(float)) + states * (p.all_ahead ? p.passes : 1);
  if (shared > kMostPackedShared) return run_any(cut, q, call);
  return each_grid(p, update_mamba3_packed<S, kRows, kChunks, kLogLanes, kRank, kBlocks>, 1,
                   q.nheads, q.batch, threads, shared, call);
}

template <class S, int kRank, int kDstate, int kRows, int kBlocks>
ssmk_status run_one(Mamba3Packed &p, const StateUpdateProblem &q, const Call &call) {
  const int rows = kOneThreads / (kDstate / kPack<S>)*kRows;
  p.passes = (p.headdim + rows - 1) / rows;
  const int floats = OneRoom<kRank, kDstate>(p.passes * rows, p.nangles).states;
  const int64_t shared =
      int64_t(floats) * 4 + int64_t(p.passes) * rows * kDstate * int64_t(sizeof(S));
  return each_grid(p, update_mamba3_one<S, kRank, kDstate, kRows, kBlocks>, 1, q.nheads, q.batch,
                   kOneThreads, shared, call);
}

template <class S>
ssmk_status mamba3(const Cut &cut, const StateUpdateProblem &q, const Call &call) {
  Mamba3Packed p = {};
  if (!packed<S>(cut, q, &p)) return run_any(cut, q, call);
  // One row of dstate 128 takes 2^kWide lanes.
  constexpr bool kFloat = sizeof(S) == 4;
  constexpr int kWide = kFloat ? 5 : 4;
  const Slots &s = q.slots;
  const bool one = q.ntokens == 1 && !s.num_tokens.given() && !s.num_accepted.given() &&
                   !s.out_per_token && !q.intermediate.given();
  if (q.dstate == 128 && !q.mamba3.norm_weight.given()) {
    if (one && q.trap.given() && q.headdim <= kOneThreads) {
      if (p.rank == 1) return run_one<S, 1, 128, 8, 8>(p, q, call);
      if (p.rank == 4) return run_one<S, 4, 128, kFloat ? 8 : 4, kFloat ? 4 : 6>(p, q, call);
    }
    if (p.rank == 1) return run_packed<S, 4, 1, kWide, 1, 3>(cut, p, q, call);
    if (p.rank == 4) return run_packed<S, 4, 1, kWide, 4, 2>(cut, p, q, call);
  }
  if (cut.chunks == 1 && cut.lanes() >= 4) return run_packed<S, 4, 1, -1, 0, 2>(cut, p, q, call);
  if (cut.chunks == 2) return run_packed<S, 2, 2, -1, 0, 2>(cut, p, q, call);
  return run_packed<S, 1, 3, -1, 0, 2>(cut, p, q, call);
}

}  // namespace

ssmk_status state_update_mamba3(const StateUpdateProblem &p, const Call &call) {
  const Cut cut = mamba3_cut(p.dstate);
  if (ssmk_status status; state_update_mamba3_mma(p, call, &status)) return status;
  if (cut.chunks == 0) return too_long(call, p.dstate, kMostLanes * kMamba3Chunks * kEight);
  if (p.state.dtype == DType::kF32) return mamba3<float>(cut, p, call);
  if (p.state.dtype == DType::kF16) return mamba3<__half>(cut, p, call);
  return mamba3<__nv_bfloat16>(cut, p, call);
}

}  // namespace ssmk::cuda
