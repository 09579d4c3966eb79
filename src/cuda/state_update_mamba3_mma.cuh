// SPDX-License-Identifier: MIT
// Decode of Mamba-3 on tensor cores: up to four tokens of one rank or of four ranks of a bfloat16
// model with 128 states.
//
// With a_t the decay, and now_t and then_t the steps times the parts of the trapezoid, of token t:
//     h_T = (a_0 ... a_T-1) h + sum_j c_j u_j k_j
//     y_t = (a_0 ... a_t) h q_t + sum_(j <= t) c_tj u_j (k_j q_t)
// over j = the token before the first, 0, ..., T - 1 (and over all ranks); u_j = psi x_j; c_tj is
// now_t for j = t, else (now_j + then_j+1) a_j+1 ... a_t; c_j is that for T - 1, and the end.  So
// the states meet queries and keys in two matrix products, and nothing else but one multiply-add.
//
// All factors enter as bfloat16 values that add up to them exactly: three of a float32, one of what
// is bfloat16 in memory (states, the key before).  Of the products of two such sums those below
// 2^-24 of the whole are left out.  What is infinite in a factor gives NaN.
//
// A block owns a head of a batch row.  Each warp has 16 rows p: lane 4 r + q has a pack of rows 2 r
// and 2 r + 1 in every quarter q of a group of states.  Of four ranks, lane q has rank q.
#pragma once

#include "cuda/state_update_mamba3_mma_parts.cuh"

