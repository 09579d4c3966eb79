// SPDX-License-Identifier: MIT
// The path of ssd_chunk on tensor cores since sm_80: its launch.
#include "cuda/ssd_chunk_mma_plan.h"
#include "cuda/ssd_chunk_mma_walk.cuh"
#include "cuda/ssd_chunk_path.h"

namespace ssmk::cuda {
namespace {

constexpr int64_t kMostGrid = 0x7fffffff;

template <class T, int kN, int kKind>
ssmk_status run_plan(const SsdChunkProblem &p, MmaPlan plan, const Call &call) {
  const auto kernel = ssd_mma<T, kN, kKind>;
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
          launch(call, mma_starts<kN>,
                 dim3(unsigned(p.seqs.nseq * p.nheads * plan.slices), kN / 16), 256, 0, p, plan);
    if (status != SSMK_OK) return status;
  }
  return walk(false);
}

template <class T, int kN>
ssmk_status run_kind(const SsdChunkProblem &p, const MmaPlan &plan, const Call &call) {
  switch (mma_kind(p)) {
    case kMamba2: return run_plan<T, kN, kMamba2>(p, plan, call);
    case kSiso: return run_plan<T, kN, kSiso>(p, plan, call);
    default: return run_plan<T, kN, kMimo>(p, plan, call);
  }
}

template <class T>
ssmk_status run_states(const SsdChunkProblem &p, const MmaPlan &plan, const Call &call) {
  return mma_states(p.dstate) == 64 ? run_kind<T, 64>(p, plan, call)
                                    : run_kind<T, 128>(p, plan, call);
}

const char *refuses(const SsdChunkProblem &p, int capability) {
  if (const char *const why = mma_refuses(p, capability)) return why;
  const MmaPlan plan = mma_plan(p);
  const int64_t most = kMostGrid / (p.nheads * plan.slices);  // of sequences and of their segments
  return plan.slots > most ? "too many sequences" : nullptr;
}

ssmk_status run(const SsdChunkProblem &p, const Call &call) {
  const MmaPlan plan = mma_plan(p);
  return p.x.dtype == DType::kBF16 ? run_states<__nv_bfloat16>(p, plan, call)
                                   : run_states<__half>(p, plan, call);
}

uint64_t workspace(const SsdChunkProblem &p) {
  if (mma_refuses_sizes(p)) return 0;
  MmaPlan plan = mma_plan(p);
  return mma_workspace(p, &plan);
}

}  // namespace

const SsdPath kSsdMma = {"mma", refuses, run, workspace};

}  // namespace ssmk::cuda
