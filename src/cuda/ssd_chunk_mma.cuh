// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 and Mamba-3 on tensor cores: the plan, the tiles, and how they are filled.
//
// With the formulas of the specification's prefill form (cpu/ssd_chunk_head.h has them): a chunk is
// 64 rows, row t * rank + r being rank r of token t.  A block owns a slice of up to 64 channels of
// a head and walks the chunks with its state h in float32 in the registers of a product's sums.  Of
// its eight warps, four have the channels 16 w .. 16 w + 15 and the first half of the states, four
// the second half:
//
//     S = Q K^T             16 rows by 32 a warp; weighed, rounded and shared as M
//     Y^T = h Q^T           h from the registers, rounded: a sum over the warp's half of the states
//     Y^T = e Y^T + U^T M^T the two sums joined, and from there half of the rows a warp
//     h = exp(cs_end) h + (w U)^T K
//
// Factors are rounded to the inputs' type before a product, sums are float32.
#pragma once

#include "core/problem.h"
#include "cuda/slots.cuh"
#include "cuda/ssd_chunk_turns.cuh"

namespace ssmk::cuda {

constexpr int kRows = 64;   // of a chunk
constexpr int kSlice = 64;  // channels of a head
constexpr int kTeam = 256;  // threads of a block
constexpr int kSliceBytes = kSlice * 2;
constexpr int kSumsBytes = kSlice * kRows * 4;   // of half of the states
constexpr int kTileBytes = kRows * kSliceBytes;  // 64 rows of a slice, or of M

extern __shared__ __align__(1024) char mma_shared[];

// Where a block keeps in its shared memory what has no size known when compiling: bytes from the
// beginning.  The rest has its place in MmaPlaces.
struct MmaShared {
  int angles = 0, carry = 0, bias = 0, mimo = 0, u = 0, out = 0, sums = 0;
  int total = 0;
};

// Kinds of calls: without keys of a head's own, with them, and with more than one rank or weights
// of ranks.
constexpr int kMamba2 = 0, kSiso = 1, kMimo = 2;

struct MmaPlan {
  int slices = 1;      // of a head
  int tokens = kRows;  // of a chunk
  int log_rank = 0;
  int64_t slots = 0;          // sequences, or segments of them
  int64_t segment = 0;        // tokens of one, 0: sequences are whole
  bool states_only = false;   // what a segment adds to the state, no outputs
  bool prepared = false;      // starts are in the workspace
  float *states = nullptr;    // of slots, heads and slices: fragments of h
  float *decays = nullptr;    // of slots and heads: log2
  uint32_t *turns = nullptr;  // of slots, heads and angles
  TurnCut turn_cut;
  MmaShared at;
  // Strides in bytes, of tokens and of ranks.
  int64_t B_token = 0, B_rank = 0, C_token = 0, C_rank = 0, x_token = 0, z_token = 0;
  int64_t angles_token = 0, out_token = 0, out_rank = 0;
};

// Rows of the inputs that a token has, and so on: what is the same for all threads of a block.
struct MmaSpan {
  int64_t slot;                        // of the states
  int index;                           // in the workspace
  int row, begin, end;                 // tokens of the segment
  int seq_begin, seq_end;              // of the sequence
  int local;                           // number of the segment in its sequence
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
      if (first_slot(p, plan, middle) <= i)
        low = middle;
      else
        high = middle;
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

__device__ __forceinline__ HeadSlice slice_of(const SsdChunkProblem &p, int head, int slice) {
  HeadSlice of;
  of.slice = slice;
  of.head = head;
  of.group = of.head / int(p.nheads / p.ngroups);
  of.channel = of.slice * kSlice;
  of.channels = min(int(p.headdim) - of.channel, kSlice);
  return of;
}

// What a block looks up from time to time: in shared memory, to leave the registers to the
// products.
struct BlockFacts {
  const char *B, *C, *x, *z, *angles;  // of token 0
  char *out;
  double A;
  float bias;  // of dt
  HeadSlice slice;
  MmaSpan span;
};

__device__ __forceinline__ BlockFacts facts_of(const SsdChunkProblem &p, const HeadSlice &of,
                                               const MmaSpan &s) {
  BlockFacts f;
  f.B = p.B.at(s.row, 0, 0, of.group, 0);
  f.C = p.C.at(s.row, 0, 0, of.group, 0);
  f.x = p.x.at(s.row, 0, of.head, of.channel);
  f.z = p.z.given() ? p.z.at(s.row, 0, of.head, of.channel) : nullptr;
  f.angles = p.mamba3.nangles > 0 ? p.angles.at(s.row, 0, of.head, 0) : nullptr;
  f.out = p.out.at(s.row, 0, 0, of.head, of.channel);
  f.A = p.A.given() ? load_at(p.A, of.head) : 0;
  f.bias = p.dt_bias.given() ? load_at(p.dt_bias, of.head) : 0;
  f.slice = of;
  f.span = s;
  return f;
}

// What is known of the rows of a chunk.
struct RowArrays {
  float sum[kRows];     // of the log2 decays, up to and with it
  float later[kRows];   // its weight for later tokens
  float same[kRows];    // for its own
  float decay[kRows];   // exp2(sum)
  float ending[kRows];  // its weight in the state after the chunk
  float dt[kRows];      // of tokens
  float last[4];        // exp2 of the whole sum; what the next token adds
};

// What is known of the tokens of the next chunk, on the way to its rows.
struct TokenTerms {
  double decay[kRows];     // log2
  double sum[kRows], all;  // of them, up to and with the token; of all
  float now[kRows];        // weight of the token's product for itself
  float share[kRows + 1];  // and what it adds to the weight of the one before
};

// A chunk: its tokens, and whether a state is captured at its end.
struct MmaStep {
  int begin, stop, captured;
};

constexpr int kAreaStride = 17, kAreaFloats = 16 * kAreaStride;  // see read_state()

template <int kN, int kKind>
struct MmaPlaces {
  static constexpr bool kMamba3 = kKind != kMamba2;

