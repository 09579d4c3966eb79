// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 and Mamba-3 on tensor cores: the plan, the tiles, and how they are filled.
//
// With the formulas of the specification's prefill form (cpu/ssd_chunk_head.h has them): a chunk is
// 64 rows, row t * rank + r being rank r of token t.  Four warps own a slice of up to 64 channels
// of a head.  They keep its state h in float32 in the registers of a product's sums, warp w the
// channels 16 w .. 16 w + 15, and walk the chunks:
//
//     S = Q K^T             16 rows a warp, then weighed, rounded and shared as M
//     Y^T = h Q^T           h from the registers, rounded
//     Y^T = e Y^T + U^T M^T
//     h = exp(cs_end) h + (w U)^T K
//
// Heads of a block share what they read of B and C.  Factors are rounded to the inputs' type before
// a product, sums are float32.
#pragma once

#include "core/problem.h"
#include "cuda/slots.cuh"
#include "cuda/ssd_chunk_mma_ptx.cuh"

namespace ssmk::cuda {

constexpr int kRows = 64;      // of a chunk
constexpr int kSlice = 64;     // channels of a head
constexpr int kTeam = 128;     // threads of a head
constexpr int kSliceBytes = kSlice * 2;
constexpr int kTileBytes = kRows * kSliceBytes;  // 64 rows of a slice, or of M

extern __shared__ __align__(1024) char mma_shared[];

// Where a block keeps what, in bytes of its shared memory.
struct MmaShared {
  int raw = 0;          // a stage of B and of C, from 0
  int stages = 1;       // of them
  int head = 0, teams;  // what a team has for itself: its bytes, and where the first begins
  // within a team's
  int keys = 0, queries = 0, x = 0, u = 0, z = 0, out = 0, weights = 0, turns = 0, angles = 0;
  int rows = 0, dt = 0, facts = 0, D = 0, norm = 0, carry = 0, totals = 0, bias = 0, mimo = 0, squares = 0, last = 0;
  int total = 0;
};

struct MmaPlan {
  int heads = 1, slices = 1;   // heads of a block, slices of a head
  int blocks_per_group = 1;    // of heads and slices
  int tokens = kRows;          // of a chunk
  int log_rank = 0;
  int64_t slots = 0;           // sequences, or segments of them
  int64_t segment = 0;         // tokens of one, 0: sequences are whole
  bool states_only = false;    // what a segment adds to the state, no outputs
  bool prepared = false;       // starts are in the workspace
  float *states = nullptr;     // of slots, heads and slices: fragments of h
  float *decays = nullptr;     // of slots and heads: log2
  uint32_t *turns = nullptr;   // of slots, heads and angles
  MmaShared at;
};

// Rows of the inputs that a token has, and so on: what is the same for all threads of a block.
struct MmaSpan {
  int64_t slot;             // of the states
  int index;                // in the workspace
  int row, begin, end;      // tokens of the segment
  int seq_begin, seq_end;   // of the sequence
  int local;                // number of the segment in its sequence
  bool pad, has_initial, first, last;  // first, last: segment of the sequence
};

// Where packed sequence k begins, held within the tokens that there are.
__device__ __forceinline__ int64_t cut_at(const SsdChunkProblem &p, int64_t k) {
  const int64_t t = read_index(p.seqs.cu_seqlens, k);
  return t < 0 ? 0 : t > p.seqlen ? p.seqlen : t;
}

// The first slot of a sequence.  Of packed ones each has as many as it may need.
__device__ __forceinline__ int64_t first_slot(const SsdChunkProblem &p, const MmaPlan &plan,
                                              int64_t seq) {
  if (plan.segment == 0) return seq;
  if (p.seqs.cu_seqlens.given()) return cut_at(p, seq) / plan.segment + seq;
  const int64_t each = (p.seqlen + plan.segment - 1) / plan.segment;
  return seq * (each > 1 ? each : 1);
}

// Slot i of the grid: a sequence or a segment.  False: there is none.
__device__ __forceinline__ bool span_of(const SsdChunkProblem &p, const MmaPlan &plan, int64_t i,
                                        MmaSpan *s) {
  int64_t seq = i, local = 0;
  const bool packed = p.seqs.cu_seqlens.given();
  s->index = int(i);
  if (plan.segment > 0 && packed) {
    int64_t low = 0, high = p.seqs.nseq;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_slot(p, plan, middle) <= i) low = middle; else high = middle;
    }
    seq = low;
    local = i - first_slot(p, plan, low);
  } else if (plan.segment > 0) {
    const int64_t each = first_slot(p, plan, 1);
    seq = i / each;
    local = i % each;
  }
  s->row = packed ? 0 : seq;
  s->seq_begin = packed ? cut_at(p, seq) : 0;
  s->seq_end = packed ? cut_at(p, seq + 1) : p.seqlen;
  if (s->seq_end < s->seq_begin) s->seq_end = s->seq_begin;
  const int64_t size = s->seq_end - s->seq_begin;
  s->begin = s->seq_begin + local * plan.segment;
  s->end = plan.segment > 0 && s->seq_end - s->begin > plan.segment ? s->begin + plan.segment
                                                                    : s->seq_end;
  s->local = int(local);
  s->first = local == 0;
  s->last = s->end == s->seq_end;
  const Slot slot = slot_of(p.seqs.state_indices, p.seqs.pad, seq);
  s->slot = slot.index;
  s->pad = slot.pad;
  s->has_initial = !p.seqs.has_initial_state.given() || *p.seqs.has_initial_state.at(seq) != 0;
  return local == 0 || (local > 0 && local * plan.segment < size);
}

// Byte of 16-byte piece `piece` of a row, for rows of `bytes`: pieces are mixed so that a column of
// eight rows meets all banks.
__device__ __forceinline__ uint32_t piece_at(int row, int piece, int bytes) {
  return uint32_t(row * bytes + ((piece ^ (row & 7)) << 4));
}
// The word of columns `column` and the next.
__device__ __forceinline__ uint32_t word_at(int row, int column, int bytes) {
  return piece_at(row, column >> 3, bytes) + ((column & 7) << 1);
}

// Brings `rows` rows of pieces to a tile of kTo rows, the others are zeros.  `from`: the first row;
// row i = t << log_rank | r is t * token + r * rank bytes on.  `pieces` of a tile's kPieces are
// there.
template <int kPieces>
__device__ __forceinline__ void bring_rows(uint32_t to, const char *from, int64_t token,
                                           int64_t rank, int log_rank, int rows, int to_rows,
                                           int pieces, int thread, int threads) {
  const int piece = thread % kPieces;
  const int mask = (1 << log_rank) - 1;
  from += piece * 16;
#pragma unroll 1
  for (int row = thread / kPieces; row < to_rows; row += threads / kPieces) {
    const bool there = row < rows && piece < pieces;
    const char *const at = from + int64_t(row >> log_rank) * token + int64_t(row & mask) * rank;
    copy_ahead_if(there, to + piece_at(row, piece, kPieces * 16), there ? at : nullptr);
  }
}

}  // namespace ssmk::cuda
