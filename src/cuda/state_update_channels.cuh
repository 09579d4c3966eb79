// SPDX-License-Identifier: MIT
// Decode of states that each have a decay of their own, as Mamba-1's: packed states, A in float32.
//
// The decays of a row (a channel) are as many bytes as its states, and all rows of the batch share
// them, as all channels share B and C of a token.  So a thread keeps its part of A in registers and
// walks along the batch, a block has B and C of its batch rows in shared memory, and a thread asks
// for the states and inputs of the next batch rows before it computes the present one.  Where the
// batch is too small for that, a thread updates one batch row.
//
// While the kernels before it in the stream end, a block brings what it will need to the
// second-level cache.  What it sees then may change: it is a hint, and is read again.
//
// The arithmetic is that of update_heads(), operation by operation, so bits depend on none of this.
#pragma once

#include "cuda/hints.cuh"
#include "cuda/state_update_packed.cuh"

namespace ssmk::cuda {

struct ChannelsProblem : PackedProblem {
  int batch, walk;   // walk: batch rows of a block
  int padded, ring;  // of shared memory: see update_channels()
  int dt_shift;      // makes bits of dt, but a float16, a float32
  int hinted;        // blocks that have time for hints
  bool deep;         // hints reach to the states, or else to slots
};

constexpr int kChannelsThreads = 128;
constexpr int kMostWalk = 16;

// Blocks on a multiprocessor as asked for; other targets than 9.0 need more registers for the same.
constexpr int channels_bound(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  return blocks - 1;
#else
  return blocks;
#endif
}

// A batch row's slots, in 32 bits.
struct RowPlan {
  int in, out;  // in: -1 if the row is a pad
  int tokens, intermediate, start;
};

// S: states.  X: x, z, B, C and out.  kLogLanes: log2 of the lanes of a row if its packs are as
// many, rows of states and of A lie side by side and a warp's rows are all there; else -1.
// kAhead: batch rows whose states are asked for ahead, in registers if it is 1, else in a ring in
// shared memory where each thread has its place; 0: a thread has one batch row.
// Shared memory: of each token B and C in float32, `padded` each; from 16-byte word `ring` on that.
template <class S, class X, int kLogLanes, int kRows, int kChunks, bool kOne, int kAhead,
          int kMinBlocks>
__global__ void __launch_bounds__(kChannelsThreads, channels_bound(kMinBlocks))
    update_channels(const __grid_constant__ ChannelsProblem p) {
  constexpr int K = kPack<S>;
  constexpr bool kTight = kLogLanes >= 0, kWalks = kAhead > 0, kRing = kAhead > 1;
  static_assert(kRows == 1 || kChunks == 1);
  constexpr int kLogRows = kRows == 4 ? 2 : kRows == 2 ? 1 : 0;

  const int log_lanes = kTight ? kLogLanes : p.log_lanes;
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const int apart = 32 >> log_lanes;  // a warp's rows are neighbours
  int warp_row = (blockIdx.x * (kChannelsThreads / 32) + threadIdx.x / 32) * (apart * kRows);
  const bool past_end = kTight && warp_row >= p.headdim;
  if (past_end) warp_row = 0;
  const int row0 = warp_row + (threadIdx.x % 32 >> log_lanes);
  const int head = p.first_head + blockIdx.y;
  const int group = group_of(p.groups_per_head, head);
  const int first = (p.first_batch + int(blockIdx.z)) * (kWalks ? p.walk : 1);
  const int batch_rows = kWalks ? min(p.walk, p.batch - first) : 1;
  // The row that this lane prepares and stores: kRows <= lanes.
  const int share = log_lanes - kLogRows;  // log2 of the lanes that prepare one row
  const int own = kRows == 1 ? row0 : row0 + (lane >> share) * apart;
  const bool stores = (kTight || own < p.headdim) && (lane & ((1 << share) - 1)) == 0;
  const int own_row = kTight ? own : min(own, p.headdim - 1);

  // Rows and packs past the end read the last ones again, and neither add to sums nor store.
  const auto row_of = [&](int r) {
    return kTight ? row0 + r * apart : min(row0 + r * apart, p.headdim - 1);
  };
  const auto pack_of = [&](int c) { return kTight ? lane : min(c * lanes + lane, p.packs - 1); };
  const auto exists = [&](int r, int c) {
    return kTight || (row0 + r * apart < p.headdim && c * lanes + lane < p.packs);
  };
  // Packs of a head.  If tight, its address is that of this thread's first pack.
  const int mine = kTight ? (row0 * lanes + lane) * 16 : 0;
  const auto pack_at = [&](char *of_head, int row_stride, int r, int c) {
    return kTight ? of_head + r * (apart * lanes * 16)
                  : of_head + int64_t(row_of(r)) * row_stride + pack_of(c) * 16;
  };
  char *states_at = p.state.at(0, head) + mine;
  const auto in_slot = [&](int slot) { return states_at + int64_t(slot) * p.state.stride[0]; };
  const auto after_token = [&](int row, int t) { return p.intermediate.at(row, t, head) + mine; };
  const auto rate_at = [&](int r, int c) {
    return reinterpret_cast<const float *>(p.A.at(head, row_of(r))) + pack_of(c) * K;
  };
  // Without z that is x, and not used.
  const char *x_at = p.x.at(first, 0, head, own_row);
  const char *z_at = p.z.given() ? p.z.at(first, 0, head, own_row) : x_at;
  const char *dt_at = p.dt.at(first, 0, head, own_row);
  char *out_at = p.out.at(first, 0, head, own);
  // Kept as they are: what they came from is more to compute with.
  asm("" : "+l"(states_at), "+l"(x_at), "+l"(z_at), "+l"(dt_at), "+l"(out_at));
  const auto coefficients_at = [&](const Near<4> &v, int i, int t, int pack) {
    return reinterpret_cast<const X *>(v.at(first + i, t, group)) + pack * K;
  };

  // Hints.  Tokens come one behind the other: the warps of a block bring by turns what it needs of
  // a batch row, in sixteen parts.
  const auto bring_tokens = [&](int i) {
    if ((i ^ threadIdx.x / 32) % (kChannelsThreads / 32)) return;
    const int rows = apart * kRows * (kChannelsThreads / 32);
    const int part = blockIdx.x * rows + (threadIdx.x % 16) * (rows / 16);
    const int row = min(part, p.headdim - 1);
#pragma unroll 1
    for (int t = threadIdx.x % 32 / 16; t < p.ntokens; t += 2) {
      fetch(p.x.at(first + i, t, head, row));
      fetch(p.dt.at(first + i, t, head, row));
      if (p.z.given()) fetch(p.z.at(first + i, t, head, row));
    }
  };
  if (!kOne) bring_tokens(0);
  constexpr int kGuesses = kWalks ? kAhead : 1;
  int guesses[kGuesses];
#pragma unroll
  for (int d = 0; d < kGuesses; ++d) guesses[d] = -1;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (!kWalks && p.in.given()) fetch(p.in.at(first));
  if (kWalks ? block < p.hinted : p.deep) {
#pragma unroll
    for (int d = 0; d < kGuesses; ++d)
      if (d < batch_rows) {
        const int64_t slot = p.in.given() ? peek_index(p.in, first + d, 0) : first + d;
        guesses[d] = slot >= 0 && slot < p.slots.pad.entries ? int(slot) : -1;
      }
    if (p.deep) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) fetch(rate_at(r, c));
      if (p.D.given()) fetch(p.D.at(head, own_row));
      if (p.dt_bias.given()) fetch(p.dt_bias.at(head, own_row));
      fetch(x_at);
      fetch(dt_at);
      fetch(z_at);
      if (!kWalks) fetch(coefficients_at(p.B, 0, 0, pack_of(0)));
      if (!kWalks) fetch(coefficients_at(p.C, 0, 0, pack_of(0)));
#pragma unroll
      for (int d = 0; d < kGuesses; ++d)
        if (guesses[d] >= 0) {
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
              fetch(pack_at(in_slot(guesses[d]), p.state.stride[2], r, c));
        }
    }
  }
  begin();

  const auto resolve = [&](int i) {
    RowPlan plan;
    if constexpr (kOne) {
      const int64_t in = p.in.given() ? near_index(p.in, first + i, 0) : first + i;
      const int64_t out = p.one_out.given() ? near_index(p.one_out, first + i, 0) : in;
      const bool pad = p.slots.pad.is_pad(in) || (p.one_out.given() && p.slots.pad.is_pad(out));
      plan = {pad ? -1 : int(in), int(out), 1, -1, -1};
    } else {
      const RowSlots s = row_slots(p, first + i);
      plan = {s.pad ? -1 : int(s.in), int(s.out), s.tokens, int(s.intermediate), int(s.start)};
    }
    return plan;
  };
  const auto source_of = [&](const RowPlan &plan) {
    return !kOne && plan.start >= 0 ? after_token(plan.intermediate, plan.start) : in_slot(plan.in);
  };
  __shared__ RowPlan plans[kWalks ? kMostWalk : 1];
  extern __shared__ float4 shared[];
  uint4 *const ring = reinterpret_cast<uint4 *>(shared) + p.ring + threadIdx.x;
  const auto in_ring = [&](int i, int r, int c) {
    return ring + ((i % (kRing ? kAhead : 1) * kRows + r) * kChunks + c) * kChannelsThreads;
  };
  uint4 raw[kRows][kChunks];
  const auto fetch_states = [&](const RowPlan &plan, int i) {
    if (plan.in < 0) return;
    char *const source = source_of(plan);
    const int row_stride = !kOne && plan.start >= 0 ? p.intermediate.stride[3] : p.state.stride[2];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const void *const from = pack_at(source, row_stride, r, c);
        if constexpr (kRing)
          copy_ahead(in_ring(i, r, c), from);
        else
          raw[r][c] = __ldcs(static_cast<const uint4 *>(from));
      }
  };
  const auto close_fetch = [&] {
    if constexpr (kRing) asm volatile("cp.async.commit_group;" ::: "memory");
  };

  // What a lane brings for its own row and token: bits first, so that a dtype known only when
  // running does not make one load wait for another.
  struct TokenBits {
    uint32_t x, z, dt;
  };
  const auto fetch_token = [&](int i, int t) {
    const auto at = [&](const char *from, const Near<4> &v) {
      if (kWalks) from += int64_t(i) * v.stride[0];
      return kOne ? from : from + int64_t(t) * v.stride[1];
    };
    TokenBits bits;
    bits.dt = load_bits(at(dt_at, p.dt), p.dt.dtype);
    bits.x = load_near<X>(at(x_at, p.x));
    bits.z = load_near<X>(at(z_at, p.z));
    return bits;
  };
  Pack<X, K> B_bits[kChunks], C_bits[kChunks];
  const auto fetch_coefficients = [&](int t) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      B_bits[c] = load_pack<X, K>(coefficients_at(p.B, 0, t, pack_of(c)));
      C_bits[c] = load_pack<X, K>(coefficients_at(p.C, 0, t, pack_of(c)));
    }
  };

  RowPlan plan;
  if constexpr (kWalks) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) fetch_states({guesses[d], 0, 0, 0, -1}, d);
  } else {
    plan = resolve(0);
    fetch_states(plan, 0);
    fetch_coefficients(0);
  }
  TokenBits bits = fetch_token(0, 0);
  Pack<float, K> rate[kRows][kChunks];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) rate[r][c] = load_pack<float, K>(rate_at(r, c));
  const uint32_t D_bits = load_given(p.D.at(head, own_row), p.D.dtype);
  const uint32_t bias_bits = load_given(p.dt_bias.at(head, own_row), p.dt_bias.dtype);

  const int padded = kTight ? lanes * K : p.padded, ntokens = kOne ? 1 : p.ntokens;
  if constexpr (kWalks) {
    if (int(threadIdx.x) < batch_rows) plans[threadIdx.x] = resolve(threadIdx.x);
    const int packs = kTight ? lanes : p.packs;
    for (int j = threadIdx.x; j < batch_rows * ntokens * packs; j += kChannelsThreads) {
      const int token = j / packs, pack = j - token * packs, i = token / ntokens;
      const auto stage = [&](const Near<4> &v, float *row) {
        float values[K];
        widen(load_pack<X, K>(coefficients_at(v, i, token - i * ntokens, pack)), values);
#pragma unroll
        for (int k = 0; k < K; k += 4)
          *reinterpret_cast<float4 *>(row + place<K>(pack * K + k, padded)) =
              make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
      };
      float *const row = reinterpret_cast<float *>(shared) + token * 2 * padded;
      stage(p.B, row);
      stage(p.C, row + padded);
    }
    __syncthreads();
  }
  if (past_end) return;

  if constexpr (kWalks) {
    plan = plans[0];
    bool right = true;
#pragma unroll
    for (int d = 0; d < kAhead; ++d)
      if (d < batch_rows) right &= plans[d].in == guesses[d] && (kOne || plans[d].start < 0);
    if (!right) {
      if constexpr (kRing) wait_for_copies();
#pragma unroll
      for (int d = 0; d < kAhead; ++d)
        if (d < batch_rows) fetch_states(plans[d], d);
    }
#pragma unroll
    for (int d = 0; d < kAhead; ++d) close_fetch();
  }
  const float D = value_of(D_bits, p.D.dtype);
  // Without a bias what changes no bit.
  const float bias = p.dt_bias.given() ? value_of(bias_bits, p.dt_bias.dtype) : -0.0f;
  const uint32_t first_token = shared_address(shared) + (kTight ? lane * 16 : 0);

  for (int i = 0; i < batch_rows; ++i) {
    const auto store_output = [&](int t, float value) {
      char *to = kWalks ? out_at + int64_t(i) * p.out.stride[0] : out_at;
      if (!kOne) to += int64_t(t) * p.out.stride[1];
      if (stores) store_near(to, narrow<X>(value));
    };
    const auto zero_output = [&](int from_token) {
#pragma unroll 1
      for (int t = from_token; t < ntokens; ++t) store_output(t, 0.0f);
    };

    if (kWalks && i > 0) plan = plans[i];
    if constexpr (kRing) asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
    float h[kRows][kChunks][K];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint4 v = kRing ? *in_ring(i, r, c) : raw[r][c];
        widen(reinterpret_cast<const Pack<S, K> &>(v), h[r][c]);
      }
    if constexpr (kWalks) {
      if (i + kAhead < batch_rows) fetch_states(plans[i + kAhead], i + kAhead);
      close_fetch();
      if (!kOne && i + 1 < batch_rows) bring_tokens(i + 1);
    }
    const auto fetch_next_row = [&] {
      if (kWalks && i + 1 < batch_rows) bits = fetch_token(i + 1, 0);
    };
    const int tokens = kOne ? 1 : plan.in < 0 ? 0 : plan.tokens;
    if (kOne ? plan.in < 0 : tokens == 0) fetch_next_row();
    if (plan.in < 0) {
      zero_output(0);
      continue;
    }

    const auto keep = [&](char *to, int row_stride) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          if (exists(r, c))
            store_pack_once(reinterpret_cast<S *>(pack_at(to, row_stride, r, c)),
                            narrow_pack<S>(h[r][c]));
    };
    uint32_t token_at = first_token + i * ntokens * padded * 8;
    for (int t = 0; t < tokens; ++t, token_at += padded * 8) {
      const float dt_now = dtype_for<X> == DType::kF16 ? value_of(bits.dt, p.dt.dtype)
                                                       : __uint_as_float(bits.dt << p.dt_shift);
      const float x = widen_bits<X>(bits.x), z = widen_bits<X>(bits.z);
      if (!kOne && t + 1 < tokens)
        bits = fetch_token(i, t + 1);
      else
        fetch_next_row();
      const float dt = transform_dt(p.dt_transform, dt_now + bias);
      const float decay = dt * kLog2e, input = dt * x;
      // Without D not 0 x: x may be infinite.
      const float skip = p.D.given() ? __fmul_rn(D, x) : 0.0f;
      const float gate = p.z.given() ? silu(z) : 1.0f;

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
        if constexpr (kWalks) {
          const uint32_t at = token_at + (kTight ? 0 : pack_of(c) * 16);
#pragma unroll
          for (int k = 0; k < K; k += 4) {
            load_shared(at + (k ? padded * 2 : 0), B + k);
            load_shared(at + padded * 4 + (k ? padded * 2 : 0), C + k);
          }
        } else {
          widen(B_bits[c], B);
          widen(C_bits[c], C);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float sum = y[r];
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const float a = exp2_fast(decays[r] * rate[r][c].v[k]);
            h[r][c][k] = fmaf(a, h[r][c][k], inputs[r] * B[k]);
            sum = fmaf(h[r][c][k], C[k], sum);
          }
          if (kTight || c * lanes + lane < p.packs) y[r] = sum;
        }
      }
      if (!kOne && !kWalks && t + 1 < tokens) fetch_coefficients(t + 1);
      sum_lanes<kRows>(y, lane, lanes);
      store_output(t, (y[0] + skip) * gate);

      if constexpr (!kOne) {
        if (plan.intermediate >= 0)
          keep(after_token(plan.intermediate, t), p.intermediate.stride[3]);
        if (p.slots.out_per_token && !p.slots.keep_state) {
          const int64_t slot = read_index(p.slots.out, first + i, t);
          if (!p.slots.pad.is_pad(slot)) keep(in_slot(int(slot)), p.state.stride[2]);
        }
      }
    }

    if (!kOne) zero_output(tokens);
    if (p.slots.keep_state || (!kOne && p.slots.out_per_token)) continue;
    // Without tokens a state that stays where it is is left alone.
    char *const to = in_slot(plan.out);
    if (!kOne && tokens == 0 && source_of(plan) == to) continue;
    keep(to, p.state.stride[2]);
  }
}

}  // namespace ssmk::cuda
