// SPDX-License-Identifier: MIT
// The cut of a call of ssd_chunk_general.cuh, and how its threads go through tables.
#pragma once

#include "cuda/near.cuh"
#include "cuda/state_update_mamba3_common.cuh"

namespace ssmk::cuda {

constexpr int kGeneralThreads = 256;   // at most
constexpr int kGeneralTokens = 16;     // of a span, at most
constexpr int kTermTokens = 128;       // whose decays and weights are made together
constexpr int64_t kNever = INT64_MAX;  // a token that does not come

// The tensors whose tokens come to shared memory.
enum { kKeys, kQueries, kX, kZ, kTurns, kSources };

// One of them: strides in bytes; `inner` is that of groups or heads.
struct Source {
  const char *data;
  int64_t batch, token, rank, inner, column;
  DType dtype;
  // Its part of a span comes while the span before is walked, around the registers: rows of `pitch`
  // bytes from float number `at` on.
  bool ahead;
  int at, pitch;
  int log;  // of the power of two that holds its columns, of 4 at least
};

// The cut of a call.  Offsets into shared memory count floats and are multiples of 4.
struct GeneralPlan {
  int threads, log_lanes, rows;  // rows: of a tile
  int row_tiles, state_tiles;    // of a block
  int tile_states, padded;       // states of a tile, and of all
  int block_rows, slices;        // rows of a block; blocks of a head
  int tokens, steps;             // of a span; a step is a rank of a token
  int headdim, dstate, rank, nangles;
  int log_rows, log_angles, log_tile;  // of the powers of two that hold a row of work
  bool has_psi, out_quads, final_quads, captured_quads;
  Source sources[kSources];
  int states, K, Q, U, Y, zs, kq, sine, cosine, theta, raw_theta, k_before, v_before;
  int psi, zeta, phi, D, norm, B_bias, C_bias, terms, owed, dt, scales, ids;
};

struct GeneralLaunch {
  SsdChunkProblem p;
  GeneralPlan plan;
  int64_t first_seq, first_head;
};

// One block's work.
struct Span {
  int64_t row, begin, end, slot, head, group;  // begin: of the tokens that are left
  int64_t block;                               // number of it in the whole call
  int first_row;
  bool pad, has_initial;
};

// In shared memory: the next token that is captured, one of its captures, the id of the last token,
// the tokens whose decays and weights are there, and the number of the next token among them.
struct Found {
  int64_t token, capture, last;
  int nterms, first_term;
};

struct Run {
  int tokens;
  bool pads, fresh;  // fresh: a sequence starts
};

// Of a token, for the walk.
struct alignas(16) TokenTerms {
  float decay, decay_less_1;
  float write;  // what its product is multiplied by, with what the next token owes to it
  float gamma;  // without that

