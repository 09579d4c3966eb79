// SPDX-License-Identifier: MIT
// Decode of Mamba-1 and 2 on packed states: the fast path of state_update_heads.cuh.
//
// A thread updates one pack in each of kRows rows p, or several packs of one row, in registers.
// What a row needs beside its states (dt', the decay, dt' x, D x, the gate) is computed by the
// lanes that will store its output, and handed to the row's other lanes by shuffles.  Values come
// as raw bits first, so that a dtype known only when running does not make one load wait for
// another.  The arithmetic is that of update_heads(), operation by operation.
#pragma once

#include "cuda/slots.cuh"
#include "cuda/state_update_lanes.cuh"

namespace ssmk::cuda {

// A view with strides in bytes that fit 32 bits: index * stride is one instruction, in 64 bits.
template <int Rank>
struct Near {
  char *data = nullptr;
  int32_t stride[Rank] = {};
  DType dtype = DType::kNone;

  __device__ bool given() const { return dtype != DType::kNone; }
  template <class... Index>
  __device__ __forceinline__ char *at(Index... index) const {
    const int i[] = {int(index)...};
    char *to = data;
#pragma unroll
    for (unsigned k = 0; k < sizeof...(Index); ++k) to += int64_t(i[k]) * stride[k];
    return to;
  }
};

// What the kernel needs of a StateUpdateProblem.
struct PackedProblem {
  Near<4> x, dt, z, out;
  Near<3> A;
  Near<4> B, C;
  Near<2> D, dt_bias;
  Near<4> state;
  Near<5> intermediate;
  Slots slots;
  DtTransform dt_transform;
  int64_t first_batch;
  int first_head, ntokens, headdim, heads_per_group, packs, log_lanes;
};

enum class Work {
  kOne,  // one token, from slot to slot, nothing else asked for
  kAny,
};

__device__ __forceinline__ uint32_t load_bits(const char *p, DType dtype) {
  return dtype == DType::kF32 ? *reinterpret_cast<const uint32_t *>(p)
                              : *reinterpret_cast<const uint16_t *>(p);
}
__device__ __forceinline__ float value_of(uint32_t bits, DType dtype) {
  return dtype == DType::kF32    ? __uint_as_float(bits)
         : dtype == DType::kBF16 ? __uint_as_float(bits << 16)
                                 : __half2float(__ushort_as_half(uint16_t(bits)));
}

// K neighbours of a dtype known when running: 16-bit ones, or any if K is 4.  Aligned to 16 bytes,
// or to 8 if that is what they fill.
template <int K>
__device__ __forceinline__ uint4 load_bits_pack(const char *row, int pack, DType dtype) {
  if (K == 4 && dtype != DType::kF32) {
    const uint2 v = reinterpret_cast<const uint2 *>(row)[pack];
    return {v.x, v.y, 0, 0};
  }
  return reinterpret_cast<const uint4 *>(row)[pack];
}
template <int K>
__device__ __forceinline__ void values_of(const uint4 &bits, DType dtype, float (&to)[K]) {
  const uint32_t w[4] = {bits.x, bits.y, bits.z, bits.w};
  if (K == 4 && dtype == DType::kF32) {
#pragma unroll
    for (int i = 0; i < K; ++i) to[i] = __uint_as_float(w[i % 4]);
  } else if (dtype == DType::kBF16) {
#pragma unroll
    for (int i = 0; i < K; i += 2) {
      to[i] = __uint_as_float(w[i / 2] << 16);
      to[i + 1] = __uint_as_float(w[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < K; i += 2) {
      const float2 v = __half22float2(*reinterpret_cast<const __half2 *>(&w[i / 2]));
      to[i] = v.x, to[i + 1] = v.y;
    }
  }
}

// What a lane brings for its own row and token, and the packs of B and C, as bits.
template <int kChunks>
struct TokenBits {
  uint32_t x, dt, z;
  uint4 B[kChunks], C[kChunks];
};

// Threads on a multiprocessor: as many as the registers that the states take leave room for.
constexpr int threads_wanted(int states, bool one_decay, Work work) {
  if (work == Work::kAny) return one_decay || states < 16 ? 512 : 256;
  if (!one_decay) states *= 2;
  return states <= 16 ? 1024 : states <= 24 ? 768 : 512;
}

template <class S, int kRows, int kChunks, bool kOneDecay, Work kWork, int kThreads>
__global__ void __launch_bounds__(
    kThreads, threads_wanted(kRows *kChunks *kPack<S>, kOneDecay, kWork) / kThreads)
    update_packed(const __grid_constant__ PackedProblem p) {
  constexpr int K = kPack<S>;
  constexpr bool kOne = kWork == Work::kOne;
  static_assert(kRows == 1 || kChunks == 1);
  wait_for_earlier_kernels();

  const int lanes = 1 << p.log_lanes, lane = threadIdx.x & (lanes - 1);
  const int apart = 32 >> p.log_lanes;  // a warp's rows are neighbours
  const int row0 = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * (apart * kRows) +
                   (threadIdx.x % 32 >> p.log_lanes);
  const int head = p.first_head + blockIdx.y;
  const int group = p.heads_per_group == 1 ? head : head / p.heads_per_group;
  const int64_t b64 = p.first_batch + blockIdx.z;
  const int b = int(b64);
  // The row that this lane prepares and stores: kRows <= lanes.
  constexpr int kLogRows = kRows == 4 ? 2 : kRows == 2 ? 1 : 0;
  const int share = p.log_lanes - kLogRows;  // log2 of the lanes that prepare one row
  const int own = kRows == 1 ? row0 : row0 + (lane >> share) * apart;
  const bool stores = own < p.headdim && (lane & ((1 << share) - 1)) == 0;

  const RowSlots slots = kOne ? one_slot(p, b64) : row_slots(p, b64);
  const auto zero_output = [&](int from_token) {
    for (int t = from_token; t < p.ntokens; ++t)
      if (stores) store(p.out.at(b, t, head, own), p.out.dtype, 0.0f);
  };
  if (slots.pad) return zero_output(0);

  // States are asked for.
  const auto here = [&](int r, int c) {
    return row0 + r * apart < p.headdim && c * lanes + lane < p.packs;
  };
  // This thread's packs of the head's states at `base`.
  const auto packs_at = [&](char *base, int32_t row) {
    return reinterpret_cast<S *>(base + int64_t(row0) * row) + lane * K;
  };
  const auto in_slot = [&](int64_t slot) {
    return packs_at(p.state.at(int(slot), head), p.state.stride[2]);
  };
  const auto after_token = [&](int64_t row, int64_t t) {
    return packs_at(p.intermediate.at(int(row), int(t), head), p.intermediate.stride[3]);
  };
  const bool rolled_back = !kOne && slots.start >= 0;
  S *const source = rolled_back ? after_token(slots.intermediate, slots.start) : in_slot(slots.in);
  const int64_t source_apart =
      int64_t(apart) * (rolled_back ? p.intermediate.stride[3] : p.state.stride[2]) / int(sizeof(S));
  Pack<S, K> raw[kRows][kChunks] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (here(r, c)) raw[r][c] = load_pack_once<S, K>(source + r * source_apart + c * lanes * K);

  const bool owns = own < p.headdim;
  const auto load_token = [&](int t) {
    TokenBits<kChunks> bits = {};
    if (owns) {
      bits.dt = load_bits(p.dt.at(b, t, head, own), p.dt.dtype);
      bits.x = load_bits(p.x.at(b, t, head, own), p.x.dtype);
      if (p.z.given()) bits.z = load_bits(p.z.at(b, t, head, own), p.z.dtype);
    }
    const char *const B = p.B.at(b, t, group), *const C = p.C.at(b, t, group);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int pack = c * lanes + lane;
      if (pack < p.packs) {
        bits.B[c] = load_bits_pack<K>(B, pack, p.B.dtype);
        bits.C[c] = load_bits_pack<K>(C, pack, p.C.dtype);
      }
    }
    return bits;
  };
  const int tokens = kOne ? 1 : slots.tokens;
  TokenBits<kChunks> bits = {};
  if (tokens > 0) bits = load_token(0);
  uint32_t D_bits = 0, bias_bits = 0, A_bits = 0;
  if (owns) {
    if (kOneDecay) A_bits = load_bits(p.A.at(head, own), p.A.dtype);
    if (p.D.given()) D_bits = load_bits(p.D.at(head, own), p.D.dtype);
    if (p.dt_bias.given()) bias_bits = load_bits(p.dt_bias.at(head, own), p.dt_bias.dtype);
  }
  Pack<float, K> rate[kOneDecay ? 1 : kRows][kChunks] = {};
  if constexpr (!kOneDecay) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (here(r, c))
          rate[r][c] = load_pack<float, K>(
              reinterpret_cast<const float *>(p.A.at(head, row0 + r * apart)) +
              (c * lanes + lane) * K);
  }

  float h[kRows][kChunks][K];
  const auto spread_states = [&] {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) widen(raw[r][c], h[r][c]);
  };
  if (!kOne) spread_states();
  const auto keep = [&](S *to, int32_t row) {
    const int64_t step = int64_t(apart) * row / int(sizeof(S));
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (here(r, c)) store_pack_once(to + r * step + c * lanes * K, narrow_pack<S>(h[r][c]));
  };

