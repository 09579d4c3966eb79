// SPDX-License-Identifier: MIT
// Mamba-2 prefill on Hopper's tensor cores, in one pass (Dao and Gu 2024, section 6), and Mamba-3's
// (SISO), where B and C are first made keys and queries (ssd_chunk_wgmma_turner.cuh).
//
// A block owns up to kHeads heads of one group (or 64-wide slices of heads, where headdim is
// larger) and walks the tokens of a sequence in chunks of 64.  One warpgroup brings the chunks to
// shared memory and prepares what is per token (ssd_chunk_wgmma_tiles.cuh).  One finds, ahead of
// the others, what the tokens of a chunk give to each other (ssd_chunk_wgmma_scores.cuh): with cs
// the sums of the log decay from the chunk's start,
//
//     S     = C B^T                                        (token i x token j), for all heads
//     M_ij  = S_ij exp(cs_i - cs_j) dt'_j  for j <= i      rounded to the inputs' type
//
// Each of the others holds the state h of one head in registers, in float32, and does per chunk
// (ssd_chunk_wgmma_head.cuh)
//
//     y^T   = h C^T exp(cs_i) + x^T M^T                    h rounded for the product only
//     h     = exp(cs_last) h + (x_j exp(cs_last - cs_j) dt'_j)^T B
//
// The accumulators of a warpgroup's products are, as pairs of 16-bit values, the fragments of the
// first factor of the next: h and x^T never go through shared memory, M does once.
//
// The work is cut in one of two ways.  Where there are heads enough for all multiprocessors
// ("stream"), every block gets the same number of chunks of the list of all heads' chunks: the end
// of one head's, whole ones, the beginning of another's.  A beginning is walked first, and its
// state handed to the block that has the end, which walks that last; states are handed on as they
// are, so the cut changes no bit of the results.  Where there are few, sequences are cut into
// segments: a first launch finds the state that each segment adds and its decay, a second joins
// these to the states between segments, a third walks all segments at once.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/slots.cuh"
#include "cuda/ssd_chunk_turns.cuh"
#include "cuda/wgmma.cuh"