namespace ssmk::cuda {

template <class S, int kRank, int kTokens, int kBlocks>
__global__ void __launch_bounds__(kMma3Threads, kBlocks)
    update_mamba3_mma(const __grid_constant__ Mamba3Mma p) {
  constexpr bool kWide = sizeof(S) == 4, kMimo = kRank > 1, kMany = kMimo && kTokens > 1;
  constexpr int kGroups = kMma3States * int(sizeof(S)) / 64;  // packs of a row in a lane
  constexpr int kMatrices = 16 / kGroups;                     // of 8 columns, in a group
  constexpr int kOwn = kMany ? kTokens : 1;                   // keys that a warp makes
  constexpr int kAngles = kTokens > 1 ? kMma3Angles / 32 : 1;
  using X = __nv_bfloat16;
  using Rows = FactorRows<kMany>;
  static_assert(kRank == 1 || kRank == 4);
  using Room = MmaRoom<S, kMany, kTokens>;
  extern __shared__ uint4 shared[];
  uint32_t *const factors = reinterpret_cast<uint32_t *>(shared) + Room::factors;
  float2 *const turns = reinterpret_cast<float2 *>(factors + Room::turns);
  float *const steps = reinterpret_cast<float *>(factors + Room::steps);
  uint2 *const products = reinterpret_cast<uint2 *>(factors + Room::products);
  float *const coefs = reinterpret_cast<float *>(factors + Room::coefs);
  begin();

  const uint32_t flags = in_lanes(int(p.flags)), parts = in_lanes(int(p.parts));
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, r = lane >> 2,
            q = lane & 3;
  const int head = in_lanes(p.first_head + blockIdx.y), b = in_lanes(p.first_batch + blockIdx.z);
  const int group = group_of(p, head);
  const int row = warp * 16 + r * 2;
  const bool here = row < p.headdim;
  // Rows past the end read the first ones, and are not stored.
  const int safe = here ? row : 0;

  // What depends on no slot.  Where something is not given, something else is read.
  const RawSlot in_bits = load_slot(p.in, b, flags & kWideSlots);
  const RawSlot out_bits = load_slot(p.out_slots, b, flags & kWideOutSlots);
  const int tokens = int(count_of(p.num_tokens, b, p.ntokens));
  const int last = max(tokens - 1, 0);
  // A warp makes keys and queries of its token or rank, four elements a lane: at, at + 1, at +
  // apart and at + apart + 1.  Indices of tokens that there are not become those of the last one;
  // what it gives is dropped.
  const bool half = parts & kRotaryHalf;
  const int apart = half ? kMma3States / 2 : 2, first_at = lane * (half ? 2 : 4);
  const int own_rank = kMimo ? warp : 0;
  const auto token_of = [&](int i) { return kMany ? i : kMimo ? 0 : warp; };
  uint32_t value[kOwn][2][2];
  uint2 bias[2][2];
  {
    const char *const key_at = step(step(reach(p.B, b, 0, group), own_rank, p.B_rank), first_at, 2);
    const char *const query_at =
        step(step(reach(p.C, b, 0, group), own_rank, p.C_rank), first_at, 2);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int t = min(token_of(i), last);
      const char *const key = step(key_at, t, p.B.token);
      const char *const query = step(query_at, t, p.C.token);
      value[i][0][0] = load_word(key), value[i][0][1] = load_word(step(key, apart, 2));
      value[i][1][0] = load_word(query), value[i][1][1] = load_word(step(query, apart, 2));
    }
    const char *const key_bias = reach(p.key_bias, head, own_rank);
    const char *const query_bias = reach(p.query_bias, head, own_rank);
    bias[0][0] = load_two_either(key_bias, first_at, parts & kWideKeyBias);
    bias[0][1] = load_two_either(key_bias, first_at + apart, parts & kWideKeyBias);
    bias[1][0] = load_two_either(query_bias, first_at, parts & kWideQueryBias);
    bias[1][1] = load_two_either(query_bias, first_at + apart, parts & kWideQueryBias);
  }
  // Steps and angles: of a token by its warp; of the one token by the last warps.
  const auto angle_of = [&](int i) { return kTokens > 1 ? lane + 32 * i : thread ^ 96; };
  const int step_token = kTokens > 1 ? warp : 0, safe_step_token = min(step_token, last);
  const bool steps_here = kTokens > 1 || warp == 3 || angle_of(0) < p.nangles;
  uint32_t dt_bits, rate_bits, trap_bits, dt_bias_bits;
  if (steps_here) {
    dt_bits = load_either(reach(p.dt, b, safe_step_token, head), flags & kWideDt);
    rate_bits = load_either(reach(p.rate, b, safe_step_token, head), parts & kWideRate);
    trap_bits = load_either(reach(p.trap, b, safe_step_token, head), parts & kWideTrap);
    dt_bias_bits = load_either(reach(p.dt_bias, head), flags & kWideBias);
  }
  const uint32_t D_bits = load_either(reach(p.D, head), flags & kWideD);
  uint32_t angle_bits[kAngles], theta_bits[kAngles];
#pragma unroll
  for (int i = 0; i < kAngles; ++i) {
    angle_bits[i] = 0;
    const uint32_t wide = parts & kWideAngles;
    if (angle_of(i) < p.nangles)
      angle_bits[i] = load_either(
          step(reach(p.angles, b, safe_step_token, head), angle_of(i), wide ? 4 : 2), wide);
  }
  // Lane q has x and z of token q.
  const int lane_token = kTokens > 1 ? min(q, last) : 0;
  const uint32_t x_bits = load_word(step(reach(p.x, b, lane_token, head), safe, 2));
  const uint32_t z_bits = load_word(step(reach(p.z, b, lane_token, head), safe, 2));
  const auto of_token = [&](uint32_t bits, int t) {
    return two_bf16(kTokens > 1 ? __shfl_sync(~0u, bits, t, 4) : bits);
  };
  uint2 psi_bits = {}, zeta_bits = {}, phi_bits = {};
  if constexpr (kMimo) {
    psi_bits = load_two_either(reach(p.psi, head, q), safe, parts & kWidePsi);
    zeta_bits = load_two_either(reach(p.zeta, head, q), safe, parts & kWideZeta);
    phi_bits = load_two_either(reach(p.phi, head, q), safe, parts & kWidePhi);
  }

  const TiedSlots slots = slots_of(p, b, in_bits, out_bits);
  const bool writes = !(parts & kKeepState);
  char *const out_at = const_cast<char *>(reach(p.out, b, 0, head));
  const DType out_dtype = parts & kWideOut ? DType::kF32 : DType::kBF16;
  const auto store_out = [&](int t, int rank, float y0, float y1) {
    if (here)
      store_two(
          step(step(step(out_at, t, p.out.token), rank, p.out_rank), row, parts & kWideOut ? 4 : 2),
          out_dtype, {y0, y1});
  };
  if (slots.pad || tokens == 0) {
    if (q < (kMimo && !(parts & kHasPhi) ? kRank : 1))
      for (int t = 0; t < p.ntokens; ++t) store_out(t, q, 0.0f, 0.0f);
    if (!slots.pad && slots.in != slots.out && writes)
      copy_slot<S, kRank>(p, slots.in, slots.out, head);
    return;
  }