  RowArrays rows[2];
  TokenTerms terms;
  BlockFacts facts;
  MmaStep steps[2];
  int found;
  float decays;  // of the segment so far
  float D[kSlice], norm[kSlice], squares[4 * kRows];
  uint32_t totals[2 * kTeam];
  // Of B and of C, in stages; for Mamba-3 keys and queries.
  alignas(1024) char raw[kMamba3 ? 1 : 2][2][kRows * kN * 2];
  alignas(128) char keys[kMamba3 ? 2 : 1][kMamba3 ? kRows * kN * 2 : 128];
  alignas(128) char x[kTileBytes];
  alignas(128) char z[kTileBytes];
  // M; or states on their way; or, from here on, turns.
  alignas(128) char weights[kTeam / 32 * kAreaFloats * 4];
};

// Byte of 16-byte piece `piece` of a row, for rows of `bytes`: pieces are mixed so that a column of
// eight rows meets all banks.
__device__ __forceinline__ uint32_t piece_at(int row, int piece, int bytes) {
  return uint32_t(row * bytes + ((piece ^ (row & 7)) << 4));
}
// The word of columns `column` and the next.
__device__ __forceinline__ uint32_t word_at(int row, int column, int bytes) {
  return piece_at(row, column >> 3, bytes) + ((column & 7) << 1);
}

template <int kStates>
struct KeyRows {
  static constexpr int kN = kStates, kRows = cuda::kRows;
  static __device__ __forceinline__ uint32_t word(int row, int column) {
    return word_at(row, column, kN * 2);
  }
  static __device__ __forceinline__ uint32_t piece(int row, int piece) {
    return piece_at(row, piece, kN * 2);
  }
};

// Brings `rows` rows of pieces to a tile of `to_rows`, the others are zeros; it has kTo at most.
// `from`: the first row; row i = t << log_rank | r is t * token + r * rank bytes on.  `pieces` of a
// tile's kPieces are there.
template <int kPieces, int kTo>
__device__ __forceinline__ void bring_rows(uint32_t to, const char *from, int64_t token,
                                           int64_t rank, int log_rank, int rows, int to_rows,
                                           int pieces, int thread) {
  constexpr int kStep = kTeam / kPieces;  // rows: a multiple of 8, and of all ranks
  const int piece = thread % kPieces, first = thread / kPieces;
  from += (first >> log_rank) * token + (first & ((1 << log_rank) - 1)) * rank + piece * 16;
  to += piece_at(first, piece, kPieces * 16);
  const int64_t step = (kStep >> log_rank) * token;
  if (piece >= pieces) rows = 0;
#pragma unroll
  for (int i = 0; i * kStep < kTo; ++i) {
    if (first + i * kStep < to_rows)
      copy_ahead_if(first + i * kStep < rows, to + i * kStep * kPieces * 16, from);
    from += step;
  }
}

}  // namespace ssmk::cuda