namespace ssmk::cuda {

// What a launch is for: the states that segments add, outputs of Mamba-2, those of Mamba-3 (SISO).
constexpr int kStatesOnly = 0, kMamba2 = 1, kSiso = 2;

constexpr int kChunk = 64;  // tokens
constexpr int kSlice = 64;  // rows of a state
constexpr int kTile = kChunk * kTileRowBytes;

// How the host has cut the work.  A part is one slice of one head; a track is the parts of a block,
// of one sequence.
struct FusedPlan {
  int parts_per_group = 1, slices = 1, blocks_per_group = 1;
  int stages = 2;
  int tracks = 1;    // of all sequences
  int segments = 1;  // of a track, of `segment` tokens each; a launch without outputs has no need
  int walked = 1;    // of the last, and walks so many
  int segment = 0;
  int chunks = 0;             // stream: chunks of a track; else 0
  float *states = nullptr;    // handed on, (any, parts, kSlice * dstate), as threads hold them
  float *decays = nullptr;    // log2, (any, parts): of segments
  uint32_t *flags = nullptr;  // stream: (blocks, kHeads): 1 where a state is there
  TurnCut turn_cut;           // Mamba-3
};

// What a block does in one go: tokens of one track.
struct Piece {
  int row = 0, s = 0, group = 0;
  int first = 0, parts = 0;  // parts first .. first + parts of the group
  int begin = 0, end = 0;    // tokens of the row
  int from = -1, to = -1;    // states handed on: where this begins, where it ends; or -1
  int kept = -1;             // and a copy of the sequence's initial state, which may be overwritten
  bool starts = false, ends = false;  // with the sequence
  bool waits = false;                 // for `from` to be there
  bool pad = false;
};

// Where a packed sequence begins; held within the tokens that there are.
__device__ __forceinline__ int bound_of(const SsdChunkProblem &p, int s) {
  const int64_t at = read_index(p.seqs.cu_seqlens, s);
  return int(min(max(at, int64_t(0)), p.seqlen));
}

// Pieces of this block, in turn: calls use(piece) for each.
template <int kHeads, class Use>
__device__ __forceinline__ void each_piece(const SsdChunkProblem &p, const FusedPlan &plan,
                                           Use &&use) {
  const Sequences &seqs = p.seqs;
  const bool packed = seqs.cu_seqlens.given();
  const int i = block_number();
  int low = 0, high = 0;  // stream: of the chunks of all tracks
  int track, segment = 0;
  if (plan.chunks) {
    const int all = plan.tracks * plan.chunks, blocks = int(gridDim.x);
    const int share = all / blocks, more = all % blocks;  // the first blocks have one more
    low = i * share + min(i, more);
    high = low + share + (i < more);
    if (low == high) return;
    track = (high - 1) / plan.chunks;
  } else {
    track = i % plan.tracks;
    segment = i / plan.tracks;
  }
#pragma unroll 1
  for (;; --track) {
    Piece w;
    track = afresh(track);
    const int blocks = int(p.ngroups) * plan.blocks_per_group, block = track % blocks;
    w.s = track / blocks;
    w.row = packed ? 0 : w.s;
    w.group = block / plan.blocks_per_group;
    w.first = block % plan.blocks_per_group * kHeads;
    w.parts = min(kHeads, plan.parts_per_group - w.first);
    w.pad = slot_of(seqs.state_indices, seqs.pad, w.s).pad;
    const int begin = packed ? bound_of(p, w.s) : 0;
    const int end = packed ? max(bound_of(p, w.s + 1), begin) : int(p.seqlen);
    const int at = track * plan.chunks;
    if (plan.chunks) {
      const int first = max(low - at, 0), last = min(high - at, plan.chunks);
      w.begin = first * kChunk;
      w.end = min(last * kChunk, end);
      w.starts = first == 0;
      w.ends = last == plan.chunks;
      w.waits = !w.starts;
      if (!w.starts) w.from = (i - 1) * kHeads;
      if (!w.ends) w.to = i * kHeads;
    } else {
      w.begin = min(begin + segment * plan.segment, end);
      w.end = plan.segments > 1 ? min(w.begin + plan.segment, end) : end;
      w.starts = segment == 0;
      w.ends = segment == plan.segments - 1;
      const int parts = int(p.ngroups) * plan.parts_per_group;
      const int part = w.group * plan.parts_per_group + w.first;
      const int mine = (w.s * plan.segments + segment) * parts + part;
      if (!w.starts) w.from = mine - parts;
      if (!w.ends) w.to = mine;
      // The last segment's place is free.
      if (w.starts && !w.ends) w.kept = mine + (plan.segments - 1) * parts;
    }
    use(w);
    if (!plan.chunks || at <= low) return;
  }
}

__device__ __forceinline__ int head_of(const FusedPlan &plan, const Piece &w, int part) {
  return w.group * (plan.parts_per_group / plan.slices) + (w.first + part) / plan.slices;
}
// The first of its 64 rows.
__device__ __forceinline__ int slice_of(const FusedPlan &plan, const Piece &w, int part) {
  return (w.first + part) % plan.slices * kSlice;
}

// ---- Shared memory

// What is per token of a chunk, for one head.  Decays are log2 of what is left of a state.
struct alignas(16) TokenValues {
  float2 decay[kChunk];       // from the chunk's start; and dt'
  float grown[kChunk];        // 2^ the first
  float weight[kChunk];       // dt' times what is left at the chunk's end
  float near[kChunk];         // dt' times what is left at the end of the token's eight
  float same[kChunk];         // Mamba-3: for the token itself, in place of dt'
  float dt[kChunk];           // dt' itself; in Mamba-3 the above is a token's weight for later ones
  float eighths[kChunk / 8];  // decay at the ends of the eights
  float last, last_log;       // over the chunk: what is left, decay
};

// Chunks that they are there for, and that M is, for each head.
constexpr int kValuesPlaces = 4, kProductPlaces = 2;

// What is said of a chunk: its tokens, and whether the state after it is captured.
constexpr int kTokensMask = 127, kCaptured = 128;

struct FusedSources {
  TileSource x, z, B, C, out;
};

// Stages of (B, C, x of each part, z of each part); then for each part the outputs and the products
// within a chunk; then what the copy engine and the tensor cores have no part in.
template <int kStates, int kHeads, int kMode>
struct FusedShared {
  static constexpr bool kOutputs = kMode != kStatesOnly, kTurns = kMode == kSiso;
  static constexpr int kSide = kStates / 64 * kTile;  // bytes of B, or C
  static constexpr int kValues = kOutputs ? 2 * kSide : kSide;
  // Warps that read a stage, and what is per token of a part.
  static constexpr int kStageReaders = 4 * (kHeads + kOutputs),
                       kValuesReaders = 4 * (1 + kOutputs + kTurns);
  int stages, stage, turner_bytes;

