// SPDX-License-Identifier: MIT
// Which calls the tensor-core path of ssd_chunk takes, and how it cuts them.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/ssd_chunk_mma_prepare.cuh"

namespace ssmk::cuda {

// States of a row in registers: dstate rounded up to what is instantiated.
inline int mma_states(int64_t dstate) { return dstate <= 64 ? 64 : 128; }

inline bool mma_is_mamba3(const SsdChunkProblem &p) {
  return p.mamba3.any() || p.trap.given() || p.angles.given();
}

inline bool mma_has_mimo(const SsdChunkProblem &p) {
  const Mamba3 &m = p.mamba3;
  return m.rank > 1 || m.mimo_x.given() || m.mimo_z.given() || m.mimo_out.given();
}

inline int mma_kind(const SsdChunkProblem &p) {
  return mma_has_mimo(p) ? kMimo : mma_is_mamba3(p) ? kSiso : kMamba2;
}

inline int log2_of(int64_t n) {
  int log = 0;
  while (int64_t(1) << log < n) ++log;
  return log;
}

template <int kN>
inline MmaShared mma_places(const SsdChunkProblem &p, int tokens) {
  using With = MmaPlaces<kN, kSiso>;
  using Without = MmaPlaces<kN, kMamba2>;
  MmaShared at;
  const Mamba3 &m = p.mamba3;
  const int rank = int(m.rank), nangles = int(m.nangles);
  const bool mamba3 = mma_is_mamba3(p);
  // Turns may go beyond the end of the weights, in whose place they are.
  const int turns =
      int(mamba3 ? offsetof(With, weights) : offsetof(Without, weights)) + tokens * nangles * 4;
  int used = int(mamba3 ? sizeof(With) : sizeof(Without));
  used = std::max(used, turns);
  const auto take = [&](int bytes) {
    const int from = (used + 127) / 128 * 128;
    used = from + bytes;
    return from;
  };
  at.angles = take(tokens * nangles * (p.angles.given() ? int(size_of(p.angles.dtype)) : 0));
  at.carry = take(2 * nangles * 4);
  at.bias = take(mamba3 ? 2 * rank * kN * 4 : 0);
  // Sums of halves stand where the queries are no longer needed, if there is room.
  at.sums = kN < 128 ? take(kSumsBytes) : 0;
  const bool mimo = mma_has_mimo(p);
  at.mimo = mimo ? take(3 * rank * kSlice * 4) : 0;
  at.u = mimo ? take(kTileBytes) : 0;
  at.out = rank > 1 ? take(kTileBytes) : 0;
  at.total = used;
  return at;
}

inline MmaShared mma_shared_for(const SsdChunkProblem &p, int tokens) {
  return mma_states(p.dstate) == 64 ? mma_places<64>(p, tokens) : mma_places<128>(p, tokens);
}

// 16 bytes at a time.
template <int Rank>
bool mma_packs(const View<Rank> &v, int axis) {
  return !v.given() || packs_along(v, axis, 16);
}

// Bytes of shared memory that a block may have.
inline int mma_shared_limit(int capability) {
  switch (capability) {
    case 80:
    case 87: return 163 << 10;
    case 90:
    case 100:
    case 103: return 227 << 10;
    default: return 99 << 10;
  }
}

constexpr int64_t kMostTokens = 0x40000000;

// Why not, as far as sizes and dtypes tell.
inline const char *mma_refuses_sizes(const SsdChunkProblem &p) {
  const Mamba3 &m = p.mamba3;
  const DType type = p.x.dtype;
  if (type != DType::kF16 && type != DType::kBF16) return "x is not of 16 bits";
  if (p.B.dtype != type || p.C.dtype != type || p.out.dtype != type ||
      (p.z.given() && p.z.dtype != type))
    return "x, B, C, z and out differ in dtype";
  if (p.headdim < 16 || p.headdim % 16) return "headdim is not a multiple of 16";
  if (p.dstate < 16 || p.dstate % 16) return "dstate is not a multiple of 16";
  if (p.dstate > 128) return "dstate is above 128";
  if (p.seqs.seq_idx.given()) return "seq_idx";
  if (m.rank != 1 && m.rank != 2 && m.rank != 4 && m.rank != 8) return "rank is not 1, 2, 4 or 8";
  if (p.seqlen > kMostTokens || p.batch > kMostTokens) return "too many tokens or rows";
  if (m.nangles % 8) return "nangles is not a multiple of 8";
  if (m.norm_weight.given() && p.headdim > kSlice) return "norm over a headdim above 64";
  return nullptr;
}

// And by strides, addresses and the GPU: rows come and go 16 bytes at a time.
inline const char *mma_refuses(const SsdChunkProblem &p, int capability) {
  if (capability < 80) return "the GPU is older than sm_80";
  if (const char *const why = mma_refuses_sizes(p)) return why;
  if (!mma_packs(p.x, 3) || !mma_packs(p.z, 3) || !mma_packs(p.out, 4) || !mma_packs(p.B, 4) ||
      !mma_packs(p.C, 4) || (p.mamba3.nangles > 0 && !mma_packs(p.angles, 3)))
    return "rows that are not packed in 16 bytes";
  if (mma_shared_for(p, kRows >> log2_of(p.mamba3.rank)).total > mma_shared_limit(capability))
    return "too little shared memory";
  return nullptr;
}

// Blocks that a large GPU has under way at once.  A number for all GPUs: the cut, and with it the
// bits, do not depend on the device.
constexpr int64_t kBlocksAtOnce = 264;

// Tokens of a segment; 0: sequences stay whole.
inline int64_t mma_segment(const SsdChunkProblem &p, int slices, int tokens) {
  const bool packed = p.seqs.cu_seqlens.given();
  if (p.batch_invariant && packed) return 16 * tokens;
  const int64_t sequences = p.batch_invariant ? 1 : p.seqs.nseq;
  const int64_t blocks = p.nheads * slices;  // of a sequence
  if (sequences == 0 || blocks == 0 || blocks * sequences * 4 > kBlocksAtOnce * 3) return 0;
  const int64_t all = packed ? p.seqlen : p.seqlen * sequences;
  const int64_t wanted = kBlocksAtOnce / blocks;  // segments, of all sequences
  const int64_t chunks = ((all + wanted - 1) / wanted + tokens - 1) / tokens;
  const int64_t segment = std::max<int64_t>(chunks, 2) * tokens;
  return segment < p.seqlen ? segment : 0;
}

// Sequences, or segments of them; of packed ones each has as many as it may need.
inline int64_t mma_slots(const SsdChunkProblem &p, int64_t segment) {
  if (segment == 0) return p.seqs.nseq;
  if (p.seqs.cu_seqlens.given()) return p.seqlen / segment + p.seqs.nseq;
  return p.seqs.nseq * std::max<int64_t>(1, (p.seqlen + segment - 1) / segment);
}

// `segment`: below 0 to be chosen.
inline MmaPlan mma_plan(const SsdChunkProblem &p, int64_t segment = -1) {
  MmaPlan plan;
  const Mamba3 &m = p.mamba3;
  plan.slices = int((p.headdim + kSlice - 1) / kSlice);
  plan.log_rank = log2_of(m.rank);
  plan.tokens = kRows >> plan.log_rank;
  plan.segment = segment < 0 ? mma_segment(p, plan.slices, plan.tokens) : segment;
  // One slice must not write the angles and keys that another has yet to read.
  const bool shared = (p.initial.angle.given() && p.final.angle.given()) ||
                      (p.initial.k.given() && p.final.k.given());
  if (plan.segment == 0 && plan.slices > 1 && shared)
    plan.segment = std::max<int64_t>(1, (p.seqlen + plan.tokens - 1) / plan.tokens) * plan.tokens;
  plan.prepared = plan.segment > 0;
  plan.slots = mma_slots(p, plan.segment);
  plan.at = mma_shared_for(p, plan.tokens);
  plan.turn_cut = turn_cut_of(m.nangles, plan.tokens, kTeam);
  plan.B_token = p.B.stride[1] * 2, plan.B_rank = p.B.stride[2] * 2;
  plan.C_token = p.C.stride[1] * 2, plan.C_rank = p.C.stride[2] * 2;
  plan.x_token = p.x.stride[1] * 2, plan.z_token = p.z.stride[1] * 2;
  plan.out_token = p.out.stride[1] * 2, plan.out_rank = p.out.stride[2] * 2;
  if (p.angles.given()) plan.angles_token = p.angles.stride[1] * size_of(p.angles.dtype);
  return plan;
}

// Blocks are counted with 31 bits.
inline const char *mma_grid_refuses(const SsdChunkProblem &p, const MmaPlan &plan) {
  // Of sequences and of their segments.
  const int64_t most = 0x7fffffff / std::max<int64_t>(1, p.nheads * plan.slices);
  return plan.slots > most ? "too many sequences" : nullptr;
}

// The workspace, cut up.
inline uint64_t mma_workspace(const SsdChunkProblem &p, MmaPlan *plan) {
  if (!plan->prepared) return 0;
  const int64_t heads = plan->slots * p.nheads;
  const int64_t states = heads * plan->slices * kSlice * mma_states(p.dstate);
  const int64_t turns = (plan->slots + 1) * p.nheads * p.mamba3.nangles;
  char *const at = static_cast<char *>(p.workspace.data);
  plan->states = reinterpret_cast<float *>(at);
  plan->decays = reinterpret_cast<float *>(at + states * 4);
  if (turns) plan->turns = reinterpret_cast<uint32_t *>(at + (states + heads) * 4);
  return uint64_t(states + heads + turns) * 4;
}

}  // namespace ssmk::cuda
