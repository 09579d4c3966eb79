// SPDX-License-Identifier: MIT
// Decode of one token of Mamba-3 on packed states, of usual sizes: the fastest path of
// state_update_mamba3.cuh.
//
// One block owns a head of a batch row.  It asks for whatever depends on no slot, then for the
// states, which wait in shared memory, and for the small states.  Each warp has its own share of
// what the rows and columns of the head need: sines and cosines, keys and queries, coefficients.
// Then no thread waits for another: each takes its packs of kRows rows through registers, and the
// lanes of a row add up its output.
//   h[p,n] = a h[p,n] + sum_r (w_r[p] k'_r[n] + u_r[p] k_r[n]),   y_r[p] = sum_n h[p,n] q_r[n]
// Small values come as raw bits first, so that a dtype known only when running does not make one
// load wait for another.  The arithmetic is that of update_mamba3(), operation by operation.
#pragma once

#include "cuda/state_update_mamba3_parts.cuh"

namespace ssmk::cuda {

constexpr int kOneThreads = 128;

// Blocks on a multiprocessor: as measured on 9.0.  For other targets the compiler needs more
// registers for the same.
constexpr int one_blocks(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  return blocks / 2;
#else
  return blocks;
#endif
}

// Floats of a row's coefficients: the decay, nothing, then u and w of each rank.
template <int kRank>
constexpr int kCoefs = (2 + 2 * kRank + 3) / 4 * 4;

// Where things stand in shared memory, in floats: old keys, keys, queries; of each row its
// coefficients, and of each rank what the output needs; sines and cosines; the states.
template <int kRank, int kDstate>
struct OneRoom {
  static constexpr int keys = kRank * kDstate, queries = 2 * keys, coefs = 3 * keys;
  int finals, ends, turns, states;