  __host__ __device__ FusedShared(int stages, bool has_z, int turner_bytes)
      : stages(stages),
        stage(kValues + kHeads * kTile * (has_z ? 2 : 1)),
        turner_bytes(turner_bytes) {}
  __host__ __device__ int x(int part) const { return kValues + part * kTile; }
  __host__ __device__ int z(int part) const { return kValues + (kHeads + part) * kTile; }
  // Two tiles for each part.
  __host__ __device__ int outputs() const { return stages * stage; }
  __host__ __device__ int products() const {
    return outputs() + (kOutputs ? 2 * kHeads * kTile : 0);
  }
  __host__ __device__ int products(int part, int place) const {
    return products() + (part * kProductPlaces + place) * kTile;
  }
  __host__ __device__ int values() const {
    return products() + (kOutputs ? kProductPlaces * kHeads * kTile : 0);
  }
  __host__ __device__ int values(int part, int place) const {
    return values() + (part * kValuesPlaces + place) * int(sizeof(TokenValues));
  }
  __host__ __device__ int notes() const { return values(kHeads, 0); }
  __host__ __device__ int gates() const { return notes() + stages * int(sizeof(int64_t)); }
  // Stages' gates: full, and free again; the same of the parts' token values and of their products
  // within a chunk; then one for tiles that are cut.
  __host__ __device__ int value_gates(int part) const {
    return gates() + (stages + part * kValuesPlaces) * 16;
  }
  __host__ __device__ int product_gates(int part) const {
    return value_gates(kHeads) + part * kProductPlaces * 16;
  }
  __host__ __device__ int cut_gate() const { return product_gates(kHeads); }
  // Mamba-3: the stage's keys and queries are turned.  Else it is ready when it is full.
  __host__ __device__ int ready_gate(int stage) const {
    return kTurns ? cut_gate() + 8 + stage * 8 : gates() + stage * 16;
  }
  // Mamba-3: the angles before the next chunk, and before the one after, are there.
  __host__ __device__ int carry_gate(int parity) const { return ready_gate(stages) + parity * 8; }
  // Where a part's outputs go: row, head and slice.
  __host__ __device__ int targets(int part) const {
    return (cut_gate() + 8 + (kTurns ? stages * 8 + 16 : 0) + 15) / 16 * 16 + part * 16;
  }
  __host__ __device__ int turner() const { return targets(kHeads); }
  __host__ __device__ int bytes() const { return turner() + turner_bytes + 1024; }
};

// A place among the stages, and how often their gates have opened.
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  // After so many chunks; stages: a power of two.
  __device__ __forceinline__ static Place of(uint32_t chunks, uint32_t stages) {
    return {int(chunks % stages), chunks / stages & 1};
  }
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where a warpgroup stands in what comes chunk by chunk: the tiles' stages, and what is per token
// of its parts.
template <int kStates, int kHeads, int kMode>
struct ChunkReader {
  static constexpr bool kOutputs = kMode != kStatesOnly;
  const SsdChunkProblem &p;
  const FusedShared<kStates, kHeads, kMode> &at;
  uint32_t shared;
  int thread;   // of the warpgroup
  Place place;  // of the tiles

  __device__ __forceinline__ ChunkReader(const SsdChunkProblem &p,
                                         const FusedShared<kStates, kHeads, kMode> &at,
                                         uint32_t shared)
      : p(p), at(at), shared(shared), thread(thread_number() % kWarpgroup) {}

  __device__ __forceinline__ uint32_t tiles(int stage) const { return shared + stage * at.stage; }
  // The warp is done with what a gate keeps.
  __device__ __forceinline__ void arrive(uint32_t gate) const {
    __syncwarp();
    if ((thread & 31) == 0) gate_arrive(gate);
  }
  // Waits for a stage's tiles.  Returns its note; t, end: tokens of the piece.
  __device__ __forceinline__ int next_note(const Place &next, int t, int end) const {
    gate_wait(shared + at.ready_gate(next.stage), next.parity);
    return p.ncaptures > 0 ? shared_int(shared + at.notes() + next.stage * 4)
                           : min(end - t, kChunk);
  }
  __device__ __forceinline__ void free_stage() {
    arrive(shared + at.gates() + place.stage * 16 + 8);
    place.advance(at.stages);
  }
  // Where a chunk's token values are, once they are there.
  __device__ __forceinline__ uint32_t token_values(const Place &values, int part) const {
    gate_wait(shared + at.value_gates(part) + values.stage * 16, values.parity);
    return shared + at.values(part, values.stage);
  }
  // The warp is done with them.
  __device__ __forceinline__ void leave_token_values(Place &values, int part) const {
    arrive(shared + at.value_gates(part) + values.stage * 16 + 8);
    values.advance(kValuesPlaces);
  }
};

// What follows from a thread of a warpgroup: cheap, so found anew in every chunk.
struct Lane {
  int lane, warp;
  // h[4 b + 2 i + j] is row `row + 8 i`, state 8 b + column + j; of y^T tokens are columns.
  int row, column;
  uint32_t values;    // the offset, in a tile of x, z or y, of its row of four 8 x 8 matrices
  uint32_t products;  // the same of the products within a chunk, of their first 16 columns

  __device__ __forceinline__ explicit Lane(int thread) {
    lane = thread & 31;
    warp = thread / 32;
    row = 16 * warp + lane / 4;
    column = 2 * (lane & 3);
    const int m = lane >> 3, r = lane & 7;
    values = (8 * (m >> 1) + r) * kTileRowBytes + (((2 * warp + (m & 1)) ^ r) << 4);
    products = tile_piece(16 * warp + 8 * (m & 1) + r, m >> 1);
  }
};

// Values of a lane's columns: 8 b + column, and the next.
__device__ __forceinline__ void load_columns(float2 (&to)[kChunk / 8], uint32_t from,
                                             const Lane &l) {
#pragma unroll
  for (int b = 0; b < kChunk / 8; ++b) to[b] = shared_float2(from + l.column * 4 + b * 32);
}

}  // namespace ssmk::cuda
