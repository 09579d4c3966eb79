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
// A block owns a head of a batch row.  A warp has one or two tiles of 16 rows p: lane 4 r + q has a
// pack of rows 2 r and 2 r + 1 of each in every quarter q of a group of states.  Of four ranks,
// lane q has rank q.  Angles turn the pairs that models turn: neighbours of one rank, halves of
// four.
#pragma once

#include "cuda/state_update_mamba3_mma_parts.cuh"

namespace ssmk::cuda {

// S: states.  kTiles: of a warp.  kHeld: states wait in registers, else in shared memory.
template <class S, int kRank, int kTokens, int kTiles, bool kHeld, int kBlocks>
__global__ void __launch_bounds__(128 / kTiles, kBlocks)
    update_mamba3_mma(const __grid_constant__ Mamba3Mma p) {
  constexpr bool kWide = sizeof(S) == 4, kMimo = kRank > 1, kMany = kMimo && kTokens > 1;
  constexpr int kWarps = 4 / kTiles, kThreads = 32 * kWarps;
  constexpr int kGroups = kMma3States * int(sizeof(S)) / 64;  // packs of a row in a lane
  constexpr int kMatrices = 16 / kGroups;                     // of 8 columns, in a group
  constexpr int kOwn = kMany ? kTokens : kTiles;              // keys that a warp makes
  constexpr int kOwnRanks = kMimo && !kMany ? kTiles : 1, kOwnTokens = kTokens > 1 ? kTiles : 1;
  constexpr int kPairs = kMany ? kTokens / 2 : 1;  // of tokens
  constexpr int kAngles = kTokens > 1 || kThreads < kMma3Angles ? kMma3Angles / 32 : 1;
  using X = __nv_bfloat16;
  using Rows = FactorRows<kMany>;
  using Room = MmaRoom<S, kMany, kTokens, kHeld>;
  static_assert((kRank == 1 || kRank == 4) &&
                (kTokens == 1 || kTokens == 4 || (kMany && kTokens == 2)));
  static_assert(kTiles == 1 || (kTiles == 2 && !kMany));
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
  // A lane's rows: two neighbours of each tile.
  const auto row_of = [&](int tile) { return (warp * kTiles + tile) * 16 + r * 2; };
  const auto here = [&](int tile) { return row_of(tile) < p.headdim; };
  // Rows past the end read the first ones, and are not stored.
  const auto safe = [&](int tile) { return here(tile) ? row_of(tile) : 0; };

  // What depends on no slot.  Where something is not given, something else is read.
  const RawSlot in_bits = load_slot(p.in, b, flags & kWideSlots);
  const RawSlot out_bits = load_slot(p.out_slots, b, flags & kWideOutSlots);
  const int tokens = int(count_of(p.num_tokens, b, p.ntokens));
  const int last = max(tokens - 1, 0);
  // A warp makes keys and queries of its tokens or ranks, four elements a lane: at, at + 1,
  // at + apart and at + apart + 1.  Indices of tokens that there are not become those of the last
  // one; what it gives is dropped.
  constexpr int apart = kMimo ? kMma3States / 2 : 2;
  const int first_at = lane * (kMimo ? 2 : 4);
  const auto rank_of = [&](int i) { return kMany ? warp : kMimo ? warp + i * kWarps : 0; };
  const auto token_of = [&](int i) { return kMany ? i : kMimo ? 0 : warp + i * kWarps; };
  uint32_t value[kOwn][2][2];
  uint2 bias[kOwnRanks][2][2];
#pragma unroll
  for (int query = 0; query < 2; ++query) {
    const PerToken &of = query ? p.C : p.B;
    const PerRank &of_bias = query ? p.query_bias : p.key_bias;
    const char *const from = step(reach(of, b, 0, group), first_at, 2);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const char *const at = step(step(from, min(token_of(i), last), of.token), rank_of(i),
                                  query ? p.C_rank : p.B_rank);
      value[i][query][0] = load_word(at), value[i][query][1] = load_word(at + apart * 2);
    }
    const uint32_t wide = parts & (query ? kWideQueryBias : kWideKeyBias);
#pragma unroll
    for (int i = 0; i < kOwnRanks; ++i) {
      const char *const at = reach(of_bias, head, rank_of(i));
      bias[i][query][0] = load_two_either(at, first_at, wide);
      bias[i][query][1] = load_two_either(at, first_at + apart, wide);
    }
  }
  // Lane q prepares token q.  Angles: those of a token by the warp that makes its keys, but of four
  // ranks by warp t; of one token by the last warp, and the one before if they are many.
  const int lane_token = kTokens > 1 ? min(q, last) : 0;
  const auto angle_of = [&](int j) {
    return kTokens > 1 ? lane + 32 * j : thread ^ (kThreads - 32);
  };
  const bool steps_here = kTokens > 1 || warp == kWarps - 1 || angle_of(0) < p.nangles;
  uint32_t dt_bits = 0, rate_bits = 0, trap_bits = 0, dt_bias_bits = 0;
  if (steps_here) {
    dt_bits = load_either(reach(p.dt, b, lane_token, head), flags & kWideDt);
    rate_bits = load_either(reach(p.rate, b, lane_token, head), parts & kWideRate);
    trap_bits = load_either(reach(p.trap, b, lane_token, head), parts & kWideTrap);
    dt_bias_bits = load_either(reach(p.dt_bias, head), flags & kWideBias);
  }
  const auto step_token = [&](int i) { return kTokens > 1 ? warp + i * kWarps : 0; };
  uint32_t angle_bits[kOwnTokens][kAngles], theta_bits[kAngles];
#pragma unroll
  for (int i = 0; i < kOwnTokens; ++i)
#pragma unroll
    for (int j = 0; j < kAngles; ++j) {
      angle_bits[i][j] = 0;
      const uint32_t wide = parts & kWideAngles;
      if (angle_of(j) < p.nangles)
        angle_bits[i][j] = load_either(
            step(reach(p.angles, b, min(step_token(i), last), head), angle_of(j), wide ? 4 : 2),
            wide);
    }
  // Lane q has x and z of token q.
  uint32_t x_bits[kTiles], z_bits[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    x_bits[tile] = load_word(step(reach(p.x, b, lane_token, head), safe(tile), 2));
    z_bits[tile] = load_word(step(reach(p.z, b, lane_token, head), safe(tile), 2));
  }
  uint2 psi_bits[kTiles], zeta_bits[kTiles], phi_bits[kTiles];
#pragma unroll
  for (int tile = 0; tile < (kMimo ? kTiles : 0); ++tile) {
    psi_bits[tile] = load_two_either(reach(p.psi, head, q), safe(tile), parts & kWidePsi);
    zeta_bits[tile] = load_two_either(reach(p.zeta, head, q), safe(tile), parts & kWideZeta);
    phi_bits[tile] = load_two_either(reach(p.phi, head, q), safe(tile), parts & kWidePhi);
  }
  const uint32_t D_bits = load_either(reach(p.D, head), flags & kWideD);