  // The states of this lane, which wait in shared memory where no other lane touches them; and what
  // stands beside them before the first token.
  uint4 *const waiting = shared + thread;
  constexpr int kRowBytes = kMma3States * int(sizeof(S));
  char *const state_at = step(step(p.state, head, p.state_head), safe * (kRowBytes / 16) + q, 16);
  {
    const char *const from = step(state_at, slots.in, p.state_slot);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        copy_ahead(waiting + (i * kGroups + g) * kMma3Threads, from + i * kRowBytes + g * 64);
  }
  const auto states = [&](int i, int g) { return waiting[(i * kGroups + g) * kMma3Threads]; };
  const uint32_t v_bits = load_word(step(reach(p.v_state, slots.in, head), safe, 2));
  uint32_t old_key[2] = {};
  const bool has_old = kMimo || warp == 0;
  const auto old_key_at = [&](int slot) {
    return step(step(reach(p.k_state, slot, head), own_rank, p.k_rank), first_at, 2);
  };
  if (has_old) {
    const char *const from = old_key_at(slots.in);
    old_key[0] = load_word(from), old_key[1] = load_word(step(from, apart, 2));
  }
#pragma unroll
  for (int i = 0; i < kAngles; ++i) {
    theta_bits[i] = 0;
    if (angle_of(i) < p.nangles)
      theta_bits[i] = load_word(step(reach(p.angle_state, slots.in, head), angle_of(i), 4));
  }

  // Steps and decays.  A token that there is not has none.
  float dt = 0.0f;
  if (steps_here) {
    dt = tied_dt<X>(p, dt_bits, dt_bias_bits);
    const float rate = either_value<X>(rate_bits, parts & kWideRate) * kLog2e;
    const Trapezoid f =
        trapezoid(parts & kTrapSigmoid, either_value<X>(trap_bits, parts & kWideTrap));
    const bool there = kTokens == 1 || step_token < tokens;
    const float decay = exp2_fast(parts & kHasAdt ? rate : dt * rate);
    if (lane == 0 && (kTokens > 1 || warp == 3)) {
      coefs[step_token] = there ? decay : 1.0f;
      coefs[4 + step_token] = there ? f.now * dt : 0.0f;
      coefs[8 + step_token] = there ? f.then * dt : 0.0f;
    }
  }

  // Angles.
  float half_turns[kAngles];
#pragma unroll
  for (int i = 0; i < kAngles; ++i) {
    half_turns[i] = tanhf(either_value<X>(angle_bits[i], parts & kWideAngles)) * dt;
    if (kTokens > 1 && angle_of(i) < p.nangles)
      steps[warp * kMma3Angles + angle_of(i)] = half_turns[i];
  }
  if (kTokens > 1) __syncthreads();
#pragma unroll
  for (int i = 0; i < kAngles; ++i) {
    const int angle = angle_of(i);
    if (angle >= p.nangles || step_token >= tokens) continue;
    float theta = __uint_as_float(theta_bits[i]);
    if (kTokens == 1) {
      theta = turned(theta, half_turns[i]);
    } else {
#pragma unroll 1
      for (int t = 0; t <= warp; ++t) theta = turned(theta, steps[t * kMma3Angles + angle]);
    }
    if (writes && step_token == last)
      *reinterpret_cast<float *>(step(reach(p.angle_state, slots.out, head), angle, 4)) = theta;
    float2 turn;
    sine_cosine(theta, &turn.x, &turn.y);
    turns[step_token * kMma3Angles + angle] = turn;
  }
  // Where a token is all of a warp's, nobody else wants its angles.
  if (!kMimo)
    __syncwarp();
  else
    __syncthreads();