  __host__ __device__ OneRoom(int rows, int nangles) {
    finals = coefs + kCoefs<kRank> * rows;
    ends = finals + 2 * kRank * rows;
    turns = ends + 2 * kRank * rows;
    states = turns + (2 * nangles + 3) / 4 * 4;
  }
};

// S: states.
template <class S, int kRank, int kDstate, int kRows, int kBlocks>
__global__ void __launch_bounds__(kOneThreads, one_blocks(kBlocks))
    update_mamba3_one(const __grid_constant__ Mamba3Packed p) {
  constexpr int K = kPack<S>, kLanes = kDstate / K, kApart = 32 / kLanes;
  constexpr int kBlockRows = kOneThreads / kLanes * kRows;
  // Rows whose sums are added up at a time: every lane gets that of one row and rank.
  constexpr int kGroup = kRows * kRank < kLanes ? kRows : kLanes / kRank;
  constexpr int kSums = kGroup * kRank;
  constexpr int kEach = kDstate / 4;  // fours of elements in a key
  constexpr int kQuads = 2 * kRank * kEach > kOneThreads ? 2 * kRank * kEach / kOneThreads : 1;
  static_assert(kLanes <= 32 && kRows % kGroup == 0 && kRank * kEach <= kOneThreads);
  extern __shared__ float4 shared[];
  begin();

  const int thread = threadIdx.x, row = thread ^ 64, angle = thread ^ 32;
  const int head = p.first_head + blockIdx.y, b = p.first_batch + blockIdx.z;
  const int group = group_of(p.groups_per_head, head);
  const int headdim = p.headdim, rows = p.passes * kBlockRows;
  const bool has_row = row < headdim, has_angle = angle < p.nangles;
  const OneRoom<kRank, kDstate> room(rows, p.nangles);
  float *const old_keys = reinterpret_cast<float *>(shared);
  float *const coefs = old_keys + room.coefs;
  float2 *const finals = reinterpret_cast<float2 *>(old_keys + room.finals);
  float2 *const ends = reinterpret_cast<float2 *>(old_keys + room.ends);
  float2 *const turns = reinterpret_cast<float2 *>(old_keys + room.turns);

  const int64_t in = p.in.given() ? load_index(p.in.at(b), p.in.dtype) : b;
  const int64_t out = p.one_out.given() ? load_index(p.one_out.at(b), p.one_out.dtype) : in;

  // Fours of elements of B (first) and C of all ranks: at, at + 1, at + apart, at + apart + 1.
  const int apart = p.rotary_half ? kDstate / 2 : 2;
  const auto rank_of = [&](int q) { return (thread + q * kOneThreads) / kEach; };
  const int first_at = thread % kEach * (p.rotary_half ? 2 : 4);
  QuadBits quads[kQuads] = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (rank_of(q) >= 2 * kRank) continue;
    const bool query = rank_of(q) >= kRank;
    const int r = rank_of(q) - (query ? kRank : 0);
    const Stepped<5> &from = p.projected[query];
    const char *const at = from.at(b, 0, r, group, first_at);
    quads[q].value[0] = load_two(at, from.dtype);
    quads[q].value[1] = load_two(at + apart * from.stride[4], from.dtype);
    const Stepped<3> &bias = p.bias[query];
    if (!bias.given()) continue;
    const char *const bias_at = bias.at(head, r, first_at);
    quads[q].bias[0] = load_two(bias_at, bias.dtype);
    quads[q].bias[1] = load_two(bias_at + apart * bias.stride[2], bias.dtype);
  }
  AngleBits angle_bits = {};
  if (has_angle) {
    angle_bits.angle = bits_at(p.angles, b, 0, head, angle);
    angle_bits.dt = bits_at(p.dt, b, 0, head, 0);
    if (p.dt_bias.given()) angle_bits.bias = bits_at(p.dt_bias, head, 0);
  }
  RowBits<kRank> bits = {};
  if (has_row) {
    bits.dt = bits_at(p.dt, b, 0, head, row);
    bits.rate = p.adt.given() ? bits_at(p.adt, b, 0, head) : bits_at(p.A, head, row);
    bits.trap = bits_at(p.trap, b, 0, head);
    bits.x = bits_at(p.x, b, 0, head, row);
    if (p.dt_bias.given()) bits.bias = bits_at(p.dt_bias, head, row);
    if (p.z.given()) bits.z = bits_at(p.z, b, 0, head, row);
    if (p.D.given()) bits.D = bits_at(p.D, head, row);
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      if (p.mimo_x.given()) bits.psi[r] = bits_at(p.mimo_x, head, r, row);
      if (p.mimo_z.given()) bits.zeta[r] = bits_at(p.mimo_z, head, r, row);
      if (p.mimo_out.given()) bits.phi[r] = bits_at(p.mimo_out, head, r, row);
    }
  }

  if (p.slots.pad.is_pad(in) || (p.one_out.given() && p.slots.pad.is_pad(out))) {
    for (int r = 0; has_row && r < (p.mimo_out.given() ? 1 : kRank); ++r)
      store_at(p.out, 0.0f, b, 0, r, head, row);
    return;
  }

  // Rows of this thread: a warp's are neighbours.  Those past the end read the last one again, and
  // neither store nor touch another row's sums.
  const int lane = thread % kLanes;
  const int mine = thread / 32 * (kApart * kRows) + thread % 32 / kLanes;
  uint4 *const waiting = reinterpret_cast<uint4 *>(old_keys + room.states) + thread;
  const char *const source = p.state.at(in, head) + lane * 16;