  // Multiplied as h + (d - 1) h.
  __device__ __forceinline__ bool slow() const { return fabsf(decay_less_1) < 0.5f; }
};

__device__ __forceinline__ bool not_finite(float v) {
  return (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u;
}

__device__ __forceinline__ double within_two(double half_turns) {
  return half_turns - 2.0 * floor(half_turns * 0.5);
}

// What a device tensor says is held within the sizes: the host cannot check it.
__device__ __forceinline__ Span span_of(const GeneralLaunch &g) {
  const SsdChunkProblem &p = g.p;
  const int64_t i = g.first_seq + blockIdx.z;
  const auto bound = [&](int64_t k) {
    const int64_t at = read_index(p.seqs.cu_seqlens, k);
    return at < 0 ? 0 : at > p.seqlen ? p.seqlen : at;
  };
  const bool packed = p.seqs.cu_seqlens.given();
  const Slot slot = slot_of(p.seqs.state_indices, p.seqs.pad, i);
  Span s;
  s.row = packed ? 0 : i;
  s.begin = packed ? bound(i) : 0;
  s.end = packed ? bound(i + 1) : p.seqlen;
  s.slot = slot.index;
  s.pad = slot.pad;
  s.has_initial = !p.seqs.has_initial_state.given() || *p.seqs.has_initial_state.at(i) != 0;
  s.head = g.first_head + blockIdx.y;
  s.group = s.head / (p.nheads / p.ngroups);
  s.block = (i * p.nheads + s.head) * g.plan.slices + blockIdx.x;
  s.first_row = int(blockIdx.x) * g.plan.block_rows;
  return s;
}

// Four neighbours in shared memory, aligned to the bytes that they fill.
__device__ __forceinline__ Pack<float, 4> read_four(const char *p, DType dtype) {
  if (dtype == DType::kF32) return *reinterpret_cast<const Pack<float, 4> *>(p);
  const uint2 bits = *reinterpret_cast<const uint2 *>(p);
  const float2 a = two_values({bits.x, 0}, dtype), b = two_values({bits.y, 0}, dtype);
  return {{a.x, a.y, b.x, b.y}};
}

// Four neighbours to memory, aligned to the bytes that they fill.
__device__ __forceinline__ void store_four(char *p, DType dtype, const float (&v)[4]) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
  } else if (dtype == DType::kF16) {
    store_pack(reinterpret_cast<__half *>(p), narrow_pack<__half>(v));
  } else {
    store_pack(reinterpret_cast<__nv_bfloat16 *>(p), narrow_pack<__nv_bfloat16>(v));
  }
}

// The thread's number, of which the compiler knows nothing: what is computed from it is not kept in
// registers from span to span, where the states need them.
__device__ __forceinline__ int this_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// Some threads of a block that work together: this one's number among them, and their count.
struct Team {
  int thread, threads;
};
__device__ __forceinline__ Team whole_block() { return {this_thread(), int(blockDim.x)}; }

// f(row, column) of a table whose columns fit 2^log threads, if there are so many.
template <class F>
__device__ __forceinline__ void each_cell(Team team, int rows, int columns, int log, const F &f) {
  const int most = 31 - __clz(team.threads);
  if (log > most) log = most;
  const int group = team.thread >> log, groups = team.threads >> log, width = 1 << log;
  if (group >= groups) return;
#pragma unroll 1
  for (int row = group; row < rows; row += groups)
#pragma unroll 1
    for (int column = team.thread & (width - 1); column < columns; column += width) f(row, column);
}
template <class F>
__device__ __forceinline__ void each_cell(int rows, int columns, int log, const F &f) {
  each_cell(whole_block(), rows, columns, log, f);
}

// Rows and columns of a tensor of floats; strides in bytes.
struct Table {
  char *data;
  int64_t row, column;
  DType dtype;

  __device__ __forceinline__ char *at(int r, int c = 0) const {
    return data + r * row + c * column;
  }
};

template <int Rank>
__device__ __forceinline__ Table table_of(const View<Rank> &v, char *first, int row, int column) {
  const int64_t item = v.dtype == DType::kF32 ? 4 : 2;
  return {first, v.stride[row] * item, v.stride[column] * item, v.dtype};
}

// The same for cells that come from memory: several loads are under way at once.
template <class Put>
__device__ __forceinline__ void each_loaded(Team team, const Table &from, int rows, int columns,
                                            int log, const Put &put) {
  constexpr int kAtOnce = 4;
  const int count = rows << log;
#pragma unroll 1
  for (int first = team.thread; first < count; first += kAtOnce * team.threads) {
    uint32_t bits[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * team.threads, row = i >> log, column = i & ((1 << log) - 1);
      if (i < count && column < columns) bits[j] = load_bits(from.at(row, column), from.dtype);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * team.threads, row = i >> log, column = i & ((1 << log) - 1);
      if (i < count && column < columns)
        put(row, column, Pack<float, 1>{{value_of(bits[j], from.dtype)}});
    }
  }
}

}  // namespace ssmk::cuda