  // Keys and queries.
  const int word0 = word_place<S>(first_at / 2), word1 = word_place<S>((first_at + apart) / 2);
  const auto put = [&](int line, uint32_t one, uint32_t two) {
    factors[line * kFactorPitch + word0] = one;
    factors[line * kFactorPitch + word1] = two;
  };
  // Here one and two are the first and second elements of two pairs; words are of neighbours.
  const uint32_t first_words = half ? 0x3210 : 0x5410, second_words = half ? 0x7654 : 0x7632;
  // A copy that the compiler takes for another value: it keeps the four words of a fragment in
  // neighbouring registers, and else moves those that two fragments share back and forth.
  const uint32_t same = half ? 0x3210 : 0x7654;
  const auto copy = [&](uint32_t word) { return __byte_perm(word, word, same); };
  const bool turns_first = lane * 2 < p.nangles, turns_second = lane * 2 + 1 < p.nangles;
  float2 add[2][2];
#pragma unroll
  for (int query = 0; query < 2; ++query) {
    const uint32_t wide = parts & (query ? kWideQueryBias : kWideKeyBias);
    const float2 v = two_either(bias[query][0], wide), w = two_either(bias[query][1], wide);
    const bool has = parts & (query ? kHasQueryBias : kHasKeyBias);
    add[query][0] = {has ? v.x : 0.0f, has ? half ? v.y : w.x : 0.0f};
    add[query][1] = {has ? half ? w.x : v.y : 0.0f, has ? w.y : 0.0f};
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int t = token_of(i), index = kMany ? 4 * i + warp : warp;
    // Tokens that there are not: zeros, whatever stands there.
    if (kTokens > 1 && t >= tokens) {
#pragma unroll
      for (int part = 0; part < 3; ++part)
        put(Rows::key(part) + index, 0u, 0u), put(Rows::query(part) + index, 0u, 0u);
      continue;
    }
    const float4 turn = reinterpret_cast<const float4 *>(turns + t * kMma3Angles)[lane];
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      const uint32_t *const from = value[i][query];
      float2 one = two_bf16(__byte_perm(from[0], from[1], first_words));
      float2 two = two_bf16(__byte_perm(from[0], from[1], second_words));
      one.x += add[query][0].x, one.y += add[query][0].y;
      two.x += add[query][1].x, two.y += add[query][1].y;
      if (turns_first) turn_pair(&one.x, &two.x, turn.x, turn.y);
      if (turns_second) turn_pair(&one.y, &two.y, turn.z, turn.w);
      const PairParts a = split_two(one.x, one.y), c = split_two(two.x, two.y);
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const uint32_t low = __byte_perm(a.part[part], c.part[part], first_words);
        const uint32_t high = __byte_perm(a.part[part], c.part[part], second_words);
        put((query ? Rows::query(part) : Rows::key(part)) + index, low, high);
        if (query == 0 && part == 0 && writes && t == last) {
          char *const to = old_key_at(slots.out);
          *reinterpret_cast<uint32_t *>(to) = low;
          *reinterpret_cast<uint32_t *>(step(to, apart, 2)) = high;
        }
      }
    }
  }
  if (has_old) put(Rows::old + own_rank, old_key[0], old_key[1]);
  if (warp == 3) put(Rows::zero, 0u, 0u);
  wait_for_copies();
  __syncthreads();

  // Of four matrices, the line that this lane gives the address of.
  const int matrix = lane >> 3, line = lane & 7, pair = line >> 1, odd = line & 1;
  const uint32_t base = shared_address(factors);
  const auto address = [&](int line, int column) {
    return base + uint32_t(line * kFactorPitch * 4 + column * 16);
  };
  // Keys as rows.  Of one rank the old one and its tokens: of many tokens, that of the warp.  Of
  // one token of four ranks old and new in turns.
  const auto key_line = [&](int part) {
    const int first = Rows::key(part);
    if (kMimo && !kMany) return odd ? first + pair : part == 0 ? Rows::old + pair : Rows::zero;
    if (line == 0) return part == 0 ? Rows::old + own_rank : Rows::zero;
    if (line > kTokens) return Rows::zero + 0;
    return first + (kMany ? 4 * (line - 1) + warp : line - 1);
  };
  // Two matrices of keys high and mid; low, and zeros below.
  const uint32_t key_at = address(matrix & 1 ? key_line(1) : key_line(0), matrix >> 1);
  const uint32_t low_key_at = address(matrix & 1 ? Rows::zero + 0 : key_line(2), matrix >> 1);
  // Products h q and k q.  Of several tokens of four ranks, columns 2 i and 2 i + 1 of tile j are
  // rank i of tokens 2 j and 2 j + 1.  Else columns 2 i and 2 i + 1 of tile 0 are the first parts
  // of query i, and column 2 i of tile 1 is the third.
  float sums[2][4] = {}, dots[2][4] = {}, low_dots[2][4] = {};
  {
    const uint32_t query_at =
        kMany ? address(Rows::query(0) + 4 * ((matrix >> 1) * 2 + odd) + pair, matrix & 1)
              : address((matrix >> 1 ? Rows::query(2)
                         : odd       ? Rows::query(1)
                                     : Rows::query(0)) +
                            pair,
                        matrix & 1);
    constexpr int kPart = 16 * kFactorPitch * 4;
    constexpr int kQueryParts = kMany ? 3 : 1;
    uint4 h[2];
#pragma unroll 2
    for (int k = 0; k < 8; ++k) {
      uint32_t queries[kQueryParts][4], keys[4], low_keys[4];
#pragma unroll
      for (int part = 0; part < kQueryParts; ++part)
        load_matrices(queries[part], query_at + part * kPart + k * 32);
      load_matrices(keys, key_at + k * 32);
      load_matrices(low_keys, low_key_at + k * 32);
      // Part `left` of the left factor, with as many of the right one as matter.
      const auto multiply = [&](float (&to)[2][4], const uint32_t (&a)[4], int left) {
#pragma unroll
        for (int part = 0; part < (kMany ? 3 - left : 1); ++part)
#pragma unroll
          for (int j = 0; j < (kMany || left == 0 ? 2 : 1); ++j)
            mma_16(to[j], a[0], a[1], a[2], a[3], queries[part][2 * j], queries[part][2 * j + 1]);
      };
      if constexpr (kWide) {
        float w[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) widen_pack<float>(states(i, k), w[i]);
#pragma unroll
        for (int left = 0; left < 3; ++left) {
          const auto two = [&](int i, int e) {
            return upper_halves(__float_as_uint(w[i][e]), __float_as_uint(w[i][e + 1]));
          };
          const uint32_t a[4] = {two(0, 0), two(1, 0), two(0, 2), two(1, 2)};
          multiply(sums, a, left);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) w[i][e] = below_upper_half(w[i][e]);
        }
      } else {
        if (k % 2 == 0) h[0] = states(0, k / 2), h[1] = states(1, k / 2);
        const bool second = k % 2;
        const uint32_t a[4] = {copy(second ? h[0].z : h[0].x), copy(second ? h[1].z : h[1].x),
                               copy(second ? h[0].w : h[0].y), copy(second ? h[1].w : h[1].y)};
        multiply(sums, a, 0);
      }
      multiply(dots, keys, 0);
      multiply(low_dots, low_keys, 2);
    }
  }

  // The decays of all tokens, of those after token q, and of all together; then what stands before
  // the trapezoid's parts.
  float a[kTokens], after = 1.0f, all = 1.0f;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    a[t] = coefs[t];
    after *= t > q ? a[t] : 1.0f;
    all *= a[t];
  }
  const bool there = kTokens == 1 || q < tokens;
  // Of a token, with what the next one adds of it.
  const auto both_parts = [&](int t) {
    return t + 1 < kTokens ? coefs[4 + t] + coefs[8 + t + 1] : coefs[4 + t];
  };
  const float now = coefs[kTokens > 1 ? 4 + q : 4], first = coefs[8];
  const float old_factor = all * first;
  const auto of_rank = [&](uint2 bits, uint32_t has, uint32_t wide) {
    const float2 v = two_either(bits, parts & wide);
    return float2{parts & has ? v.x : 1.0f, parts & has ? v.y : 1.0f};
  };
  const float2 psi = kMimo ? of_rank(psi_bits, kHasPsi, kWidePsi) : float2{1.0f, 1.0f};
  const float2 v0 = two_bf16(v_bits);
  const float2 old_u = kMimo ? float2{psi.x * v0.x, psi.y * v0.y} : v0;
  const float D = either_value<X>(D_bits, flags & kWideD);
  const auto finish = [&](float *y, float u, float zeta, float z) {
    const float skipped = fmaf(D, u, *y);
    if (flags & kHasD) *y = skipped;
    const float gate = silu(kMimo ? __fmul_rn(zeta, z) : z);
    if (flags & kHasZ) *y *= gate;
  };
  const float2 zeta = kMimo ? of_rank(zeta_bits, kHasZeta, kWideZeta) : float2{1.0f, 1.0f};
  const float2 phi = kMimo ? of_rank(phi_bits, kHasPhi, kWidePhi) : float2{1.0f, 1.0f};

  // The coefficients of the keys, as words of both rows: (high, high), (mid, mid) and (high, low)
  // of one key, then (high, mid) and (low, 0) of an old one; of many tokens see there.
  uint32_t factor[kMany ? 7 : 3][4];
  if constexpr (!kMany) {
    // Of key r and query q.
    float dot = ((dots[0][0] + dots[0][1]) + (dots[0][2] + dots[0][3])) +
                ((dots[1][0] + dots[1][2]) + (low_dots[0][0] + low_dots[0][1]));
    float y[2] = {(sums[0][0] + sums[0][1]) + sums[1][0], (sums[0][2] + sums[0][3]) + sums[1][2]};
    const float2 x = two_bf16(x_bits);
    const float2 u = kMimo ? float2{psi.x * x.x, psi.y * x.y} : x;
    PairParts terms[2];  // of the new key in the low halves, of the old one in the high ones
    if constexpr (kMimo) {
      terms[0] = split_two(now * u.x, old_factor * old_u.x);
      terms[1] = split_two(now * u.y, old_factor * old_u.y);
      // Keys times queries in the place of keys: lines 2 q and 2 q + 1, old and new.
      const float old = __shfl_sync(~0u, dot, 8 * q + (r >> 1));
      const float fresh = __shfl_sync(~0u, dot, 8 * q + 4 + (r >> 1));
      const PairParts m = split_two(fresh, old);
      float more[4] = {};
      const auto term = [&](int i, int part) { return terms[i].part[part]; };
      mma_16(more, term(0, 0), term(1, 0), term(0, 0), term(1, 0), m.part[0], m.part[1]);
      mma_16(more, term(0, 0), term(1, 0), term(0, 1), term(1, 1), m.part[2], m.part[0]);
      mma_16(more, term(0, 1), term(1, 1), term(0, 2), term(1, 2), m.part[1], m.part[0]);
      y[0] = fmaf(all, y[0], more[0]), y[1] = fmaf(all, y[1], more[2]);
    } else {
      // The decays up to token q, and from token r to it.
      float upto = 1.0f, between = 1.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        upto *= t <= q ? a[t] : 1.0f;
        between *= t >= r && t <= q ? a[t] : 1.0f;
      }
      // c_tj for t = q and j = r - 1, times the product of the two.
      const float earlier = both_parts((r + 3) & 3);
      dot *= r == 0 ? first * upto : r - 1 == q ? now : earlier * between;
      y[0] *= upto, y[1] *= upto;
#pragma unroll
      for (int j = 0; j <= kTokens; ++j) {
        const float both = __shfl_sync(~0u, dot, j * 4 + q);
        const float2 of = j == 0 ? v0 : of_token(x_bits, j - 1);
        const float y0 = fmaf(both, of.x, y[0]), y1 = fmaf(both, of.y, y[1]);
        y[0] = j <= q + 1 ? y0 : y[0], y[1] = j <= q + 1 ? y1 : y[1];
      }
      const float own = after * both_parts(q);
      terms[0] = split_two(there ? own * x.x : 0.0f, old_factor * v0.x);
      terms[1] = split_two(there ? own * x.y : 0.0f, old_factor * v0.y);
    }
    const float2 z = two_bf16(z_bits);
    finish(&y[0], u.x, zeta.x, z.x), finish(&y[1], u.y, zeta.y, z.y);
    if (kMimo && parts & kHasPhi) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        y[i] = __fmul_rn(i ? phi.y : phi.x, y[i]);
        y[i] += __shfl_xor_sync(~0u, y[i], 1);
        y[i] += __shfl_xor_sync(~0u, y[i], 2);
      }
      if (q == 0) store_out(0, 0, y[0], y[1]);
    } else if (kMimo) {
      store_out(0, q, y[0], y[1]);
    } else if (q < p.ntokens) {
      store_out(q, 0, there ? y[0] : 0.0f, there ? y[1] : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PairParts &s = terms[i];
      factor[0][i] = __byte_perm(s.part[0], s.part[0], 0x1010);
      factor[0][2 + i] = __byte_perm(s.part[1], s.part[1], 0x1010);
      factor[1][i] = __byte_perm(s.part[0], s.part[2], 0x5410);
      const uint32_t high = upper_halves(s.part[0], s.part[1]), low = s.part[2] >> 16;
      factor[1][2 + i] = kMimo || q == 0 ? high : q == 1 ? low : 0u;
      factor[2][i] = low, factor[2][2 + i] = 0u;
    }
  } else {
    const float earlier = both_parts((r + 3) & 3);
    {
      // c_tj for j = r - 1 and all t, times key times query.
      float c[kTokens], run = r == 0 ? first : earlier;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        run *= t >= r ? a[t] : 1.0f;
        c[t] = t == r - 1 ? coefs[4 + t] : run;
      }
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) {
        const auto dot = [&](int e) { return dots[j][e] + (dots[j][2 + e] + low_dots[j][e]); };
        const PairParts m = split_two(dot(0) * c[2 * j], dot(1) * c[2 * j + 1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = 2 * j + e;
          if (r > t + 1) continue;
          uint2 *const to = products + (t * (t + 3) / 2 + r) * 32 + q * 8 + warp;
          const uint32_t twice = e ? 0x3232 : 0x1010;
          to[0] = {__byte_perm(m.part[0], m.part[0], twice),
                   __byte_perm(m.part[0], m.part[2], e ? 0x7632 : 0x5410)};
          to[4] = {__byte_perm(m.part[1], m.part[1], twice), 0u};
        }
      }
    }
    __syncthreads();

    float2 u[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float2 x = of_token(x_bits, t);
      u[t] = {psi.x * x.x, psi.y * x.y};
    }
    float more[kTokens][4] = {}, y[kTokens][2];
