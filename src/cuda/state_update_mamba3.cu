// SPDX-License-Identifier: MIT
// Decode of Mamba-3 on the GPU: which kernel, how many blocks.
#include "cuda/state_update_mamba3.cuh"

#include "cuda/state_update_launch.cuh"

namespace ssmk::cuda {
namespace {

template <class S, int kRows, int kChunks, bool kPacked>
ssmk_status run_mamba3(const Cut &cut, const StateUpdateProblem &q, const Call &call) {
  if (cut.chunks == 0) return too_long(call, q.dstate, kMostLanes * kMostChunks * kPack<S>);
  Mamba3Launch p = {};
  p.p = q;
  p.packs = cut.packs, p.log_lanes = cut.log_lanes;
  p.padded = cut.lanes() * cut.chunks * kPack<S>;
  p.one_decay = q.adt.given() || one_decay(q);
  const int64_t rows = int64_t(kMamba3Threads >> cut.log_lanes) * kRows;
  p.passes = int((q.headdim + rows - 1) / rows);
  const int64_t shared = mamba3_shared_floats(q, p.padded, p.passes) * int64_t(sizeof(float));
  return each_grid(p, update_mamba3<S, kRows, kChunks, kPacked>, 1, q.nheads, q.batch,
                   kMamba3Threads, shared, call);
}

template <class S>
ssmk_status mamba3(const StateUpdateProblem &q, const Call &call) {
  const Cut cut = cut_of(q.dstate, kPack<S>);
  const bool packed =
      q.dstate % kPack<S> == 0 && packs_along(q.state, 3, 16) && (q.adt.given() || one_decay(q)) &&
      (!q.intermediate.given() ||
       (q.intermediate.dtype == q.state.dtype && packs_along(q.intermediate, 4, 16)));
  if (packed && cut.chunks == 1 && cut.lanes() >= 4) return run_mamba3<S, 4, 1, true>(cut, q, call);
  if (packed && cut.chunks == 1 && cut.lanes() == 2) return run_mamba3<S, 2, 1, true>(cut, q, call);
  if (packed && cut.chunks == 2) return run_mamba3<S, 1, 2, true>(cut, q, call);
  if (packed && cut.chunks == 3 && cut.lanes() >= 2) return run_mamba3<S, 2, 3, true>(cut, q, call);
  return run_mamba3<S, 1, kMostChunks, false>(cut, q, call);
}

}  // namespace

ssmk_status state_update_mamba3(const StateUpdateProblem &p, const Call &call) {
  if (p.state.dtype == DType::kF32) return mamba3<float>(p, call);
  if (p.state.dtype == DType::kF16) return mamba3<__half>(p, call);
  return mamba3<__nv_bfloat16>(p, call);
}

}  // namespace ssmk::cuda
