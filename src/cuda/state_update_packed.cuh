// SPDX-License-Identifier: MIT
// Decode on packed states with one decay for all states of a row: state_update_heads.cuh, faster.
//
// A thread updates one pack in each of kRows rows p, or several packs of one row, in registers.
// What a row needs beside its states (dt', the decay, dt' x, D x, the gate) is computed by the
// lanes that will store its output, and handed to the row's other lanes by shuffles.  Values come
// as raw bits first, so that a dtype known only when running does not make one load wait for
// another.  The arithmetic is that of update_heads(), operation by operation.
#pragma once

#include "cuda/near.cuh"
#include "cuda/state_update_lanes.cuh"

namespace ssmk::cuda {

// What the kernel needs of a StateUpdateProblem.
struct PackedProblem {
  Near<4> x, dt, z, out;
  Near<3> A;
  Near<4> B, C;
  Near<2> D, dt_bias;
  Near<4> state;
  Near<5> intermediate;
  Near<2> in, one_out;  // slots again; one_out: one for all tokens
  Slots slots;
  DtTransform dt_transform;
  int first_batch, first_head, ntokens, headdim, packs, log_lanes;
  float groups_per_head;
};

// What a lane brings for its own row and token, and its packs of B and C, as bits.
template <class X, int K, int kChunks>
struct TokenBits {
  X x, z;
  uint32_t dt;
  Pack<X, K> B[kChunks], C[kChunks];
};

// S: states.  X: x, z, B, C and out; the other values may have any dtype.
template <class S, class X, int kRows, int kChunks, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    update_packed(const __grid_constant__ PackedProblem p) {
  constexpr int K = kPack<S>;
  static_assert(kRows == 1 || kChunks == 1);
  begin();

  const int lanes = 1 << p.log_lanes, lane = threadIdx.x & (lanes - 1);
  const int apart = 32 >> p.log_lanes;  // a warp's rows are neighbours
  const int row0 = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * (apart * kRows) +
                   (threadIdx.x % 32 >> p.log_lanes);
  const int head = p.first_head + blockIdx.y;
  const int group = group_of(p.groups_per_head, head);
  const int b = p.first_batch + blockIdx.z;
  // The row that this lane prepares and stores: kRows <= lanes.
  constexpr int kLogRows = kRows == 4 ? 2 : kRows == 2 ? 1 : 0;
  const int share = p.log_lanes - kLogRows;  // log2 of the lanes that prepare one row
  const int own = kRows == 1 ? row0 : row0 + (lane >> share) * apart;
  const bool stores = own < p.headdim && (lane & ((1 << share) - 1)) == 0;

  const RowSlots slots = row_slots(p, b);
  const auto out_at = [&](int t) { return reinterpret_cast<X *>(p.out.at(b, t, head, own)); };
  const auto zero_output = [&](int from_token) {
    for (int t = from_token; t < p.ntokens; ++t)
      if (stores) *out_at(t) = narrow<X>(0.0f);
  };
  if (slots.pad) return zero_output(0);

  // Rows and packs past the end read the last ones again, and neither add to sums nor store.
  const auto row_of = [&](int r) { return min(row0 + r * apart, p.headdim - 1); };
  const auto pack_of = [&](int c) { return min(c * lanes + lane, p.packs - 1); };
  const auto in_slot = [&](int64_t slot) { return p.state.at(int(slot), head); };
  const auto after_token = [&](int64_t row, int64_t t) {
    return p.intermediate.at(int(row), int(t), head);
  };
  const bool rolled_back = slots.start >= 0;
  char *const source =
      rolled_back ? after_token(slots.intermediate, slots.start) : in_slot(slots.in);
  const int source_row = rolled_back ? p.intermediate.stride[3] : p.state.stride[2];
  const auto at = [&](char *base, int row_stride, int r, int c) {
    return reinterpret_cast<S *>(base + int64_t(row_of(r)) * row_stride) + pack_of(c) * K;
  };
  Pack<S, K> raw[kRows][kChunks];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      raw[r][c] = load_pack_once<S, K>(at(source, source_row, r, c));

  const int own_row = min(own, p.headdim - 1);
  const auto load_token = [&](int t) {
    TokenBits<X, K, kChunks> bits;
    bits.dt = load_bits(p.dt.at(b, t, head, own_row), p.dt.dtype);
    bits.x = *reinterpret_cast<const X *>(p.x.at(b, t, head, own_row));
    bits.z = p.z.given() ? *reinterpret_cast<const X *>(p.z.at(b, t, head, own_row)) : X(0.0f);
    const X *const B = reinterpret_cast<const X *>(p.B.at(b, t, group));
    const X *const C = reinterpret_cast<const X *>(p.C.at(b, t, group));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      bits.B[c] = load_pack<X, K>(B + pack_of(c) * K);
      bits.C[c] = load_pack<X, K>(C + pack_of(c) * K);
    }
    return bits;
  };
  const int tokens = slots.tokens;
  auto bits = load_token(0);
  const uint32_t A_bits = load_bits(p.A.at(head, own_row), p.A.dtype);
  const uint32_t D_bits = p.D.given() ? load_bits(p.D.at(head, own_row), p.D.dtype) : 0;
  const uint32_t bias_bits =
      p.dt_bias.given() ? load_bits(p.dt_bias.at(head, own_row), p.dt_bias.dtype) : 0;

