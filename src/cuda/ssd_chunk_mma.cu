// SPDX-License-Identifier: MIT
// The path of ssd_chunk on tensor cores since sm_80: its launch.
#include "cuda/ssd_chunk_mma_launch.h"
#include "cuda/ssd_chunk_mma_walk.cuh"
#include "cuda/ssd_chunk_path.h"

namespace ssmk::cuda {
namespace {

template <class T, int kN>
ssmk_status run_kind(const SsdChunkProblem &p, const MmaPlan &plan, const Call &call) {
  switch (mma_kind(p)) {
    case kMamba2: return mma_walk<kN>(ssd_mma<T, kN, kMamba2>, p, plan, call);
    case kSiso: return mma_walk<kN>(ssd_mma<T, kN, kSiso>, p, plan, call);
    default: return mma_walk<kN>(ssd_mma<T, kN, kMimo>, p, plan, call);
  }
}

template <class T>
ssmk_status run_states(const SsdChunkProblem &p, const MmaPlan &plan, const Call &call) {
  return mma_states(p.dstate) == 64 ? run_kind<T, 64>(p, plan, call)
                                    : run_kind<T, 128>(p, plan, call);
}

const char *refuses(const SsdChunkProblem &p, int capability) {
  if (const char *const why = mma_refuses(p, capability)) return why;
  return mma_grid_refuses(p, mma_plan(p));
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