#pragma unroll
    for (int j = 0; j <= kTokens; ++j) {
      const float2 v = j ? u[j ? j - 1 : 0] : old_u;
      const PairParts s = split_two(v.x, v.y);
      const uint32_t w[4] = {
          __byte_perm(s.part[0], s.part[1], 0x5410), __byte_perm(s.part[0], s.part[1], 0x7632),
          __byte_perm(s.part[2], s.part[0], 0x5410), __byte_perm(s.part[2], s.part[0], 0x7632)};
#pragma unroll
      for (int t = j ? j - 1 : 0; t < kTokens; ++t) {
        const uint2 m = products[(t * (t + 3) / 2 + j) * 32 + lane];
        mma_16(more[t], w[0], w[1], w[2], w[3], m.x, m.y);
      }
    }
    float upto = 1.0f;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      upto *= a[t];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        y[t][i] = fmaf(upto, sums[t / 2][2 * i + t % 2], more[t][2 * i] + more[t][2 * i + 1]);
      const float2 z = of_token(z_bits, t);
      finish(&y[t][0], u[t].x, zeta.x, z.x), finish(&y[t][1], u[t].y, zeta.y, z.y);
      if (t >= tokens) y[t][0] = y[t][1] = 0.0f;
    }
    if (parts & kHasPhi) {
      // Over the ranks: lane q gets token q.
      float own[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float two[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float low = __fmul_rn(i ? phi.y : phi.x, y[e][i]);
          const float high = __fmul_rn(i ? phi.y : phi.x, y[2 + e][i]);
          two[e] = (q & 2 ? high : low) + __shfl_xor_sync(~0u, q & 2 ? low : high, 2);
        }
        own[i] = (q & 1 ? two[1] : two[0]) + __shfl_xor_sync(~0u, q & 1 ? two[0] : two[1], 1);
        // Zeros stay zeros, whatever phi is.
        if (!there) own[i] = 0.0f;
      }
      if (q < p.ntokens) store_out(q, 0, own[0], own[1]);
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (t < p.ntokens) store_out(t, q, y[t][0], y[t][1]);
    }

    // Of tokens 0 and 1, then of 2 and 3: (high, high), (high, mid) and (low, mid); of the old one
    // (high, mid) and (low, 0).
    float c[kTokens], later = 1.0f;
