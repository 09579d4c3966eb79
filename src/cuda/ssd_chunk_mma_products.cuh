// SPDX-License-Identifier: MIT
// The products of a chunk: see ssd_chunk_mma.cuh.
//
// Lane 4 g + q holds of a 16 x 8 tile of sums the rows g and g + 8, columns 2 q and 2 q + 1.
#pragma once

#include "cuda/ssd_chunk_mma.cuh"

namespace ssmk::cuda {

// Sums of a warp.
template <int kN, bool kPaired = false>
struct MmaState {
  float v[kN / 16][4];  // 16 channels by kN / 2 states

  // Which of 16 states column 2 q + e of tile j of two has.
  __device__ __forceinline__ static int column(int j, int q, int e) {
    return 8 * j + (kPaired ? 4 * e + q : 2 * q + e);
  }
};
template <int kColumns>
struct MmaTile {
  float v[kColumns / 8][4];
};
using MmaRows = MmaTile<kRows>;      // 16 channels by all rows
using MmaHalf = MmaTile<kRows / 2>;  // by half of them; or 16 rows by half of the rows

// What lane l gives to name rows of four matrices: rows 8 (l / 8 % 2) + l % 8, pieces l / 16 on; or
// rows 8 (l / 16) + l % 8, pieces l / 8 % 2 on.
struct LaneRows {
  int row, piece;
  __device__ __forceinline__ static LaneRows down_first(int lane) { return {lane & 15, lane >> 4}; }
  __device__ __forceinline__ static LaneRows across_first(int lane) {
    return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
  }
};

// Address of piece `piece` (a number known when compiling, even) of the row that begins at `row`.
__device__ __forceinline__ uint32_t mixed(uint32_t row, int mix, int piece) {
  return row + ((piece << 4) ^ mix);
}

// Of S = Q K^T the 16 rows of block `block` by kTiles times 16 columns from `column` on; weighed,
// the last tile 0 for later tokens where it is `diagonal`; rounded, to shared memory as M.
template <class T, int kN, int kTiles>
__device__ __forceinline__ void multiply_tiles(uint32_t queries, uint32_t keys,
                                               const RowArrays &rows, uint32_t weights, int block,
                                               int column, bool diagonal, int log_rank, int lane) {
  constexpr int kBytes = kN * 2;
  MmaTile<16 * kTiles> s;
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) s.v[j][k] = 0.0f;
  const LaneRows a = LaneRows::down_first(lane), b = LaneRows::across_first(lane);
  const uint32_t q_row = queries + (block * 16 + a.row) * kBytes;
  const uint32_t k_row = keys + (column + b.row) * kBytes;
  const int q_mix = (a.piece ^ (lane & 7)) << 4, k_mix = (b.piece ^ (lane & 7)) << 4;
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) {
    uint32_t q[4];
    load_matrices(q, mixed(q_row, q_mix, 2 * n));
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t k[4];
      load_matrices(k, mixed(k_row + j * 16 * kBytes, k_mix, 2 * n));
      multiply<T>(s.v[2 * j], q, k[0], k[1]);
      multiply<T>(s.v[2 * j + 1], q, k[2], k[3]);
    }
  }
  const int g = lane >> 2, q = lane & 3;
  const int i0 = block * 16 + g, i1 = i0 + 8;
  const float sum0 = rows.sum[i0], sum1 = rows.sum[i1];
#pragma unroll
  for (int j8 = 0; j8 < 2 * kTiles; ++j8) {
    const int j = column + j8 * 8 + 2 * q;
    const float2 sum = *reinterpret_cast<const float2 *>(rows.sum + j);
    const float2 later = *reinterpret_cast<const float2 *>(rows.later + j);
    float m[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      m[k] = s.v[j8][k] * (exp2_fast((k < 2 ? sum0 : sum1) - (k & 1 ? sum.y : sum.x)) *
                           (k & 1 ? later.y : later.x));
    if (j8 / 2 == kTiles - 1 && diagonal) {
      const float2 same = *reinterpret_cast<const float2 *>(rows.same + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = (k < 2 ? i0 : i1) >> log_rank, then = (j + (k & 1)) >> log_rank;
        if (then == at) m[k] = s.v[j8][k] * (k & 1 ? same.y : same.x);
        if (then > at) m[k] = 0.0f;
      }
    }
    store_word(weights + word_at(i0, j, kSliceBytes), pack_two<T>(m[0], m[1]));
    store_word(weights + word_at(i1, j, kSliceBytes), pack_two<T>(m[2], m[3]));
  }
}

// A warp's part of M: 16 rows, half of the columns as far as they are not later.  The rows are so
// dealt that the warps of a scheduler have alike to do.
template <class T, int kN>
__device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys,
                                              const RowArrays &rows, uint32_t weights, int pair,
                                              int half, int log_rank, int lane) {
  const int block = half ? 3 - pair : pair, tiles = block + 1 - 2 * half, column = half * 32;
  if (tiles >= 2)
    multiply_tiles<T, kN, 2>(queries, keys, rows, weights, block, column, tiles == 2, log_rank,
                             lane);
  else if (tiles == 1)
    multiply_tiles<T, kN, 1>(queries, keys, rows, weights, block, column, true, log_rank, lane);
}

// Y^T = h Q^T over the warp's half of the states.
template <class T, int kN>
__device__ __forceinline__ void multiply_state(MmaRows &y, const MmaState<kN> &h, uint32_t queries,
                                               int half, int lane) {
  constexpr int kBytes = kN * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] = 0.0f;
  const LaneRows b = LaneRows::across_first(lane);
  const uint32_t row = queries + b.row * kBytes;
  const int mix = ((b.piece + half * (kN / 16)) ^ (lane & 7)) << 4;