  const TiedSlots slots = slots_of(p, b, in_bits, out_bits);
  const bool writes = !(parts & kKeepState);
  char *const out_at = const_cast<char *>(reach(p.out, b, 0, head));
  const DType out_dtype = parts & kWideOut ? DType::kF32 : DType::kBF16;
  const auto store_out = [&](int tile, int t, int rank, float y0, float y1) {
    if (here(tile))
      store_two(step(step(step(out_at, t, p.out.token), rank, p.out_rank), row_of(tile),
                     parts & kWideOut ? 4 : 2),
                out_dtype, {y0, y1});
  };
  if (slots.pad || tokens == 0) {
    if (q < (kMimo && !(parts & kHasPhi) ? kRank : 1))
      for (int t = 0; t < p.ntokens; ++t)
        for (int tile = 0; tile < kTiles; ++tile) store_out(tile, t, q, 0.0f, 0.0f);
    if (!slots.pad && slots.in != slots.out && writes)
      copy_slot<S, kRank>(p, slots.in, slots.out, head);
    return;
  }

  // The states of this lane, in registers or where no other lane touches them; and what stands
  // beside them before the first token.
  uint4 *const waiting = shared + thread;
  uint4 held[kHeld ? kTiles * 2 * kGroups : 1];
  constexpr int kRowBytes = kMma3States * int(sizeof(S));
  char *const head_at = step(p.state, head, p.state_head);
  const auto state_at = [&](int slot, int tile) {
    return step(step(head_at, slot, p.state_slot), safe(tile) * (kRowBytes / 16) + q, 16);
  };
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const char *const from = state_at(slots.in, tile);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int at = (tile * 2 + i) * kGroups + g;
        const char *const here = from + i * kRowBytes + g * 64;
        if constexpr (kHeld)
          held[at] = __ldcs(reinterpret_cast<const uint4 *>(here));
        else
          copy_ahead(waiting + at * kThreads, here);
      }
  }
  const auto states = [&](int tile, int i, int g) {
    const int at = (tile * 2 + i) * kGroups + g;
    if constexpr (kHeld)
      return held[at];
    else
      return waiting[at * kThreads];
  };
  uint32_t old_key[kOwnRanks][2] = {};
  const bool has_old = kMimo || warp == 0;
  const auto key_state = [&](int slot, int i) {
    return step(step(reach(p.k_state, slot, head), rank_of(i), p.k_rank), first_at, 2);
  };
  if (has_old)