#pragma unroll
    for (int t = kTokens - 1; t >= 0; --t) c[t] = later * both_parts(t), later *= a[t];
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto term = [&](int t) { return t < tokens ? c[t] * (i ? u[t].y : u[t].x) : 0.0f; };
        const PairParts s = split_two(term(2 * j), term(2 * j + 1));
        factor[3 * j][i] = s.part[0], factor[3 * j][2 + i] = copy(s.part[0]);
        factor[3 * j + 1][i] = copy(s.part[0]), factor[3 * j + 1][2 + i] = copy(s.part[1]);
        factor[3 * j + 2][i] = s.part[2], factor[3 * j + 2][2 + i] = s.part[1];
      }
    const PairParts s = split_two(old_factor * old_u.x, old_factor * old_u.y);
    factor[6][0] = __byte_perm(s.part[0], s.part[1], 0x5410);
    factor[6][1] = __byte_perm(s.part[0], s.part[1], 0x7632);
    factor[6][2] = s.part[2] & 0xffff, factor[6][3] = s.part[2] >> 16;
  }
  if (here && writes && q == (kTokens > 1 ? last : 0))
    *reinterpret_cast<uint32_t *>(step(reach(p.v_state, slots.out, head), safe, 2)) = x_bits;

  // States.
  char *const to = step(state_at, slots.out, p.state_slot);
  const bool keeps = here && writes;
  const auto key_words = [&](int part, int pairs) {
    return Rows::key(part) + pair + (kMany ? 8 * pairs + 4 * odd : 0);
  };
  // Of one key: (high, mid) twice, (low, high), the old one; of many tokens (high, mid, low, high)
  // of two of them, and the old one for two matrices.
  const uint32_t keys_at =
      kMany ? address(matrix == 1   ? key_words(1, 0)
                      : matrix == 2 ? key_words(2, 0)
                                    : key_words(0, 0),
                      0)
            : address((matrix == 3   ? Rows::old + (kMimo ? pair : 0)
                       : matrix == 2 ? (odd ? Rows::key(0) : Rows::key(2)) + pair
                                     : (odd ? Rows::key(1) : Rows::key(0)) + pair),
                      0);
  const uint32_t old_at = address(Rows::old + pair, matrix >> 1);