#pragma unroll
  for (int n = 0; n < kN / 32; ++n) {
    const float (&h0)[4] = h.v[2 * n], (&h1)[4] = h.v[2 * n + 1];
    const uint32_t a[4] = {pack_two<T>(h0[0], h0[1]), pack_two<T>(h0[2], h0[3]),
                           pack_two<T>(h1[0], h1[1]), pack_two<T>(h1[2], h1[3])};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t q[4];
      load_matrices(q, mixed(row + i * 16 * kBytes, mix, 2 * n));
      multiply<T>(y.v[2 * i], a, q[0], q[1]);
      multiply<T>(y.v[2 * i + 1], a, q[2], q[3]);
    }
  }
}

// The other half's sums for this warp's half of the rows join its own, by way of `sums`; then times
// exp(cs) of the rows.
__device__ __forceinline__ void join_halves(MmaHalf &to, const MmaRows &y, uint32_t sums,
                                            const float *decay, int pair, int half, int lane) {
  const uint32_t at = sums + pair * 4096 + lane * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sent[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sent[k] = half ? y.v[i][k] : y.v[4 + i][k];
      to.v[i][k] = half ? y.v[4 + i][k] : y.v[i][k];
    }
    store_four_words(at + half * 2048 + i * 512,
                     {__float_as_uint(sent[0]), __float_as_uint(sent[1]), __float_as_uint(sent[2]),
                      __float_as_uint(sent[3])});
  }
  meet_other_half(pair);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 v = load_four_words(at + (half ^ 1) * 2048 + i * 512);
    const float2 e = *reinterpret_cast<const float2 *>(decay + half * 32 + i * 8 + 2 * (lane & 3));
    to.v[i][0] = (to.v[i][0] + __uint_as_float(v.x)) * e.x;
    to.v[i][1] = (to.v[i][1] + __uint_as_float(v.y)) * e.y;
    to.v[i][2] = (to.v[i][2] + __uint_as_float(v.z)) * e.x;
    to.v[i][3] = (to.v[i][3] + __uint_as_float(v.w)) * e.y;
  }
}

// U^T of the warp's channels: four fragments of 16 rows each.
struct MmaValues {
  uint32_t v[kRows / 16][4];
};
__device__ __forceinline__ void load_values(MmaValues &u, uint32_t tile, int pair, int lane) {
  // Matrices: channels first, then rows.
  const uint32_t row = tile + ((lane & 7) + ((lane >> 4) << 3)) * kSliceBytes;
  const int mix = ((((lane >> 3) & 1) + 2 * pair) ^ (lane & 7)) << 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) load_transposed(u.v[j], row + j * 16 * kSliceBytes + mix);
}

// Y^T += U^T M^T, for half of the rows: of which kHalf, as a number known when compiling.
template <class T, int kHalf>
__device__ __forceinline__ void multiply_half(MmaHalf &y, const MmaValues &u, uint32_t weights,
                                              int lane) {
  const LaneRows b = LaneRows::across_first(lane);
  const uint32_t row = weights + (kHalf * 32 + b.row) * kSliceBytes;
  const int mix = (b.piece ^ (lane & 7)) << 4;
#pragma unroll
  for (int j = 0; j < 2 * kHalf + 2; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (j <= kHalf * 2 + i) {
        uint32_t m[4];
        load_matrices(m, mixed(row + i * 16 * kSliceBytes, mix, 2 * j));
        multiply<T>(y.v[2 * i], u.v[j], m[0], m[1]);
        multiply<T>(y.v[2 * i + 1], u.v[j], m[2], m[3]);
      }
}
template <class T>
__device__ __forceinline__ void multiply_values(MmaHalf &y, const MmaValues &u, uint32_t weights,
                                                int half, int lane) {
  if (half)
    multiply_half<T, 1>(y, u, weights, lane);
  else
    multiply_half<T, 0>(y, u, weights, lane);
}

// h = decay h + (w U)^T K.
template <class T, int kN>
__device__ __forceinline__ void add_to_state(MmaState<kN> &h, const MmaValues &u, uint32_t keys,
                                             const float *weight, float decay, int half, int lane) {
  constexpr int kBytes = kN * 2;
#pragma unroll
  for (int n = 0; n < kN / 16; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) h.v[n][k] *= decay;
  const LaneRows b = LaneRows::down_first(lane);
  const uint32_t row = keys + b.row * kBytes;
  const int mix = ((b.piece + half * (kN / 16)) ^ (lane & 7)) << 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 low = *reinterpret_cast<const float2 *>(weight + j * 16 + 2 * (lane & 3));
    const float2 high = *reinterpret_cast<const float2 *>(weight + j * 16 + 8 + 2 * (lane & 3));
    uint32_t a[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 v = unpack_two<T>(u.v[j][k]), w = k < 2 ? low : high;
      a[k] = pack_two<T>(v.x * w.x, v.y * w.y);
    }
#pragma unroll
    for (int n = 0; n < kN / 32; ++n) {
      uint32_t k[4];
      load_transposed(k, mixed(row + j * 16 * kBytes, mix, 2 * n));
      multiply<T>(h.v[2 * n], a, k[0], k[1]);
      multiply<T>(h.v[2 * n + 1], a, k[2], k[3]);
    }
  }
}

}  // namespace ssmk::cuda
