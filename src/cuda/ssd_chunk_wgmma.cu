// SPDX-License-Identifier: MIT
// Which calls the fused kernel takes, and how it is cut for the device.
#include "cuda/ssd_chunk_wgmma.cuh"

#include <algorithm>

#include "core/status.h"
#include "cuda/ssd_chunk_path.h"
#include "cuda/ssd_chunk_wgmma_head.cuh"
#include "cuda/ssd_chunk_wgmma_scores.cuh"
#include "cuda/ssd_chunk_wgmma_tiles.cuh"
#include "cuda/ssd_chunk_wgmma_turner.cuh"

namespace ssmk::cuda {
namespace {

constexpr int kTurnerRegisters = 80;

// Warpgroups: one a head, that for the products within chunks, for Mamba-3 two that turn keys and
// queries, and that which brings.
template <int kHeads, int kMode>
struct Roles {
  static constexpr bool kOutputs = kMode != kStatesOnly, kTurns = kMode == kSiso;
  static constexpr int kAll = kHeads + kOutputs + 2 * kTurns + 1;
  // Registers of their threads, together at most 512; 480 with five warpgroups.
  static constexpr int kOwner = kTurns ? 176 : kHeads == 1 ? 208 : kHeads == 2 ? 184 : 144;
  static constexpr int kScores = !kOutputs ? 0 : kTurns ? 88 : 96;
  static constexpr int kBringer = kTurns ? 56 : kHeads == 1 ? 88 : 512 - kHeads * kOwner - kScores;
};

template <class T, int kStates, int kHeads, int kMode>
__global__ void __launch_bounds__(Roles<kHeads, kMode>::kAll *kWarpgroup, 1)
    ssd_fused(const __grid_constant__ SsdChunkProblem p, const __grid_constant__ FusedPlan plan,
              const __grid_constant__ FusedSources from) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Roles = Roles<kHeads, kMode>;
  constexpr bool kOutputs = Roles::kOutputs;
  extern __shared__ char raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  char *const generic = raw + (shared - shared_address(raw));
  const FusedShared<kStates, kHeads, kMode> at(plan.stages, kOutputs && p.z.given(),
                                               Roles::kTurns ? TurnerPlaces(p).bytes : 0);
  const int role = __shfl_sync(~0u, int(threadIdx.x / kWarpgroup), 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < at.stages; ++i) {
      gate_make(shared + at.gates() + i * 16, 1);
      gate_make(shared + at.gates() + i * 16 + 8, at.kStageReaders);
    }
    for (int i = 0; i < kHeads * kValuesPlaces; ++i) {
      gate_make(shared + at.value_gates(0) + i * 16, 1);
      gate_make(shared + at.value_gates(0) + i * 16 + 8, at.kValuesReaders);
    }
    for (int i = 0; i < kHeads * kProductPlaces; ++i) {
      gate_make(shared + at.product_gates(0) + i * 16, 4);
      gate_make(shared + at.product_gates(0) + i * 16 + 8, 4);
    }
    gate_make(shared + at.cut_gate(), 1);
    for (int i = 0; Roles::kTurns && i < at.stages; ++i) gate_make(shared + at.ready_gate(i), 4);
    for (int i = 0; Roles::kTurns && i < 2; ++i) gate_make(shared + at.carry_gate(i), 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous();
  start_next();
  if (role < kHeads) {
    take_registers<Roles::kOwner>();
    HeadOwner<T, kStates, kHeads, kMode> head(p, plan, from.out, at, shared, generic, role);
    each_piece<kHeads>(p, plan, [&](const Piece &w) { head.walk(w); });
  } else if (kOutputs && role == kHeads) {
    if constexpr (kOutputs) {
      give_registers<Roles::kScores>();
      ScoreMaker<T, kStates, kHeads, kMode> scores(p, at, shared);
      each_piece<kHeads>(p, plan, [&](const Piece &w) { scores.walk(w); });
    }
  } else if (Roles::kTurns && role < kHeads + 3) {
    if constexpr (Roles::kTurns) {
      give_registers<kTurnerRegisters>();
      KeyTurner<T, kStates, kHeads, kMode> keys = {
          p, plan, at, shared, generic, thread_number() % kWarpgroup, role - kHeads - 1};
      each_piece<kHeads>(p, plan, [&](const Piece &w) { keys.walk(w); });
    }
  } else {
    give_registers<Roles::kBringer>();
    const int warp = __shfl_sync(~0u, int(threadIdx.x % kWarpgroup / 32), 0);
    const int lane = thread_number() & 31;
    constexpr int kPreparers = TokenPreparer<kStates, kHeads, kMode>::kWarps;
    if (warp == kHeads * kPreparers) {
      TileBringer<kStates, kHeads, kMode> tiles = {p, plan, from, at, shared, lane};
      each_piece<kHeads>(p, plan, [&](const Piece &w) {
        if (!w.pad) tiles.walk(w);
      });
    } else if (warp < kHeads * kPreparers) {
      TokenPreparer<kStates, kHeads, kMode> tokens = {
          p, plan, at, shared, warp / kPreparers, lane, warp % kPreparers};
      each_piece<kHeads>(p, plan, [&](const Piece &w) {
        if (!w.pad) tokens.walk(w);
      });
    }
  }
#endif
}

// Local end states of the segments, and the decays over them, become the states at their ends.
template <int kValues>
__global__ void __launch_bounds__(256)
    ssd_join_segments(float *states, const float *decays, int64_t parts, int segments) {
  wait_for_previous();
  start_next();
  constexpr int kPacks = kValues / 4;  // of a part
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t sequence = i / (parts * kPacks), part = i / kPacks % parts;
  const float *decay = decays + sequence * segments * parts + part;
  float4 *at = reinterpret_cast<float4 *>(states) + (sequence * segments * parts + part) * kPacks +
               i % kPacks;
  float4 before = *at;
  for (int k = 1; k < segments - 1; ++k) {
    at += parts * kPacks;
    decay += parts;
    float4 v = *at;
    const float d = exp2_fast(*decay);
    v.x = fmaf(d, before.x, v.x), v.y = fmaf(d, before.y, v.y);
    v.z = fmaf(d, before.z, v.z), v.w = fmaf(d, before.w, v.w);
    *at = before = v;
  }
}

// ---- What the copy engine takes

// A tensor with axes (batch, token, head, column), as a tensor of the problem has them at `axes`.
struct Tiled {
  const char *data;
  DType dtype;
  int64_t sizes[4], strides[4];  // the last stride is 1
};
template <int Rank>
Tiled tiled(const View<Rank> &v, const int (&axes)[4], int64_t batch, int64_t seqlen, int64_t heads,
            int64_t columns) {
  Tiled t = {v.data, v.dtype, {batch, seqlen, heads, columns}, {}};
  for (int i = 0; i < 4; ++i) t.strides[i] = v.stride[axes[i]];
  return t;
}
Tiled values_of(const SsdChunkProblem &p, const View<4> &v) {
  return tiled(v, {0, 1, 2, 3}, p.batch, p.seqlen, p.nheads, p.headdim);
}
Tiled outputs_of(const SsdChunkProblem &p) {
  return tiled(p.out, {0, 1, 3, 4}, p.batch, p.seqlen, p.nheads, p.headdim);
}
Tiled projection_of(const SsdChunkProblem &p, const View<5> &v) {
  return tiled(v, {0, 1, 3, 4}, p.batch, p.seqlen, p.ngroups, p.dstate);
}

bool fits_copy_engine(const Tiled &t) {
  if (t.strides[3] != 1 || reinterpret_cast<uintptr_t>(t.data) % 16) return false;
  for (int i = 0; i < 3; ++i)
    if (t.sizes[i] > 1 &&
        (t.strides[i] <= 0 || t.strides[i] % 8 || t.strides[i] >= int64_t(1) << 39))
      return false;
  return true;
}

ssmk_status make_source(const Tiled &t, const Call &call, TileSource *to) {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return device_error(call, "asking the driver of", error);
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  if (result != cudaDriverEntryPointSuccess || !encode)
    return fail(SSMK_DEVICE_ERROR, "%s: the driver of cuda:%d has no cuTensorMapEncodeTiled",
                call.op, call.device);
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = cuuint64_t(t.sizes[3 - i]);
  for (int i = 0; i < 3; ++i) strides[i] = sizes[i + 1] > 1 ? cuuint64_t(t.strides[2 - i]) * 2 : 16;
  const cuuint32_t box[4] = {64, 1, kChunk, 1}, every[4] = {1, 1, 1, 1};
  const auto dtype =
      t.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult made =
      encode(to, dtype, 4, const_cast<char *>(t.data), sizes, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS
             ? SSMK_OK
             : fail(SSMK_DEVICE_ERROR, "%s: cuTensorMapEncodeTiled failed on cuda:%d: error %d",
                    call.op, call.device, int(made));
}

// ---- How the work is cut

// Multiprocessors that the cut is made for, whatever the device has: bits do not depend on it.
constexpr int kMultiprocessors = 132;

int64_t tracks_of(const SsdChunkProblem &p, int heads) {
  const int64_t per_group = p.nheads / p.ngroups * (p.headdim / kSlice);
  return p.seqs.nseq * p.ngroups * ((per_group + heads - 1) / heads);
}

// What part of the multiprocessors has work, on average over the rounds.
double busy(int64_t blocks) {
  const int64_t rounds = (blocks + kMultiprocessors - 1) / kMultiprocessors;
  return rounds ? double(blocks) / double(rounds * kMultiprocessors) : 1;
}

struct Cut {
  FusedPlan plan;
  int heads = 2, mode = kMamba2;
};

bool is_mamba3(const SsdChunkProblem &p) {
  return p.mamba3.any() || p.trap.given() || p.angles.given();
}

// Found by measuring on one H200 (docs/measurements_gpu.md): a chunk takes two heads 1.6 times as
// long as one; the launches for segments pay from 128 chunks on.
Cut cut_of(const SsdChunkProblem &p) {
  constexpr int64_t kLong = 128, kShort = 16, kShortest = 32;  // chunks; the last of a segment
  Cut c;
  FusedPlan &plan = c.plan;
  c.mode = is_mamba3(p) ? kSiso : kMamba2;
  plan.slices = int(p.headdim / kSlice);
  plan.parts_per_group = int(p.nheads / p.ngroups) * plan.slices;
  const int64_t chunks = (p.seqlen + kChunk - 1) / kChunk, tracks = tracks_of(p, 2);
  if (c.mode == kSiso) {
    c.heads = 1;
    plan.turn_cut = turn_cut_of(p.mamba3.nangles, kChunk, kWarpgroup);
    return c;
  }
  const bool even = !p.seqs.cu_seqlens.given() && p.ncaptures == 0 && chunks > 0;
  if (tracks >= kMultiprocessors) {
    if (even && (chunks < kShort || busy(tracks) < 0.9)) plan.chunks = int(chunks);
    return c;
  }
  if (tracks_of(p, 1) <= kMultiprocessors) c.heads = 1;
  if (!even || p.batch_invariant || chunks < kLong) return c;
  double best = 0;
  for (int64_t segments = 2; segments * kShortest <= chunks; ++segments) {
    const double now = busy(tracks * segments);
    if (tracks * segments > 8 * kMultiprocessors || now < best + 0.02) continue;
    best = now;
    c.heads = 2;
    const int64_t each = (chunks + segments - 1) / segments;
    plan.segments = int((chunks + each - 1) / each);
    plan.segment = int(each * kChunk);
  }
  return c;
}

int64_t handed_on(const SsdChunkProblem &p, const Cut &c) {
  if (c.plan.chunks) return int64_t(kMultiprocessors) * c.heads;
  if (c.plan.segments < 2) return 0;
  return p.seqs.nseq * c.plan.segments * p.ngroups * c.plan.parts_per_group;
}

// States, then the decays of segments or the flags of blocks.
uint64_t workspace(const SsdChunkProblem &p) {
  if (!p.ngroups || p.headdim % kSlice) return 0;
  return uint64_t(handed_on(p, cut_of(p))) * uint64_t(kSlice * p.dstate + 1) * sizeof(float);
}

// ---- The launches

template <class T, int kStates, int kHeads, int kMode>
ssmk_status run_fused(const SsdChunkProblem &p, FusedPlan plan, const FusedSources &from,
                      const Call &call) {
  const auto kernel = ssd_fused<T, kStates, kHeads, kMode>;
  constexpr bool kOutputs = kMode != kStatesOnly;
  plan.walked = kOutputs ? plan.segments : plan.segments - 1;
  plan.blocks_per_group = (plan.parts_per_group + kHeads - 1) / kHeads;
  plan.tracks = int(tracks_of(p, kHeads));
  int64_t blocks = int64_t(plan.tracks) * plan.walked;
  if (plan.chunks) {
    int sms = 0;
    cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, call.device);
    if (error != cudaSuccess) return device_error(call, "asking about", error);
    blocks = std::min(plan.tracks, std::min(sms, kMultiprocessors));
    error = cudaMemsetAsync(plan.flags, 0, blocks * kHeads * sizeof(uint32_t),
                            static_cast<cudaStream_t>(call.stream));
    if (error != cudaSuccess) return device_error(call, "clearing", error);
  }
  constexpr int kRoom = 227 * 1024, kMostStages = 5;
  const bool gated = kOutputs && p.z.given();
  const auto bytes = [&](int stages) {
    return FusedShared<kStates, kHeads, kMode>(stages, gated,
                                               kMode == kSiso ? TurnerPlaces(p).bytes : 0)
        .bytes();
  };
  for (plan.stages = 2; plan.stages < kMostStages && bytes(plan.stages + 1) <= kRoom;)
    ++plan.stages;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes(plan.stages));
  if (error != cudaSuccess) return device_error(call, "preparing", error);
  return launch(call, kernel, dim3(unsigned(blocks)), dim3(Roles<kHeads, kMode>::kAll * kWarpgroup),
                bytes(plan.stages), p, plan, from);
}

template <class T, int kStates>
ssmk_status run_cut(const SsdChunkProblem &p, const Cut &c, const FusedSources &from,
                    const Call &call) {
  if (c.mode == kSiso) return run_fused<T, kStates, 1, kSiso>(p, c.plan, from, call);
  if (c.heads == 1) return run_fused<T, kStates, 1, kMamba2>(p, c.plan, from, call);
  if (c.plan.segments > 1) {
    const ssmk_status status = run_fused<T, kStates, 3, kStatesOnly>(p, c.plan, from, call);
    if (status) return status;
  }
  if (c.plan.segments > 2) {
    constexpr int kThreads = 256, kValues = kSlice * kStates;
    const int64_t parts = int64_t(p.ngroups) * c.plan.parts_per_group;
    const ssmk_status status =
        launch(call, ssd_join_segments<kValues>,
               dim3(unsigned(p.seqs.nseq * parts * (kValues / 4 / kThreads))), dim3(kThreads), 0,
               c.plan.states, static_cast<const float *>(c.plan.decays), parts, c.plan.segments);
    if (status) return status;
  }
  return run_fused<T, kStates, 2, kMamba2>(p, c.plan, from, call);
}

ssmk_status run(const SsdChunkProblem &p, const Call &call) {
  Cut c = cut_of(p);
  c.plan.states = static_cast<float *>(p.workspace.data);
  c.plan.decays = c.plan.states + handed_on(p, c) * kSlice * p.dstate;
  c.plan.flags = reinterpret_cast<uint32_t *>(c.plan.decays);
  FusedSources from = {};
  ssmk_status status = make_source(values_of(p, p.x), call, &from.x);
  if (!status) status = make_source(projection_of(p, p.B), call, &from.B);
  if (!status) status = make_source(projection_of(p, p.C), call, &from.C);
  if (!status) status = make_source(outputs_of(p), call, &from.out);
  if (!status && p.z.given()) status = make_source(values_of(p, p.z), call, &from.z);
  if (status) return status;
  const bool bf16 = p.x.dtype == DType::kBF16;
  if (p.dstate == 64)
    return bf16 ? run_cut<__nv_bfloat16, 64>(p, c, from, call)
                : run_cut<__half, 64>(p, c, from, call);
  return bf16 ? run_cut<__nv_bfloat16, 128>(p, c, from, call)
              : run_cut<__half, 128>(p, c, from, call);
}

const char *refuses_mamba3(const SsdChunkProblem &p) {
  const Mamba3 &m = p.mamba3;
  if (m.rank > 1 || m.mimo_x.given() || m.mimo_z.given() || m.mimo_out.given()) return "MIMO";
  if (m.norm_weight.given()) return "norm";
  if (p.ncaptures > 0) return "Mamba-3 with captured states";
  if (p.headdim != kSlice) return "Mamba-3 with a headdim other than 64";
  if (m.nangles % 8) return "nangles is not a multiple of 8";
  if (m.nangles > 0 && !packs_along(p.angles, 3, 16))
    return "angles that are not packed in 16 bytes";
  // Sequences are not cut here.
  constexpr int64_t kFew = 16, kLong = 32 * kChunk;
  if (p.nheads * (p.batch_invariant ? 1 : p.seqs.nseq) < kFew &&
      (p.batch_invariant || p.seqlen > kLong))
    return "few heads of Mamba-3";
  return nullptr;
}

const char *refuses(const SsdChunkProblem &p, int capability) {
#if !defined(SSMK_SM_90A)
  return "not built for sm_90a";
#endif
  if (capability != 90) return "needs compute capability 9.0";
  if (const char *const why = is_mamba3(p) ? refuses_mamba3(p) : nullptr) return why;
  const DType dtype = p.x.dtype;
  if (dtype != DType::kBF16 && dtype != DType::kF16) return "x is not of 16 bits";
  if (p.B.dtype != dtype || p.C.dtype != dtype || p.out.dtype != dtype ||
      (p.z.given() && p.z.dtype != dtype))
    return "x, B, C, z and out differ in dtype";
  if (p.headdim == 0 || p.headdim % kSlice) return "headdim is not a multiple of 64";
  if (p.dstate != 64 && p.dstate != 128) return "dstate is neither 64 nor 128";
  if (p.seqs.seq_idx.given()) return "seq_idx";
  constexpr int64_t kMost = int64_t(1) << 30;
  if (p.seqlen == 0) return "seqlen is 0";
  // What blocks count with 32 bits; the grid, too.
  if (p.seqlen > kMost || tracks_of(p, 1) > kMost / (p.seqlen / kChunk + 1))
    return "too many tokens or heads";
  if (!fits_copy_engine(values_of(p, p.x)) || !fits_copy_engine(outputs_of(p)) ||
      !fits_copy_engine(projection_of(p, p.B)) || !fits_copy_engine(projection_of(p, p.C)) ||
      (p.z.given() && !fits_copy_engine(values_of(p, p.z))))
    return "strides or addresses are not multiples of 16 bytes";
  return nullptr;
}

}  // namespace

const SsdPath kSsdWgmma = {"wgmma", refuses, run, workspace};

}  // namespace ssmk::cuda