  float h[kRows][kChunks][K];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) widen(raw[r][c], h[r][c]);
  const auto keep = [&](char *to, int row_stride) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (row0 + r * apart < p.headdim && c * lanes + lane < p.packs)
          store_pack_once(at(to, row_stride, r, c), narrow_pack<S>(h[r][c]));
  };

  // A and the others of the row, once for all tokens.
  const float rate_log2e = value_of(A_bits, p.A.dtype) * kLog2e;
  const float D = value_of(D_bits, p.D.dtype), bias = value_of(bias_bits, p.dt_bias.dtype);
  for (int t = 0; t < tokens; ++t) {
    float dt = value_of(bits.dt, p.dt.dtype);
    const float x = widen(bits.x);
    if (p.dt_bias.given()) dt += bias;
    dt = transform_dt(p.dt_transform, dt);
    const float decay = exp2_fast(dt * rate_log2e);
    const float input = dt * x;
    // Without D not 0 x: x may be infinite.
    const float skip = p.D.given() ? __fmul_rn(D, x) : 0.0f;
    const float gate = p.z.given() ? silu(widen(bits.z)) : 1.0f;

    float y[kRows] = {};
    float decays[kRows], inputs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      decays[r] = kRows == 1 ? decay : __shfl_sync(~0u, decay, r << share, lanes);
      inputs[r] = kRows == 1 ? input : __shfl_sync(~0u, input, r << share, lanes);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float B[K], C[K];
      widen(bits.B[c], B);
      widen(bits.C[c], C);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = y[r];
#pragma unroll
        for (int i = 0; i < K; ++i) {
          h[r][c][i] = fmaf(decays[r], h[r][c][i], inputs[r] * B[i]);
          sum = fmaf(h[r][c][i], C[i], sum);
        }
        if (c * lanes + lane < p.packs) y[r] = sum;
      }
    }
    if (t + 1 < tokens) bits = load_token(t + 1);
    sum_lanes<kRows>(y, lane, lanes);
    if (stores) *out_at(t) = narrow<X>((y[0] + skip) * gate);

    if (slots.intermediate >= 0) keep(after_token(slots.intermediate, t), p.intermediate.stride[3]);
    if (p.slots.out_per_token && !p.slots.keep_state) {
      const int64_t slot = read_index(p.slots.out, b, t);
      if (!p.slots.pad.is_pad(slot)) keep(in_slot(slot), p.state.stride[2]);
    }
  }

  zero_output(tokens);
  if (p.slots.keep_state || p.slots.out_per_token) return;
  // Without tokens a state that stays where it is is left alone.
  char *const to = in_slot(slots.out);
  if (tokens == 0 && source == to) return;
  keep(to, p.state.stride[2]);
}

}  // namespace ssmk::cuda