  for (int t = 0; t < tokens; ++t) {
    // This lane's row.
    float dt = value_of(bits.dt, p.dt.dtype);
    const float x = value_of(bits.x, p.x.dtype);
    if (p.dt_bias.given()) dt += value_of(bias_bits, p.dt_bias.dtype);
    dt = transform_dt(p.dt_transform, dt);
    const float decay =
        kOneDecay ? exp2f(dt * (value_of(A_bits, p.A.dtype) * kLog2e)) : dt * kLog2e;
    const float input = dt * x;
    // Without D not 0 x: x may be infinite.
    const float skip = p.D.given() ? value_of(D_bits, p.D.dtype) * x : 0.0f;
    const float gate = p.z.given() ? silu(value_of(bits.z, p.z.dtype)) : 1.0f;

    float y[kRows] = {};
    float decays[kRows], inputs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      decays[r] = kRows == 1 ? decay : __shfl_sync(~0u, decay, r << share, lanes);
      inputs[r] = kRows == 1 ? input : __shfl_sync(~0u, input, r << share, lanes);
    }
    if (kOne) spread_states();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * lanes + lane >= p.packs) continue;
      float B[K], C[K];
      values_of<K>(bits.B[c], p.B.dtype, B);
      values_of<K>(bits.C[c], p.C.dtype, C);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const float a = kOneDecay ? decays[r] : exp2_fast(decays[r] * rate[r][c].v[i]);
          h[r][c][i] = fmaf(a, h[r][c][i], inputs[r] * B[i]);
          y[r] = fmaf(h[r][c][i], C[i], y[r]);
        }
    }
    if (!kOne && t + 1 < tokens) bits = load_token(t + 1);
    sum_lanes<kRows>(y, lane, lanes);
    if (stores)
      store(p.out.at(b, t, head, own), p.out.dtype, (y[0] + skip) * gate);

    if constexpr (!kOne) {
      if (slots.intermediate >= 0)
        keep(after_token(slots.intermediate, t), p.intermediate.stride[3]);
      if (p.slots.out_per_token && !p.slots.keep_state) {
        const int64_t slot = read_index(p.slots.out, b64, t);
        if (!p.slots.pad.is_pad(slot)) keep(in_slot(slot), p.state.stride[2]);
      }
    }
  }

  if (!kOne) zero_output(tokens);
  if (p.slots.keep_state || (!kOne && p.slots.out_per_token)) return;
  // Without tokens a state that stays where it is is left alone.
  S *const to = in_slot(slots.out);
  if (!kOne && tokens == 0 && source == to) return;
  keep(to, p.state.stride[2]);
}

}  // namespace ssmk::cuda