#pragma unroll 1
  for (int pass = 0; pass < p.passes; ++pass)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      copy_ahead(
          waiting + (pass * kRows + i) * kOneThreads,
          step(source, min(pass * kBlockRows + mine + i * kApart, headdim - 1), p.state.stride[2]));
  // The same thread reads and writes these.
  uint2 key_bits[2] = {};
  const bool has_key = rank_of(0) < kRank;
  if (has_key) {
    const char *const at = p.k_state.at(in, rank_of(0), head, first_at);
    key_bits[0] = load_two(at, p.k_state.dtype);
    key_bits[1] = load_two(at + apart * p.k_state.stride[3], p.k_state.dtype);
  }
  const uint32_t theta_bits = has_angle ? bits_at(p.angle_state, in, head, angle) : 0u;
  if (has_row) bits.before = bits_at(p.v_state, in, head, row);

  const auto dt_of = [&](uint32_t dt_bits, uint32_t bias_bits) {
    float dt = value_of(dt_bits, p.dt);
    if (p.dt_bias.given()) dt += value_of(bias_bits, p.dt_bias);
    return transform_dt(p.dt_transform, dt);
  };
  const bool writes = !p.slots.keep_state;
  if (has_angle) {
    const float turn =
        tanhf(value_of(angle_bits.angle, p.angles)) * dt_of(angle_bits.dt, angle_bits.bias);
    const float theta = turned(value_of(theta_bits, p.angle_state), turn);
    if (writes) store_at(p.angle_state, theta, out, head, angle);
    float2 both;
    sine_cosine(theta, &both.x, &both.y);
    turns[angle] = both;
  }
  if (has_row) {
    const float x = value_of(bits.x, p.x), before = value_of(bits.before, p.v_state);
    const float z = value_of(bits.z, p.z), D = value_of(bits.D, p.D);
    const float dt = dt_of(bits.dt, bits.bias);
    const float decay = p.adt.given() ? exp2_fast(value_of(bits.rate, p.adt) * kLog2e)
                                      : exp2_fast(dt * (value_of(bits.rate, p.A) * kLog2e));
    const Trapezoid f = trapezoid(p.trap_sigmoid, value_of(bits.trap, p.trap));
    float *const to = coefs + row * kCoefs<kRank>;
    to[0] = decay;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const float psi = p.mimo_x.given() ? value_of(bits.psi[r], p.mimo_x) : 1.0f;
      float gate = 1.0f;
      if (p.z.given())
        gate = silu(p.mimo_z.given() ? __fmul_rn(value_of(bits.zeta[r], p.mimo_z), z) : z);
      *reinterpret_cast<float2 *>(to + 2 + 2 * r) = {new_coefficient(f, dt, psi * x),
                                                     old_coefficient(f, dt, decay, psi * before)};
      finals[r * rows + row] = {psi * x, gate};
      ends[r * rows + row] = {D, value_of(bits.phi[r], p.mimo_out)};
    }
    if (writes) store_at(p.v_state, x, out, head, row);
  }
  __syncthreads();

