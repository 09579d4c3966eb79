// SPDX-License-Identifier: MIT
// The launches of a walk over chunks: in one go, or in segments of sequences.
#pragma once

#include "cuda/ssd_chunk_mma_plan.h"
#include "cuda/ssd_chunk_mma_segments.cuh"

namespace ssmk::cuda {

// kPaired: how the kernel's fragments have the states.
template <int kN, bool kPaired = false, class Kernel>
ssmk_status mma_walk(Kernel kernel, const SsdChunkProblem &p, MmaPlan plan, const Call &call) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.at.total);
  if (error != cudaSuccess) return device_error(call, "preparing a kernel on", error);
  const int64_t blocks = plan.slots * p.nheads * plan.slices;
  const auto walk = [&](bool states_only) {
    plan.states_only = states_only;
    return launch(call, kernel, unsigned(blocks), kTeam, size_t(plan.at.total), p, plan);
  };
  if (plan.prepared) {
    mma_workspace(p, &plan);
    ssmk_status status = SSMK_OK;
    if (plan.turns)
      status = launch(call, mma_turns, unsigned(plan.slots * p.nheads), kTeam, kTeam * 4, p, plan);
    if (status == SSMK_OK) status = walk(true);
    if (status == SSMK_OK)
      status =
          launch(call, mma_starts<kN, kPaired>,
                 dim3(unsigned(p.seqs.nseq * p.nheads * plan.slices), kN / 16), 256, 0, p, plan);
    if (status != SSMK_OK) return status;
  }
  return walk(false);
}

}  // namespace ssmk::cuda
