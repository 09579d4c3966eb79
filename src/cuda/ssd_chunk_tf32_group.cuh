// SPDX-License-Identifier: MIT
// The products with the state by warpgroups (sm_90a): see ssd_chunk_tf32.cuh.
//
// Tensor cores read the second factor from shared memory, with the summed index along its rows, and
// both parts of it: the block splits queries in place, and turns keys on the way.
#pragma once

#include "cuda/ssd_chunk_tf32_products.cuh"
#include "cuda/wgmma.cuh"

namespace ssmk::cuda {

// d (64 x 32, or 64 x 64) = or += a b over 8 of the summed index; a in registers.
#define SSMK_ACC8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
__device__ __forceinline__ void product_8(float (&d)[16], const uint32_t (&a)[4], Factor b,
                                          bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, add, 1, 1;\n}"
      : SSMK_ACC8(0), SSMK_ACC8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(int(add)));
}
__device__ __forceinline__ void product_8(float (&d)[32], const uint32_t (&a)[4], Factor b,
                                          bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1;\n}"
      : SSMK_ACC8(0), SSMK_ACC8(8), SSMK_ACC8(16), SSMK_ACC8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(int(add)));
}
#undef SSMK_ACC8

// d = a b over kSteps times 8 of the summed index, the small products first, in two groups: the
// first has those of the rests of a.  The rests of b are `b_rest` bytes on, step i of it step(i).
template <int kSteps, int kSums, class Step>
__device__ __forceinline__ void product_in_parts(float (&d)[kSums],
                                                 const uint32_t (&first)[kSteps][4],
                                                 const uint32_t (&rest)[kSteps][4], Factor b,
                                                 int b_rest, const Step &step) {
  products_begin();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) product_8(d, rest[i], b + step(i), i > 0);
  products_go();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) product_8(d, first[i], b + (b_rest + step(i)), true);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) product_8(d, first[i], b + step(i), true);
  products_go();
}

// Queries become their first parts and, a tile on, their rests.  Keys become, turned round, rows of
// states with the tokens as fragments have them (see WideValues), in parts, too.
template <int kN>
__device__ __forceinline__ void split_tiles(uint32_t queries, uint32_t keys, uint32_t turned,
                                            bool with_queries, int thread) {
  if (with_queries) {
#pragma unroll
    for (int i = 0; i < kWideTile<kN> / 16 / kTeam; ++i) {
      const uint32_t at = queries + (i * kTeam + thread) * 16;
      const uint4 v = load_four_words(at);
      Rounded<4> p;
      p.set(0, v.x), p.set(1, v.y), p.set(2, v.z), p.set(3, v.w);
      store_four_words(at, {p.first[0], p.first[1], p.first[2], p.first[3]});
      store_four_words(at + kWideTile<kN>, {p.rest[0], p.rest[1], p.rest[2], p.rest[3]});
    }
  }
  // A lane has a state, a warp four tokens.  State 4 e + q of eight becomes row 2 q + e.
  const int lane = thread & 31, piece = thread >> 5;
  const int row = (lane & 24) | (lane & 3) << 1 | (lane >> 2 & 1);
  const int first = (piece >> 1) * 8 + (piece & 1);
#pragma unroll
  for (int part = 0; part < kN / 32; ++part) {
    uint32_t v[4], rest[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t key =
          load_word(keys + part * kPartTile + piece_at(first + 2 * k, lane >> 2, kPartBytes) +
                    (lane & 3) * 4);
      v[k] = rounded_part(key);
      rest[k] = rest_of(key, v[k]);
    }
    const uint32_t to = turned + part * kPartTile + piece_at(row, piece, kPartBytes);
    store_four_words(to, {v[0], v[1], v[2], v[3]});
    store_four_words(to + kWideTile<kN>, {rest[0], rest[1], rest[2], rest[3]});
  }
}

// Y^T = h Q^T over the half of the states that the warpgroup has.  `meanwhile` runs while the
// tensor cores do.
template <int kN, class Meanwhile>
__device__ __forceinline__ void multiply_state_group(MmaTile<kTokens> &y,
                                                     const MmaState<kN, true> &h, uint32_t queries,
                                                     int half, const Meanwhile &meanwhile) {
  constexpr int kSteps = kN / 16;
  uint32_t first[kSteps][4], rest[kSteps][4];
  float d[16];
#pragma unroll
  for (int n = 0; n < kSteps; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      first[n][k] = __float_as_uint(h.v[n][(k & 1) << 1 | k >> 1]);
      rest[n][k] = rest_of(first[n][k], cut_part(first[n][k]));
    }
  product_in_parts(d, first, rest, factor(queries + half * (kWideTile<kN> / 2)), kWideTile<kN>,
                   [](int i) { return i / 4 * kPartTile + i % 4 * 32; });
  products_wait<1>();
  settle(rest);  // their registers are free
  meanwhile();
  products_wait<0>();
  settle(d);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) y.v[i][k] = d[4 * i + k];
}

// h = decay h + (w U)^T K.
template <int kN>
__device__ __forceinline__ void add_to_state_group(MmaState<kN, true> &h, const WideValues &u,
                                                   uint32_t turned, const WideRows &w, int half,
                                                   int lane) {
  constexpr int kSteps = kTokens / 8;
  uint32_t first[kSteps][4], rest[kSteps][4];
  float d[kN / 4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const float2 by = *reinterpret_cast<const float2 *>(w.ending + i * 8 + 2 * (lane & 3));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t v = __float_as_uint(u.v[i][k] * (k < 2 ? by.x : by.y));
      first[i][k] = rounded_part(v);
      rest[i][k] = rest_of(v, first[i][k]);
    }
  }
  product_in_parts(d, first, rest, factor(turned + half * (kN / 2 * kPartBytes)), kWideTile<kN>,
                   [](int i) { return i * 32; });
  products_wait<0>();
  settle(d);
  settle(first);
  settle(rest);
  const float decay = w.last;
#pragma unroll
  for (int n = 0; n < kN / 16; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) h.v[n][k] = fmaf(h.v[n][k], decay, d[4 * n + k]);
}

}  // namespace ssmk::cuda
