// SPDX-License-Identifier: MIT
// The end of a chunk's outputs: D, norm, gate, the sum over the ranks; then to memory.
#pragma once

#include "cuda/ssd_chunk_mma_states.cuh"

namespace ssmk::cuda {

// A later token that is not finite must not reach earlier ones through the zeros of M.  Where the
// values of a channel are not all finite, those that are not stay out of the product.  from[i]: the
// first such row of channel i.
struct NotFinite {
  int from[2];

  // With the threads that have the same channels.
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int off = 1; off < 4; off *= 2)
        from[i] = min(from[i], __shfl_xor_sync(~0u, from[i], off));
  }
};

template <class T>
__device__ __forceinline__ bool is_finite(uint32_t v) {  // both of a word
  constexpr uint32_t kExponent = dtype_for<T> == DType::kBF16 ? 0x7f80u : 0x7c00u;
  return (v & kExponent) != kExponent && (v >> 16 & kExponent) != kExponent;
}

template <class T>
__device__ __forceinline__ NotFinite set_apart(MmaValues &u, int lane) {
  NotFinite found = {{kRows, kRows}};
#pragma unroll
  for (int j = 3; j >= 0; --j)
#pragma unroll
    for (int half = 1; half >= 0; --half)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t &word = u.v[j][i + 2 * half];
        const int row = j * 16 + half * 8 + 2 * (lane & 3);
        if (!is_finite<T>(word & 0xffff0000u)) found.from[i] = row + 1, word &= 0xffffu;
        if (!is_finite<T>(word & 0xffffu)) found.from[i] = row, word &= 0xffff0000u;
      }
  found.join();
  return found;
}

template <class T>
__device__ __forceinline__ bool all_finite(const MmaValues &u) {
  uint32_t sum = 0;  // of zeros
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) sum = add_nothing<T>(u.v[j][k], sum);
  return is_finite<T>(sum);
}

// What may see a value that is not finite is NaN.
template <int kColumns>
__device__ __forceinline__ void forbid(MmaTile<kColumns> &y, const NotFinite &found,
                                       const MmaLane &t) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (t.half * kColumns + i * 8 + 2 * (t.lane & 3) + (k & 1) >= found.from[k >> 1])
        y.v[i][k] = __int_as_float(0x7fffffff);
}

// y += D u.  Tiles of Y^T and fragments of U^T stand alike.
template <class T>
__device__ __forceinline__ void add_skip(MmaHalf &y, const MmaValues &u, const float *by,
                                         const MmaLane &t) {
  const float D[2] = {by[t.own()], by[t.own() + 8]};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t word =
          t.half ? u.v[2 + (i >> 1)][(i & 1) * 2 + k] : u.v[i >> 1][(i & 1) * 2 + k];
      const float2 v = unpack_two<T>(word);
      y.v[i][2 * k] = fmaf(D[k], v.x, y.v[i][2 * k]);
      y.v[i][2 * k + 1] = fmaf(D[k], v.y, y.v[i][2 * k + 1]);
    }
}

// y *= weight / sqrt(mean y^2 + eps), the mean over all the head's channels.
__device__ __forceinline__ void normalise(MmaHalf &y, const float *by, float eps, float *squares,
                                          const MmaThread &t) {
  const float weight[2] = {by[t.own()], by[t.own() + 8]};
  const int first = t.half * 32 + 2 * (t.lane & 3);
  const float mean = __fdividef(1.0f, float(t.channels));
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float sum = t.has(0) ? y.v[i][k] * y.v[i][k] : 0.0f;
      if (t.has(2)) sum = fmaf(y.v[i][2 + k], y.v[i][2 + k], sum);
#pragma unroll
      for (int off = 4; off < 32; off *= 2) sum += __shfl_xor_sync(~0u, sum, off);
      if (t.lane < 4) squares[t.pair * kRows + first + i * 8 + k] = sum;
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float *const of = squares + first + i * 8 + k;
      const float sum = (of[0] + of[kRows]) + (of[2 * kRows] + of[3 * kRows]);
      const float scale = rsqrtf(fmaf(sum, mean, eps));
      y.v[i][k] *= scale * weight[0];
      y.v[i][2 + k] *= scale * weight[1];
    }
}

