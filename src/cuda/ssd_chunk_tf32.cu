// SPDX-License-Identifier: MIT
// The path of ssd_chunk on tensor cores for float32 inputs: which calls it takes, and its launch.
#include "cuda/ssd_chunk_mma_launch.h"
#include "cuda/ssd_chunk_path.h"
#include "cuda/ssd_chunk_tf32.cuh"

namespace ssmk::cuda {
namespace {

constexpr int kGranule = 64;  // tokens: segments have a multiple

const char *refuses_sizes(const SsdChunkProblem &p) {
  if (p.x.dtype != DType::kF32) return "x is not float32";
  if (p.B.dtype != DType::kF32 || p.C.dtype != DType::kF32 || p.out.dtype != DType::kF32 ||
      (p.z.given() && p.z.dtype != DType::kF32))
    return "x, B, C, z and out differ in dtype";
  if (mma_is_mamba3(p)) return "Mamba-3";
  if (p.headdim < 16 || p.headdim % 4) return "headdim is below 16 or not a multiple of 4";
  if (p.dstate < 16 || p.dstate % 4) return "dstate is below 16 or not a multiple of 4";
  if (p.dstate > 128) return "dstate is above 128";
  if (p.seqs.seq_idx.given()) return "seq_idx";
  if (p.seqlen > kMostTokens || p.batch > kMostTokens) return "too many tokens or rows";
  return nullptr;
}

MmaPlan wide_plan(const SsdChunkProblem &p) {
  MmaPlan plan;
  plan.slices = int((p.headdim + kSlice - 1) / kSlice);
  plan.tokens = kTokens;
  // Packed sequences have the bits of rows, if bits must not depend on what else there is.
  constexpr int64_t kSegment = 16 * kGranule;
  plan.segment = !p.batch_invariant ? mma_segment(p, plan.slices, kGranule)
                 : p.nheads * plan.slices * 4 > kBlocksAtOnce * 3 ? 0
                                                                   : kSegment;
  plan.prepared = plan.segment > 0;
  plan.slots = mma_slots(p, plan.segment);
  plan.at.total = p.dstate <= 64 ? int(sizeof(WidePlaces<64>)) : int(sizeof(WidePlaces<128>));
  plan.B_token = p.B.stride[1] * 4, plan.C_token = p.C.stride[1] * 4;
  plan.x_token = p.x.stride[1] * 4, plan.z_token = p.z.stride[1] * 4;
  plan.out_token = p.out.stride[1] * 4;
  return plan;
}

const char *refuses(const SsdChunkProblem &p, int capability) {
  if (capability < 80) return "the GPU is older than sm_80";
  if (const char *const why = refuses_sizes(p)) return why;
  if (!mma_packs(p.x, 3) || !mma_packs(p.z, 3) || !mma_packs(p.out, 4) || !mma_packs(p.B, 4) ||
      !mma_packs(p.C, 4))
    return "rows that are not packed in 16 bytes";
  const MmaPlan plan = wide_plan(p);
  if (plan.at.total > mma_shared_limit(capability)) return "too little shared memory";
  return mma_grid_refuses(p, plan);
}

template <int kN>
ssmk_status run_states(const SsdChunkProblem &p, const Call &call) {
  return p.captured.h.given() ? mma_walk<kN, true>(ssd_tf32<kN, true>, p, wide_plan(p), call)
                         : mma_walk<kN, true>(ssd_tf32<kN, false>, p, wide_plan(p), call);
}

ssmk_status run(const SsdChunkProblem &p, const Call &call) {
  return mma_states(p.dstate) == 64 ? run_states<64>(p, call) : run_states<128>(p, call);
}

uint64_t workspace(const SsdChunkProblem &p) {
  if (refuses_sizes(p)) return 0;
  MmaPlan plan = wide_plan(p);
  return mma_workspace(p, &plan);
}

}  // namespace

const SsdPath kSsdTf32 = {"tf32", refuses, run, workspace};

}  // namespace ssmk::cuda