#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (rank_of(q) >= 2 * kRank) continue;
    const bool query = rank_of(q) >= kRank;
    const DType dtype = p.projected[query].dtype;
    float2 one = two_values(quads[q].value[0], dtype), two = two_values(quads[q].value[1], dtype);
    if (const Stepped<3> &bias = p.bias[query]; bias.given()) {
      const float2 more = two_values(quads[q].bias[0], bias.dtype);
      const float2 still = two_values(quads[q].bias[1], bias.dtype);
      one.x += more.x, one.y += more.y, two.x += still.x, two.y += still.y;
    }
    turn_quad(&one, &two, p.rotary_half, thread % kEach * 2, p.nangles, turns);
    float *const to = old_keys + rank_of(q) * kDstate;  // keys, then queries
    *reinterpret_cast<float2 *>(to + room.keys + place<K>(first_at, kDstate)) = one;
    *reinterpret_cast<float2 *>(to + room.keys + place<K>(first_at + apart, kDstate)) = two;
    if (q > 0 || !has_key) continue;
    *reinterpret_cast<float2 *>(to + place<K>(first_at, kDstate)) =
        two_values(key_bits[0], p.k_state.dtype);
    *reinterpret_cast<float2 *>(to + place<K>(first_at + apart, kDstate)) =
        two_values(key_bits[1], p.k_state.dtype);
    if (!writes) continue;
    char *const at = p.k_state.at(out, rank_of(0), head, first_at);
    store_two(at, p.k_state.dtype, one);
    store_two(at + apart * p.k_state.stride[3], p.k_state.dtype, two);
  }
  wait_for_copies();
  __syncthreads();

  // Of rank and lane: keys before, keys, queries.
  const auto read_part = [&](int from, int r, float (&to)[K]) {
    read_row<K>(old_keys + from + r * kDstate, lane, kDstate, to);
  };
  for (int pass = 0; pass < p.passes; ++pass) {
    const int row0 = pass * kBlockRows + mine;
    const float *const coef = coefs + row0 * kCoefs<kRank>;
    char *const target = step(p.state.at(out, head) + lane * 16, row0, p.state.stride[2]);
    const int row_step = p.state.stride[2] * kApart;
    const auto read_states = [&](int i, float (&h)[K]) {
      widen_pack<S>(waiting[(pass * kRows + i) * kOneThreads], h);
    };
    const auto keep = [&](int i, const float (&h)[K]) {
      if (writes && row0 + i * kApart < headdim)
        store_pack_once(reinterpret_cast<S *>(step(target, i, row_step)), narrow_pack<S>(h));
    };
    // Of each four its own sum, then together.
    const auto multiply = [&](const float (&h)[K], const float (&query)[K]) {
      float fours[K / 4] = {};
#pragma unroll
      for (int e = 0; e < K; ++e) fours[e / 4] = fmaf(h[e], query[e], fours[e / 4]);
      return K == 8 ? fours[0] + fours[K / 8] : fours[0];
    };
    // The sums of kGroup rows from number `from` on to out.
    const auto finish = [&](int from, float (&sums)[kSums]) {
      const int item = sum_neighbours<kSums>(sums, lane, kLanes);
      const int r = item % kRank, own = row0 + (from + item / kRank) * kApart;
      const float2 final = finals[r * rows + own], end = ends[r * rows + own];
      float y = sums[0];
      if (p.D.given()) y = fmaf(end.x, final.x, y);
      y *= final.y;
      if (p.mimo_out.given()) {
        y = __fmul_rn(end.y, y);
        // Other ranks are in the lanes that differ in the upper bits of the sums.
        const float first = y;
#pragma unroll
        for (int i = 1; i < kRank; ++i)
          y += __shfl_xor_sync(~0u, first, (i & 1) * (kSums / 2) | (i & 2) * (kSums / 8));
      }
      if (lane < kSums && own < headdim && (r == 0 || !p.mimo_out.given()))
        store_at(p.out, y, b, 0, r, head, own);
    };
    if constexpr (kRank == 1) {
      static_assert(kGroup == kRows);
      float before[K], key[K], query[K], sums[kSums];
      read_part(0, 0, before);
      read_part(room.keys, 0, key);
      read_part(room.queries, 0, query);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float h[K];
        read_states(i, h);
        // The decay, nothing, u and w.
        const float4 c = *reinterpret_cast<const float4 *>(coef + i * kApart * kCoefs<kRank>);
#pragma unroll
        for (int e = 0; e < K; ++e) h[e] = fmaf(c.z, key[e], fmaf(c.w, before[e], h[e] * c.x));
        sums[i] = multiply(h, query);
        keep(i, h);
      }
      finish(0, sums);
    } else {
      float h[kRows][K];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        read_states(i, h[i]);
        const float decay = coef[i * kApart * kCoefs<kRank>];
#pragma unroll
        for (int e = 0; e < K; ++e) h[i][e] *= decay;
      }
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        float before[K], key[K];
        read_part(0, r, before);
        read_part(room.keys, r, key);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float2 c =
              *reinterpret_cast<const float2 *>(coef + i * kApart * kCoefs<kRank> + 2 + 2 * r);
#pragma unroll
          for (int e = 0; e < K; ++e) h[i][e] = fmaf(c.x, key[e], fmaf(c.y, before[e], h[i][e]));
        }
      }
#pragma unroll
      for (int from = 0; from < kRows; from += kGroup) {
        float sums[kSums];
#pragma unroll
        for (int r = 0; r < kRank; ++r) {
          float query[K];
          read_part(room.queries, r, query);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) sums[i * kRank + r] = multiply(h[from + i], query);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) keep(from + i, h[from + i]);
        finish(from, sums);
      }
    }
  }
}

}  // namespace ssmk::cuda