#pragma unroll 1
  for (int m0 = 0; m0 < 16; m0 += 4) {
    float d[4][4] = {};
    uint32_t before[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const uint32_t from = keys_at + (m0 + m) * 16;
      const auto multiply = [&](const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_16(d[m], a[0], a[1], a[2], a[3], b0, b1);
      };
      uint32_t k[4];
      load_transposed(k, from);
      if constexpr (kMany) {
        multiply(factor[0], k[0], k[1]);
        multiply(factor[1], k[2], k[3]);
        multiply(factor[2], k[0], k[1]);
        load_transposed(k, from + 8 * kFactorPitch * 4);
        multiply(factor[3], k[0], k[1]);
        multiply(factor[4], k[2], k[3]);
        multiply(factor[5], k[0], k[1]);
        if (m % 2 == 0) load_transposed(before, old_at + (m0 + m) * 16);
        multiply(factor[6], before[m % 2 * 2], before[m % 2 * 2 + 1]);
      } else {
        multiply(factor[0], k[0], k[1]);
        multiply(factor[1], k[2], k[3]);
        if (kMimo) mma_8(d[m], factor[2][0], factor[2][1], k[3]);
      }
    }
#pragma unroll
    for (int m1 = 0; m1 < 4; m1 += kMatrices) {
      const int g = (m0 + m1) / kMatrices;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float old[kPack<S>];
        widen_pack<S>(states(i, g), old);
#pragma unroll
        for (int k = 0; k < kMatrices; ++k)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            old[2 * k + e] = fmaf(all, old[2 * k + e], d[m1 + k][2 * i + e]);
        store_pack_once_if(keeps, reinterpret_cast<S *>(to + i * kRowBytes + g * 64),
                           narrow_pack<S>(old));
      }
    }
  }
}

}  // namespace ssmk::cuda