#pragma unroll
    for (int i = 0; i < kOwnRanks; ++i) {
      const char *const from = key_state(slots.in, i);
      old_key[i][0] = load_word(from), old_key[i][1] = load_word(from + apart * 2);
    }
#pragma unroll
  for (int j = 0; j < kAngles; ++j) {
    theta_bits[j] = 0;
    if (angle_of(j) < p.nangles)
      theta_bits[j] = load_word(step(reach(p.angle_state, slots.in, head), angle_of(j), 4));
  }
  uint32_t v_bits[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    v_bits[tile] = load_word(step(reach(p.v_state, slots.in, head), safe(tile), 2));
  const auto of_token = [&](uint32_t bits, int t) {
    return unpack_two<__nv_bfloat16>(kTokens > 1 ? __shfl_sync(~0u, bits, t, 4) : bits);
  };

  // Steps and decays.  A token that there is not has none.
  float dt = 0.0f;
  if (steps_here) {
    dt = tied_dt<X>(p, dt_bits, dt_bias_bits);
    const float rate = either_value<X>(rate_bits, parts & kWideRate) * kLog2e;
    const Trapezoid f =
        trapezoid(parts & kTrapSigmoid, either_value<X>(trap_bits, parts & kWideTrap));
    const float decay = exp2_fast(parts & kHasAdt ? rate : dt * rate);
    const bool there = q < tokens;
    if (warp == kWarps - 1 && lane < kTokens) {
      coefs[q] = there ? decay : 1.0f;
      coefs[4 + q] = there ? f.now * dt : 0.0f;
      coefs[8 + q] = there ? f.then * dt : 0.0f;
    }
  }

  // Angles.
  float half_turns[kOwnTokens][kAngles];
#pragma unroll
  for (int i = 0; i < kOwnTokens; ++i) {
    const float token_dt = kTokens > 1 ? __shfl_sync(~0u, dt, step_token(i), 4) : dt;
#pragma unroll
    for (int j = 0; j < kAngles; ++j) {
      if (angle_of(j) >= p.nangles) continue;
      half_turns[i][j] = tanhf(either_value<X>(angle_bits[i][j], parts & kWideAngles)) * token_dt;
      if (kTokens > 1 && step_token(i) < kTokens)
        steps[step_token(i) * kMma3Angles + angle_of(j)] = half_turns[i][j];
    }
  }
  if (kTokens > 1) __syncthreads();
#pragma unroll
  for (int j = 0; j < kAngles; ++j) {
    const int angle = angle_of(j);
    if (angle >= p.nangles) continue;
    float theta = __uint_as_float(theta_bits[j]);
    int done = 0;
#pragma unroll
    for (int i = 0; i < kOwnTokens; ++i) {
      const int token = step_token(i);
      if (token >= tokens) continue;
      if (kTokens == 1) {
        theta = turned(theta, half_turns[0][j]);
      } else {
#pragma unroll 1
        for (; done <= token; ++done) theta = turned(theta, steps[done * kMma3Angles + angle]);
      }
      if (writes && token == last)
        *reinterpret_cast<float *>(step(reach(p.angle_state, slots.out, head), angle, 4)) = theta;
      float2 turn;
      sine_cosine(theta, &turn.x, &turn.y);
      turns[token * kMma3Angles + angle] = turn;
    }
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
  const auto first_of = [](uint32_t one, uint32_t two) {
    return kMimo ? one : __byte_perm(one, two, 0x5410);
  };
  const auto second_of = [](uint32_t one, uint32_t two) {
    return kMimo ? two : upper_halves(one, two);
  };
  // A copy that the compiler takes for another value: it keeps the four words of a fragment in
  // neighbouring registers, and else moves those that two fragments share back and forth.
  const uint32_t same = flags & kHasD ? 0x3210 : 0x7654;
  const auto copy = [&](uint32_t word) { return __byte_perm(word, word, same); };
  const bool turns_first = lane * 2 < p.nangles, turns_second = lane * 2 + 1 < p.nangles;
  float2 add[kOwnRanks][2][2];
#pragma unroll
  for (int i = 0; i < kOwnRanks; ++i)
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      const uint32_t wide = parts & (query ? kWideQueryBias : kWideKeyBias);
      const float2 v = two_either(bias[i][query][0], wide), w = two_either(bias[i][query][1], wide);
      const bool has = parts & (query ? kHasQueryBias : kHasKeyBias);
      add[i][query][0] = {has ? v.x : 0.0f, has ? kMimo ? v.y : w.x : 0.0f};
      add[i][query][1] = {has ? kMimo ? w.x : v.y : 0.0f, has ? w.y : 0.0f};
    }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int t = token_of(i), index = kMany ? 4 * i + warp : warp + i * kWarps;
    // Tokens that there are not: zeros, whatever stands there.
    if (kTokens > 1 && t >= tokens) {
#pragma unroll
      for (int part = 0; part < 3; ++part)
        put(Rows::key(part, index), 0u, 0u), put(Rows::query(part, index), 0u, 0u);
      continue;
    }
    const float4 turn = reinterpret_cast<const float4 *>(turns + t * kMma3Angles)[lane];
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      const uint32_t *const from = value[i][query];
      const float2(&more)[2] = add[kOwnRanks > 1 ? i : 0][query];
      float2 one = unpack_two<__nv_bfloat16>(first_of(from[0], from[1]));
      float2 two = unpack_two<__nv_bfloat16>(second_of(from[0], from[1]));
      one.x += more[0].x, one.y += more[0].y, two.x += more[1].x, two.y += more[1].y;
      if (turns_first) turn_pair(&one.x, &two.x, turn.x, turn.y);
      if (turns_second) turn_pair(&one.y, &two.y, turn.z, turn.w);
      const PairParts a = split_two(one.x, one.y), c = split_two(two.x, two.y);
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const uint32_t low = first_of(a.part[part], c.part[part]);
        const uint32_t high = second_of(a.part[part], c.part[part]);
        put(query ? Rows::query(part, index) : Rows::key(part, index), low, high);
        if (query == 0 && part == 0 && writes && t == last) {
          char *const to = key_state(slots.out, kOwnRanks > 1 ? i : 0);
          *reinterpret_cast<uint32_t *>(to) = low;
          *reinterpret_cast<uint32_t *>(to + apart * 2) = high;
        }
      }
    }
  }
  if (has_old)
