// SPDX-License-Identifier: MIT
// What a chunk needs before its products: the weights of its rows; for Mamba-3 the angles and from
// B and C the keys and queries.
#pragma once

#include "cuda/ssd_chunk_mma_states.cuh"

namespace ssmk::cuda {

// Log decays below are 0 in float32, and cut off there, so that sums stay finite.
constexpr double kLogDecayLimit = 200.0;

// The inputs of a token, as bits.
struct TokenBits {
  uint32_t dt, adt, trap;
};

__device__ __forceinline__ TokenBits read_token(const SsdChunkProblem &p, int64_t row, int token,
                                                int64_t head) {
  TokenBits b = {};
  b.dt = load_bits(p.dt.at(row, token, head), p.dt.dtype);
  if (p.adt.given()) b.adt = load_bits(p.adt.at(row, token, head), p.adt.dtype);
  if (p.trap.given()) b.trap = load_bits(p.trap.at(row, token, head), p.trap.dtype);
  return b;
}

__device__ __forceinline__ double log2_decay(double decay) {
  return (decay < -kLogDecayLimit  ? -kLogDecayLimit
          : decay > kLogDecayLimit ? kLogDecayLimit
                                   : decay) *
         1.4426950408889634074;
}

// A chunk's rows are prepared in three steps, while the chunk before is computed.  First thread i
// of some: token i of the `tokens` of the chunk, or the one after them if the sequence goes on.
__device__ __forceinline__ void prepare_token(TokenTerms &to, float *dts, const TokenBits &b,
                                              const SsdChunkProblem &p, const BlockFacts &head,
                                              int i, int tokens, bool follows, int chunk_tokens) {
  const bool own = i < tokens, there = i < tokens + (follows ? 1 : 0);
  const float dt =
      there ? transform_dt(p.dt_transform, value_of(b.dt, p.dt.dtype) + head.bias) : 0.0f;
  float now = dt, share = 0.0f;
  if (p.trap.given() && there) {
    const float trap = value_of(b.trap, p.trap.dtype);
    now *= p.mamba3.trap_sigmoid ? trap : sigmoid(trap);
    share = dt * (p.mamba3.trap_sigmoid ? 1.0f - trap : sigmoid(-trap));
  }
  to.share[i] = share;
  if (i >= chunk_tokens) return;
  const double decay = p.adt.given() ? double(value_of(b.adt, p.adt.dtype)) : double(dt) * head.A;
  to.decay[i] = own ? log2_decay(decay) : 0.0;
  to.now[i] = own ? now : 0.0f;
  dts[i] = own ? dt : 0.0f;
}

// Then one warp: the sums of the log2 decays.
__device__ __forceinline__ void sum_decays(TokenTerms &to, int chunk_tokens, int lane) {
  const bool there = 2 * lane < chunk_tokens;
  const double a = there ? to.decay[2 * lane] : 0.0, b = there ? to.decay[2 * lane + 1] : 0.0;
  double sum = a + b;
#pragma unroll
  for (int off = 1; off < 32; off *= 2) {
    const double below = __shfl_up_sync(~0u, sum, off);
    if (lane >= off) sum += below;
  }
  double before = __shfl_up_sync(~0u, sum, 1);
  if (lane == 0) before = 0;
  if (there) {
    to.sum[2 * lane] = before + a;
    to.sum[2 * lane + 1] = sum;
  }
  if (lane == 31) to.all = sum;
}

// Then a thread for each row.  `carried`: what follows adds its share to the last token's weight,
// else that is left apart.
__device__ __forceinline__ void prepare_row(RowArrays &to, const TokenTerms &terms, int row,
                                            int tokens, bool carried, int log_rank) {
  const int i = row >> log_rank;
  const bool own = i < tokens;
  const double sum = own ? terms.sum[i] : 0.0;
  const float now = own ? terms.now[i] : 0.0f;
  const float later = own ? now + (i < tokens - 1 || carried ? terms.share[i + 1] : 0.0f) : 0.0f;
  to.sum[row] = float(sum);
  to.later[row] = later;
  to.same[row] = now;
  to.decay[row] = exp2_fast(float(sum));
  to.ending[row] = own ? exp2_fast(float(terms.all - sum)) * later : 0.0f;
  if (row == 0) {
    to.last[0] = exp2_fast(float(terms.all));
    to.last[1] = terms.share[tokens];
  }
}

// Rows of u from those of x: u^r = psi^r x.
template <class T>
__device__ __forceinline__ void spread_values(uint32_t x, uint32_t u, const float *psi,
                                              int log_rank, int thread) {
  const int piece = thread & 7, mask = (1 << log_rank) - 1;
#pragma unroll
  for (int row = thread >> 3; row < kRows; row += kTeam / 8) {
    uint4 v = load_four_words(x + piece_at(row >> log_rank, piece, kSliceBytes));
    const float *const by = psi + (row & mask) * kSlice + piece * 8;
    const float4 low = *reinterpret_cast<const float4 *>(by);
    const float4 high = *reinterpret_cast<const float4 *>(by + 4);
    const auto one = [](uint32_t w, float a, float b) {
      const float2 f = unpack_two<T>(w);
      return pack_two<T>(f.x * a, f.y * b);
    };
    v = {one(v.x, low.x, low.y), one(v.y, low.z, low.w), one(v.z, high.x, high.y),
         one(v.w, high.z, high.w)};
    store_four_words(u + piece_at(row, piece, kSliceBytes), v);
  }
}

}  // namespace ssmk::cuda
