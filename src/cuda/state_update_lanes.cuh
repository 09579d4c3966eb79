// SPDX-License-Identifier: MIT
// How a decode kernel spreads the states of a head over threads, and where those states are.
//
// A row p of states is cut into packs of 16 bytes.  `lanes` threads share a row; pack c * lanes +
// lane belongs to lane `lane`.  The cut depends on dstate and the state's dtype alone, so sums over
// a row are added up in one order whatever the batch, the slots and the layout of the pool.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/slots.cuh"
#include "cuda/values.cuh"

namespace ssmk::cuda {

constexpr int kMostChunks = 8;  // packs of one row in one thread
constexpr int kMostLanes = 256;

template <class S>
constexpr int kPack = 16 / int(sizeof(S));

struct Cut {
  int packs = 0, log_lanes = 0, chunks = 0;

  int lanes() const { return 1 << log_lanes; }
};

// At most `lanes` of them while a thread then has no more than `chunks` packs.  chunks is 0 if
// dstate is beyond what a block can hold.
inline Cut cut_of(int64_t dstate, int64_t pack, int lanes = 32, int chunks = kMostChunks) {
  if (dstate > kMostLanes * chunks * pack) return {};
  Cut cut;
  cut.packs = int((dstate + pack - 1) / pack);
  // Three packs a thread where that leaves no lane idle (dstate 96), else as many lanes as packs.
  const int thirds = cut.packs / 3;
  const bool in_three = cut.packs % 3 == 0 && (thirds & (thirds - 1)) == 0 && thirds <= lanes;
  const int most = in_three ? thirds : lanes;
  while (cut.lanes() < most && cut.lanes() < cut.packs) ++cut.log_lanes;
  while (cut.packs > cut.lanes() * chunks) ++cut.log_lanes;
  cut.chunks = (cut.packs + cut.lanes() - 1) / cut.lanes();
  if (cut.chunks == 0) cut.chunks = 1;
  return cut;
}

// Rows (p) by states (n) of one head somewhere in memory.
struct States {
  char *data;
  DType dtype;
  int64_t row, state;  // strides, in elements

  __device__ bool operator==(const States &o) const { return data == o.data && dtype == o.dtype; }
};

// One thread's part of a row at `row`: states n0 .. n0 + K of n.
template <int K>
__device__ __forceinline__ void read_any(const States &from, int64_t row, int n0, int n,
                                         float (&h)[K]) {
#pragma unroll
  for (int i = 0; i < K; ++i)
    h[i] = n0 + i < n
               ? load(from.data + (row * from.row + (n0 + i) * from.state) * size_of(from.dtype),
                      from.dtype)
               : 0.0f;
}

template <int K>
__device__ __forceinline__ void write_any(const States &to, int64_t row, int n0, int n,
                                          const float (&h)[K]) {
#pragma unroll
  for (int i = 0; i < K; ++i)
    if (n0 + i < n)
      store(to.data + (row * to.row + (n0 + i) * to.state) * size_of(to.dtype), to.dtype, h[i]);
}

// Packed states of type S.
template <class S>
__device__ __forceinline__ S *pack_at(const States &at, int64_t row, int n0) {
  return reinterpret_cast<S *>(at.data) + row * at.row + n0;
}

// Slots of one batch row, resolved.  Counts out of range are held to the nearest that is one.
struct RowSlots {
  bool pad;
  int64_t in, out;
  int tokens;
  int64_t intermediate;  // row of the intermediate states to write, -1: none
  int64_t start;         // intermediate state to start from, -1: the slot
};

template <class Problem>
__device__ __forceinline__ RowSlots row_slots(const Problem &p, int64_t b) {
  const Slots &s = p.slots;
  RowSlots r;
  int64_t accepted = s.num_accepted.given() ? read_index(s.num_accepted, b) : 0;
  int64_t choice = s.in_choices > 1 && accepted > 1 ? accepted - 1 : 0;
  if (choice >= s.in_choices) choice = s.in_choices - 1;
  r.in = s.in.given() ? read_index(s.in, b, choice) : b;
  r.out = s.out.given() && !s.out_per_token ? read_index(s.out, b, 0) : r.in;
  r.pad = s.pad.is_pad(r.in) || s.pad.is_pad(r.out);
  r.tokens = int(count_of(s.num_tokens, b, p.ntokens));
  r.intermediate = r.start = -1;
  if (p.intermediate.given()) {
    r.intermediate = s.intermediate_indices.given() ? read_index(s.intermediate_indices, b) : b;
    if (r.intermediate < 0 || r.intermediate >= s.intermediate_entries) r.intermediate = -1;
    if (accepted > p.ntokens) accepted = p.ntokens;
    if (!s.in_chosen && r.intermediate >= 0 && accepted > 0) r.start = accepted - 1;
  }
  return r;
}

// The states of a head in a slot of the pool, and after a token.
template <class Problem>
__device__ __forceinline__ States states_in(const Problem &p, int64_t slot, int64_t head) {
  return {p.state.at(slot, head), p.state.dtype, p.state.stride[2], p.state.stride[3]};
}
template <class Problem>
__device__ __forceinline__ States states_after(const Problem &p, int64_t row, int64_t t,
                                               int64_t head) {
  return {p.intermediate.at(row, t, head), p.intermediate.dtype, p.intermediate.stride[3],
          p.intermediate.stride[4]};
}

// Sums over the lanes of a row, for R rows at a time, R <= lanes <= 32.  Each step halves the rows
// that a lane still carries; every row is added up as a butterfly would, whatever R.  y[0] is then
// the sum of row `returned` of the R.
template <int R>
__device__ __forceinline__ int sum_lanes(float (&y)[R], int lane, int lanes) {
  int off = lanes >> 1, row = 0;
#pragma unroll
  for (int w = R / 2; w >= 1; w /= 2) {
    const bool upper = lane & off;
#pragma unroll
    for (int i = 0; i < w; ++i) {
      const float sent = upper ? y[i] : y[i + w], kept = upper ? y[i + w] : y[i];
      y[i] = kept + __shfl_xor_sync(~0u, sent, off);
    }
    row += upper ? w : 0;
    off >>= 1;
  }
  for (; off; off >>= 1) y[0] += __shfl_xor_sync(~0u, y[0], off);
  return row;
}

// Where element n of a row stands in shared memory: halves of packs apart, so that lanes read
// their packs without bank conflicts.
template <int K>
__device__ __forceinline__ int place(int n, int padded) {
  if constexpr (K == 4) return n;
  return (n & 4 ? padded / 2 : 0) + n / 8 * 4 + (n & 3);
}

// Pack `pack` of such a row.
template <int K>
__device__ __forceinline__ void read_row(const float *row, int pack, int padded, float (&to)[K]) {
#pragma unroll
  for (int i = 0; i < K; i += 4) {
    const float4 v = *reinterpret_cast<const float4 *>(row + (i ? padded / 2 : 0) + pack * 4);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

// The group of a head: head / heads_per_group, exact below 2^20 heads.
__device__ __forceinline__ int group_of(float groups_per_head, int head) {
  return int((float(head) + 0.5f) * groups_per_head);
}

// What came before in the stream has ended; what follows may be brought up.
__device__ __forceinline__ void begin() {
  wait_for_previous();
  start_next();
}

}  // namespace ssmk::cuda