#pragma unroll
    for (int i = 0; i < kOwnRanks; ++i) put(Rows::old(rank_of(i)), old_key[i][0], old_key[i][1]);
  if (warp == kWarps - 1) put(Rows::zero, 0u, 0u);
  if (!kHeld) wait_for_copies();
  __syncthreads();

  // Of four matrices, the line that this lane gives the address of.
  const int matrix = lane >> 3, line = lane & 7, pair = line >> 1, odd = line & 1;
  const uint32_t base = shared_address(factors);
  const auto address = [&](int line, int column) {
    return base + uint32_t(line * kFactorPitch * 4 + column * 16);
  };
  // Keys as rows.  Of one rank the old one and its tokens: of many tokens, that of the warp.  Of
  // one token of four ranks old and new in turns.  What the other lines hold does not matter.
  const auto key_line = [&](int part) {
    if (kMimo && !kMany)
      return odd ? Rows::key(part, pair) : part == 0 ? Rows::old(pair) : Rows::zero + 0;
    if (line == 0 || line > kTokens)
      return part == 0 ? Rows::old(kMany ? warp : 0) : Rows::zero + 0;
    return Rows::key(part, kMany ? 4 * (line - 1) + warp : line - 1);
  };
  // Of each four matrices the first and third go together, then the others.  Keys: high and mid
  // parts of two, or the low parts of all four.
  const uint32_t key_at = address(matrix & 1 ? key_line(1) : key_line(0), matrix & 2);
  const uint32_t low_key_at = address(key_line(2), matrix);
  // Products h q and k q.  Of several tokens of four ranks, columns 2 i and 2 i + 1 of tile j are
  // rank i of tokens 2 j and 2 j + 1.  Else columns 2 i and 2 i + 1 of tile 0 are the first parts
  // of query i, and column 2 i of tile 1 is the third.
  float sums[kTiles][2][4] = {}, dots[2][4] = {}, low_dots[2][kPairs][4] = {};
  {
    const int column = (matrix & 1) * 2;
    const uint32_t query_at =
        kMany ? address(Rows::query(0, 4 * ((matrix >> 1) * 2 + odd) + pair), column)
              : address(matrix >> 1 ? Rows::query(2, pair)
                        : odd       ? Rows::query(1, pair)
                                    : Rows::query(0, pair),
                        column);
    constexpr int kPart = 16 * kFactorPitch * 4;
    constexpr int kQueryParts = kMany ? 3 : 1;
    constexpr int kUnrolled = kHeld ? 4 : 1;
#pragma unroll kUnrolled
    for (int four = 0; four < 4; ++four) {
      // Loads stay where they are: as early as they could be they want more registers.
      if (kHeld) __syncwarp();
      uint32_t low_keys[4];
      load_matrices(low_keys, low_key_at + four * 64);
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        uint32_t queries[kQueryParts][4], keys[4];
        const int at = four * 64 + second * 16;
#pragma unroll
        for (int part = 0; part < kQueryParts; ++part)
          load_matrices(queries[part], query_at + part * kPart + at);
        load_matrices(keys, key_at + at);
        // Part `left` of the left factor, with as many of the right one as matter.
        const auto multiply = [&](float (&to)[2][4], const uint32_t (&a)[4], int left) {
#pragma unroll
          for (int part = 0; part < (kMany ? 3 - left : 1); ++part)
#pragma unroll
            for (int j = 0; j < (kMany ? kPairs : left == 0 ? 2 : 1); ++j)
              mma_16(to[j], a[0], a[1], a[2], a[3], queries[part][2 * j], queries[part][2 * j + 1]);
        };
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if constexpr (kWide) {
            // Two groups, of which each has two matrices.
            const uint4 h[2][2] = {{states(tile, 0, 2 * four), states(tile, 0, 2 * four + 1)},
                                   {states(tile, 1, 2 * four), states(tile, 1, 2 * four + 1)}};
            float w[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const uint4 &of = h[i][e / 2];
                w[i][e] = __uint_as_float(second ? (e & 1 ? of.w : of.z) : (e & 1 ? of.y : of.x));
              }
#pragma unroll
            for (int left = 0; left < 3; ++left) {
              const auto two = [&](int i, int e) {
                return upper_halves(__float_as_uint(w[i][e]), __float_as_uint(w[i][e + 1]));
              };
              const uint32_t a[4] = {two(0, 0), two(1, 0), two(0, 2), two(1, 2)};
              multiply(sums[tile], a, left);
#pragma unroll
              for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) w[i][e] = below_upper_half(w[i][e]);
            }
          } else {
            const uint4 h[2] = {states(tile, 0, four), states(tile, 1, four)};
            const uint32_t a[4] = {copy(second ? h[0].y : h[0].x), copy(second ? h[1].y : h[1].x),
                                   copy(second ? h[0].w : h[0].z), copy(second ? h[1].w : h[1].z)};
            multiply(sums[tile], a, 0);
          }
        }
        multiply(dots, keys, 0);
        // Of the first and third matrix rows 0 to 7 are low keys; of the others rows 8 to 15.
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
          mma_16(low_dots[second][j], low_keys[0], low_keys[1], low_keys[2], low_keys[3],
                 queries[0][2 * j], queries[0][2 * j + 1]);
      }
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
  const float now = coefs[kTokens > 1 ? 4 + q : 4], first = coefs[8], old_factor = all * first;
  const float earlier = kTokens > 1 ? both_parts((r + 3) & 3) : 0.0f;
  const float D = either_value<X>(D_bits, flags & kWideD);
  const auto finish = [&](float *y, float u, float zeta, float z) {
    const float skipped = fmaf(D, u, *y);
    if (flags & kHasD) *y = skipped;
    const float gate = silu(kMimo ? __fmul_rn(zeta, z) : z);
    if (flags & kHasZ) *y *= gate;
  };
  const auto of_rank = [&](uint2 bits, uint32_t has, uint32_t wide) {
    const float2 v = two_either(bits, parts & wide);
    return float2{parts & has ? v.x : 1.0f, parts & has ? v.y : 1.0f};
  };

  // Products of keys and queries, c_tj times them where that depends on t.  Of key r and query q:
  float dot = ((dots[0][0] + dots[0][1]) + (dots[0][2] + dots[0][3])) +
              ((dots[1][0] + dots[1][2]) +
               ((low_dots[0][0][0] + low_dots[0][0][1]) + (low_dots[1][0][2] + low_dots[1][0][3])));
  float upto = 1.0f;  // decays up to token q
  PairParts key_query;
  if constexpr (kMany) {
    float c[kTokens], run = r == 0 ? first : earlier;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      run *= t >= r ? a[t] : 1.0f;
      c[t] = t == r - 1 ? coefs[4 + t] : run;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const auto product = [&](int e) {
        return ((dots[j][e] + dots[j][2 + e]) + (low_dots[0][j][e] + low_dots[1][j][2 + e])) *
               c[2 * j + e];
      };
      const PairParts m = split_two(product(0), product(1));
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
    __syncthreads();
  } else if constexpr (kMimo) {
    // In the place of keys: lines 2 q and 2 q + 1, old and new.
    const float old = __shfl_sync(~0u, dot, 8 * q + (r >> 1));
    const float fresh = __shfl_sync(~0u, dot, 8 * q + 4 + (r >> 1));
    key_query = split_two(fresh, old);
  } else {
    float between = 1.0f;  // decays from token r to token q
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      upto *= t <= q ? a[t] : 1.0f;
      between *= t >= r && t <= q ? a[t] : 1.0f;
    }
    dot *= r == 0 ? first * upto : r - 1 == q ? now : earlier * between;
  }

  // The coefficients of the keys, as words of both rows: (high, high), (mid, mid) and (high, low)
  // of one key, then (high, mid) and (low, 0) of an old one; of many tokens see there.
  constexpr int kWords = kMany ? 3 * kPairs + 1 : 3;
  uint32_t factor[kTiles][kWords][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float2 psi = kMimo ? of_rank(psi_bits[tile], kHasPsi, kWidePsi) : float2{1.0f, 1.0f};
    const float2 zeta = kMimo ? of_rank(zeta_bits[tile], kHasZeta, kWideZeta) : float2{1.0f, 1.0f};
    const float2 phi = kMimo ? of_rank(phi_bits[tile], kHasPhi, kWidePhi) : float2{1.0f, 1.0f};
    const float2 v0 = unpack_two<__nv_bfloat16>(v_bits[tile]);
    const float2 old_u = kMimo ? float2{psi.x * v0.x, psi.y * v0.y} : v0;
    const float (&sum)[2][4] = sums[tile];
    uint32_t (&words)[kWords][4] = factor[tile];
    if constexpr (!kMany) {
      float y[2] = {upto * ((sum[0][0] + sum[0][1]) + sum[1][0]),
                    upto * ((sum[0][2] + sum[0][3]) + sum[1][2])};
      const float2 x = unpack_two<__nv_bfloat16>(x_bits[tile]);
      const float2 u = kMimo ? float2{psi.x * x.x, psi.y * x.y} : x;
      PairParts terms[2];  // of the new key in the low halves, of the old one in the high ones
      if constexpr (kMimo) {
        terms[0] = split_two(now * u.x, old_factor * old_u.x);
        terms[1] = split_two(now * u.y, old_factor * old_u.y);
        float more[4] = {};
        const auto term = [&](int i, int part) { return terms[i].part[part]; };
        const PairParts &m = key_query;
        mma_16(more, term(0, 0), term(1, 0), term(0, 0), term(1, 0), m.part[0], m.part[1]);
        mma_16(more, term(0, 0), term(1, 0), term(0, 1), term(1, 1), m.part[2], m.part[0]);
        mma_16(more, term(0, 1), term(1, 1), term(0, 2), term(1, 2), m.part[1], m.part[0]);
        y[0] = fmaf(all, y[0], more[0]), y[1] = fmaf(all, y[1], more[2]);
      } else {
#pragma unroll
        for (int j = 0; j <= kTokens; ++j) {
          const float both = __shfl_sync(~0u, dot, j * 4 + q);
          const float2 of = j == 0 ? v0 : of_token(x_bits[tile], j - 1);
          const float y0 = fmaf(both, of.x, y[0]), y1 = fmaf(both, of.y, y[1]);
          y[0] = j <= q + 1 ? y0 : y[0], y[1] = j <= q + 1 ? y1 : y[1];
        }
        const float own = after * both_parts(q);
        terms[0] = split_two(there ? own * x.x : 0.0f, old_factor * v0.x);
        terms[1] = split_two(there ? own * x.y : 0.0f, old_factor * v0.y);
      }
      const float2 z = unpack_two<__nv_bfloat16>(z_bits[tile]);
      finish(&y[0], u.x, zeta.x, z.x), finish(&y[1], u.y, zeta.y, z.y);
      if (kMimo && parts & kHasPhi) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          y[i] = __fmul_rn(i ? phi.y : phi.x, y[i]);
          y[i] += __shfl_xor_sync(~0u, y[i], 1);
          y[i] += __shfl_xor_sync(~0u, y[i], 2);
        }
        if (q == 0) store_out(tile, 0, 0, y[0], y[1]);
      } else if (kMimo) {
        store_out(tile, 0, q, y[0], y[1]);
      } else if (q < p.ntokens) {
        store_out(tile, q, 0, there ? y[0] : 0.0f, there ? y[1] : 0.0f);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const PairParts &s = terms[i];
        words[0][i] = __byte_perm(s.part[0], s.part[0], 0x1010);
        words[0][2 + i] = __byte_perm(s.part[1], s.part[1], 0x1010);
        words[1][i] = __byte_perm(s.part[0], s.part[2], 0x5410);
        const uint32_t high = upper_halves(s.part[0], s.part[1]), low = s.part[2] >> 16;
        words[1][2 + i] = kMimo || q == 0 ? high : q == 1 ? low : 0u;
        words[2][i] = low, words[2][2 + i] = 0u;
      }
    } else {
      float2 u[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float2 x = of_token(x_bits[tile], t);
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
      float passed = 1.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        passed *= a[t];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          y[t][i] = fmaf(passed, sum[t / 2][2 * i + t % 2], more[t][2 * i] + more[t][2 * i + 1]);
        const float2 z = of_token(z_bits[tile], t);
        finish(&y[t][0], u[t].x, zeta.x, z.x), finish(&y[t][1], u[t].y, zeta.y, z.y);
        if (t >= tokens) y[t][0] = y[t][1] = 0.0f;
      }
      if (parts & kHasPhi) {
        // Over the ranks: lane q gets token q, or q modulo 2.
        float own[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto part = [&](int t) { return __fmul_rn(i ? phi.y : phi.x, y[t % kTokens][i]); };
          float two[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            two[e] = part(e);
            if (kTokens == 4) {
              const float kept = q & 2 ? part(2 + e) : two[e], sent = q & 2 ? two[e] : part(2 + e);
              two[e] = kept + __shfl_xor_sync(~0u, sent, 2);
            }
          }
          own[i] = (q & 1 ? two[1] : two[0]) + __shfl_xor_sync(~0u, q & 1 ? two[0] : two[1], 1);
          if (kTokens == 2) own[i] += __shfl_xor_sync(~0u, own[i], 2);
          // Zeros stay zeros, whatever phi is.
          if (!there) own[i] = 0.0f;
        }
        if (q < p.ntokens) store_out(tile, q, 0, own[0], own[1]);
      } else {
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
          if (t < p.ntokens) store_out(tile, t, q, y[t][0], y[t][1]);
      }

      // Of tokens 0 and 1, then of 2 and 3: (high, high), (high, mid) and (low, mid); of the old
      // one (high, mid) and (low, 0).
      float c[kTokens], later = 1.0f;
#pragma unroll
      for (int t = kTokens - 1; t >= 0; --t) c[t] = later * both_parts(t), later *= a[t];
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto term = [&](int t) { return t < tokens ? c[t] * (i ? u[t].y : u[t].x) : 0.0f; };
          const PairParts s = split_two(term(2 * j), term(2 * j + 1));
          words[3 * j][i] = s.part[0], words[3 * j][2 + i] = copy(s.part[0]);
          words[3 * j + 1][i] = copy(s.part[0]), words[3 * j + 1][2 + i] = copy(s.part[1]);
          words[3 * j + 2][i] = s.part[2], words[3 * j + 2][2 + i] = s.part[1];
        }
      const PairParts s = split_two(old_factor * old_u.x, old_factor * old_u.y);
      words[3 * kPairs][0] = __byte_perm(s.part[0], s.part[1], 0x5410);
      words[3 * kPairs][1] = __byte_perm(s.part[0], s.part[1], 0x7632);
      words[3 * kPairs][2] = s.part[2] & 0xffff, words[3 * kPairs][3] = s.part[2] >> 16;
    }
    if (here(tile) && writes && q == (kTokens > 1 ? last : 0))
      *reinterpret_cast<uint32_t *>(step(reach(p.v_state, slots.out, head), safe(tile), 2)) =
          x_bits[tile];
  }

  // States.  Of one key (high, mid) twice, (low, high), the old one; of many tokens (high, mid,
  // low, high) of two of them, then of two more, and the old one for two matrices.
  const auto pair_line = [&](int part, int tokens) {
    return Rows::key(part, kMany ? 4 * (2 * tokens + odd) + pair : pair);
  };
  const auto pairs_at = [&](int tokens) {
    return address(matrix == 1   ? pair_line(1, tokens)
                   : matrix == 2 ? pair_line(2, tokens)
                                 : pair_line(0, tokens),
                   0);
  };
  const uint32_t keys_at = kMany ? pairs_at(0)
                                 : address(matrix == 3   ? Rows::old(kMimo ? pair : 0)
                                           : matrix == 2 ? Rows::key(odd ? 0 : 2, pair)
                                                         : Rows::key(odd, pair),
                                           0);
  const uint32_t more_keys_at = kMany ? pairs_at(1) : 0u;
  const uint32_t old_at = address(Rows::old(pair), matrix >> 1);
  char *to[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) to[tile] = state_at(slots.out, tile);
  constexpr int kUnrolled = kHeld ? 4 : 1;
