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

// Warpgroups have the products with the state, where they are and registers do.
bool has_groups(const SsdChunkProblem &p, int capability) {
#if defined(SSMK_SM_90A)
  return capability == 90 && !p.captured.h.given();
#else
  return false;
#endif
}

template <bool kGroups>
int shared_bytes(const SsdChunkProblem &p) {
  return int(mma_states(p.dstate) == 64 ? sizeof(WidePlaces<64, kGroups>)
                                        : sizeof(WidePlaces<128, kGroups>));
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
  const int shared = has_groups(p, capability) ? shared_bytes<true>(p) : shared_bytes<false>(p);
  if (shared > mma_shared_limit(capability)) return "too little shared memory";
  return mma_grid_refuses(p, wide_plan(p));
}

template <bool kGroups, bool kCaptures>
ssmk_status run_kind(const SsdChunkProblem &p, const Call &call) {
  MmaPlan plan = wide_plan(p);
  plan.at.total = shared_bytes<kGroups>(p);
  return mma_states(p.dstate) == 64
             ? mma_walk<64, true>(ssd_tf32<64, kGroups, kCaptures>, p, plan, call)
             : mma_walk<128, true>(ssd_tf32<128, kGroups, kCaptures>, p, plan, call);
}

ssmk_status run(const SsdChunkProblem &p, const Call &call) {
#if defined(SSMK_SM_90A)
  int capability = 0;
  if (const ssmk_status status = compute_capability(call, &capability)) return status;
  if (has_groups(p, capability)) return run_kind<true, false>(p, call);
#endif
  return p.captured.h.given() ? run_kind<false, true>(p, call) : run_kind<false, false>(p, call);
}

uint64_t workspace(const SsdChunkProblem &p) {
  if (refuses_sizes(p)) return 0;
  MmaPlan plan = wide_plan(p);
  return mma_workspace(p, &plan);
}

}  // namespace

const SsdPath kSsdTf32 = {"tf32", refuses, run, workspace};

}  // namespace ssmk::cuda