// Rank 1: gated, rounded and, turned round, to the tile `out`; the gates are in `z`, which may be
// the same tile: a warp reads and writes its own channels.
template <class T>
__device__ __forceinline__ void gate_rows(const MmaHalf &y, bool gated, uint32_t z, uint32_t out,
                                          int pair, int half, int lane) {
  const uint32_t row = (half * 32 + (lane & 7) + ((lane >> 4) << 3)) * kSliceBytes;
  const int mix = ((((lane >> 3) & 1) + 2 * pair) ^ (lane & 7)) << 4;
  uint32_t words[2][4];
  if (gated) {
#pragma unroll
    for (int j = 0; j < 2; ++j) load_transposed(words[j], z + row + j * 16 * kSliceBytes + mix);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = y.v[2 * j + (i >> 1)];
      float2 v = {tile[2 * (i & 1)], tile[2 * (i & 1) + 1]};
      if (gated) {
        const float2 by = unpack_two<T>(words[j][i]);
        v.x *= gate(by.x), v.y *= gate(by.y);
      }
      // Turned round: rows lane / 4, two neighbouring channels.
      words[j][i] = transposed(pack_two<T>(v.x, v.y));
    }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_word(out + word_at(half * 32 + j * 16 + (i >> 1) * 8 + (lane >> 2),
                               pair * 16 + (i & 1) * 8 + 2 * (lane & 3), kSliceBytes),
                 words[j][i]);
}

// Any rank: gates of tokens, zeta and phi of (rank, channel).  With `sum` the rows of `out` are
// tokens.
template <class T>
__device__ __forceinline__ void gate_ranks(const MmaHalf &y, bool gated, uint32_t z, uint32_t out,
                                           const float *zeta, const float *phi, bool sum,
                                           int log_rank, int pair, int half, int lane) {
  const int q = lane & 3, mask = (1 << log_rank) - 1;
  // A thread's ranks are the same in every tile: those of 2 q and 2 q + 1.
  float zetas[4], phis[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int at = ((2 * q + (k & 1)) & mask) * kSlice + pair * 16 + (lane >> 2) + (k >> 1) * 8;
    zetas[k] = zeta[at];
    phis[k] = sum ? phi[at] : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = half * 32 + i * 8 + 2 * q;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = pair * 16 + (lane >> 2) + 8 * k;
      float low = y.v[i][2 * k] * phis[2 * k], high = y.v[i][2 * k + 1] * phis[2 * k + 1];
      if (gated) {
        const auto value = [&](int t) {
          const float2 f = unpack_two<T>(load_word(z + word_at(t, c & ~1, kSliceBytes)));
          return c & 1 ? f.y : f.x;
        };
        const float first = value(row >> log_rank);
        const float second = log_rank > 0 ? first : value(row + 1);
        low *= gate(first * zetas[2 * k]);
        high *= gate(second * zetas[2 * k + 1]);
      }
      const auto put = [&](int at, float v) {
        store_half(out + word_at(at, c & ~1, kSliceBytes) + (c & 1) * 2, pack_two<T>(v, 0.0f));
      };
      if (sum && log_rank > 0) {
        float all = low + high;
#pragma unroll 1
        for (int off = 2; off < 1 << log_rank; off *= 2) all += __shfl_xor_sync(~0u, all, off / 2);
        if ((row & mask) == 0) put(row >> log_rank, all);
      } else {
        put(row, low);
        put(row + 1, high);
      }
    }
  }
}

// Zeros for the tokens [begin, end).
__device__ __forceinline__ void clear_rows(char *to, int64_t token, int64_t rank, int log_rank,
                                           int begin, int end, int pieces, int thread) {
#pragma unroll 1
  for (int64_t i = thread; i < (int64_t(end - begin) << log_rank) * pieces; i += kTeam) {
    const int64_t row = i / pieces;
    *reinterpret_cast<uint4 *>(to + (begin + (row >> log_rank)) * token +
                               (row & ((1 << log_rank) - 1)) * rank +
                               i % pieces * 16) = {0, 0, 0, 0};
  }
}

// The tile's first `rows` rows to memory; addresses as in bring_rows().
template <int kPieces = 8, int kTo = kRows>
__device__ __forceinline__ void store_rows(uint32_t tile, char *to, int64_t token, int64_t rank,
                                           int log_rank, int rows, int pieces, int thread) {
  constexpr int kStep = kTeam / kPieces, kBytes = kPieces * 16;
  const int piece = thread % kPieces, first = thread / kPieces;
  to += (first >> log_rank) * token + (first & ((1 << log_rank) - 1)) * rank + piece * 16;
  const int64_t step = (kStep >> log_rank) * token;
  tile += piece_at(first, piece, kBytes);
  uint4 v[kTo / kStep];
#pragma unroll
  for (int i = 0; i < kTo / kStep; ++i) v[i] = load_four_words(tile + i * kStep * kBytes);
#pragma unroll
  for (int i = 0; i < kTo / kStep; ++i)
    if (first + i * kStep < rows && piece < pieces)
      *reinterpret_cast<uint4 *>(to + i * step) = v[i];
}

}  // namespace ssmk::cuda