#pragma unroll kUnrolled
  for (int four = 0; four < 4; ++four) {
    if (kHeld) __syncwarp();
    float d[kTiles][4][4] = {};
    uint32_t before[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const auto multiply = [&](int word, uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t (&w)[4] = factor[tile][word];
          mma_16(d[tile][m], w[0], w[1], w[2], w[3], b0, b1);
        }
      };
      const int column = (four * 4 + m) * 16;
      uint32_t k[4];
      load_transposed(k, keys_at + column);
      if constexpr (kMany) {
        multiply(0, k[0], k[1]);
        multiply(1, k[2], k[3]);
        multiply(2, k[0], k[1]);
        if constexpr (kPairs == 2) {
          load_transposed(k, more_keys_at + column);
          multiply(3, k[0], k[1]);
          multiply(4, k[2], k[3]);
          multiply(5, k[0], k[1]);
        }
        if (m % 2 == 0) load_transposed(before, old_at + column);
        multiply(3 * kPairs, before[m % 2 * 2], before[m % 2 * 2 + 1]);
      } else {
        multiply(0, k[0], k[1]);
        multiply(1, k[2], k[3]);
        if (kMimo)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            mma_8(d[tile][m], factor[tile][2][0], factor[tile][2][1], k[3]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int m = 0; m < 4; m += kMatrices) {
        const int g = four * (4 / kMatrices) + m / kMatrices;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float old[kPack<S>];
          widen_pack<S>(states(tile, i, g), old);
#pragma unroll
          for (int k = 0; k < kMatrices; ++k)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              old[2 * k + e] = fmaf(all, old[2 * k + e], d[tile][m + k][2 * i + e]);
          store_pack_once_if(here(tile) && writes,
                             reinterpret_cast<S *>(to[tile] + i * kRowBytes + g * 64),
                             narrow_pack<S>(old));
        }
      }
  }
}

}  // namespace ssmk::cuda
