// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroup that finds the products within chunks, for all parts of the
// block.
#pragma once

#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

template <class T, int kStates, int kHeads, int kMode>
struct ScoreMaker : ChunkReader<kStates, kHeads, kMode> {
  using Reader = ChunkReader<kStates, kHeads, kMode>;
  using Reader::at, Reader::place, Reader::shared, Reader::thread;
  uint32_t given[kHeads] = {};  // chunks, by part

  __device__ __forceinline__ ScoreMaker(const SsdChunkProblem &p,
                                        const FusedShared<kStates, kHeads, kMode> &at,
                                        uint32_t shared)
      : Reader(p, at, shared) {}

  // S = C B^T of a stage, under way when this returns.
  __device__ __forceinline__ void multiply(float (&S)[32], uint32_t B) const {
    const uint32_t C = B + at.kSide;
    products_begin();
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k) {
      const int along = k / 4 * kTile + k % 4 * 32;
      product_64<T>(S, factor(C) + along, factor(B) + along, k > 0);
    }
    products_go();
  }

  // What the weights are made of.  Eights of tokens before a row's own take the decay in two steps,
  // up to the end of the eight and from there on.
  struct Decays {
    float rows[2], ends[8];
    float4 own[2];
    float2 near[8];
    float2 same[2];
  };
  __device__ __forceinline__ void load(Decays &d, uint32_t v, const Lane &l) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      d.rows[k] = shared_float(v + offsetof(TokenValues, decay) + (l.row + 8 * k) * 8);
      d.own[k] =
          shared_float4(v + offsetof(TokenValues, decay) + (16 * l.warp + 8 * k + l.column) * 8);
    }
#pragma unroll
    for (int b = 0; b < 8; b += 4) {
      const float4 four = shared_float4(v + offsetof(TokenValues, eighths) + 4 * b);
      d.ends[b] = four.x, d.ends[b + 1] = four.y, d.ends[b + 2] = four.z, d.ends[b + 3] = four.w;
    }
    if constexpr (kMode == kSiso)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        d.same[k] =
            shared_float2(v + offsetof(TokenValues, same) + (16 * l.warp + 8 * k + l.column) * 4);
    load_columns(d.near, v + offsetof(TokenValues, near), l);
  }

  // M, to the tile at `to`.  All warps run the same code, and find what is not before their rows
  // for nothing: short code is worth more.
  __device__ __forceinline__ void weigh(const float (&S)[32], const Decays &d, uint32_t to,
                                        const Lane &l) const {
    const int own = 2 * l.warp;  // the eight of the first row; that of the second is the next
    uint32_t diagonal[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      // The row's eight is among four: a choice in registers.
      float s[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float low = own & 2 ? S[4 * (2 + k) + 2 * k + j] : S[4 * k + 2 * k + j];
        const float high = own & 2 ? S[4 * (6 + k) + 2 * k + j] : S[4 * (4 + k) + 2 * k + j];
        s[j] = own & 4 ? high : low;
      }
      const int i = l.lane / 4;
      float first = exp2_fast(d.rows[k] - d.own[k].x) * d.own[k].y;
      float second = exp2_fast(d.rows[k] - d.own[k].z) * d.own[k].w;
      if constexpr (kMode == kSiso) {
        first = l.column == i ? d.same[k].x : first;
        second = l.column + 1 == i ? d.same[k].y : second;
      }
      diagonal[k] =
          pack_two<T>(l.column > i ? 0.0f : s[0] * first, l.column + 1 > i ? 0.0f : s[1] * second);
    }
    to += l.products;
#pragma unroll
    for (int b = 0; b < 8; b += 2) {
      uint32_t m[2][2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float far = exp2_fast(d.rows[k] - d.ends[b + c]);
          const float *const s = &S[4 * (b + c) + 2 * k];
          const uint32_t word =
              pack_two<T>(s[0] * (d.near[b + c].x * far), s[1] * (d.near[b + c].y * far));
          m[c][k] = b + c < own + k ? word : b + c == own + k ? diagonal[k] : 0;
        }
      store_matrices(to ^ (b << 4), m[0][0], m[0][1], m[1][0], m[1][1]);
    }
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (w.pad) return;
#pragma unroll 1
    for (int t = w.begin; t < w.end;) {
      float S[32];
      t += this->next_note(place, t, w.end) & kTokensMask;
      multiply(S, this->tiles(place.stage));
      Decays decays;
      load(decays, this->token_values(Place::of(given[0], kValuesPlaces), 0), Lane(afresh(thread)));
      products_wait<0>();
      settle(S);
      this->free_stage();
#pragma unroll 1
      for (int part = 0;;) {
        // Not an array that a variable counts in: that would be in memory.
        const uint32_t chunk = kHeads > 1 && part ? given[kHeads - 1]++ : given[0]++;
        Place values = Place::of(chunk, kValuesPlaces), made = Place::of(chunk, kProductPlaces);
        const uint32_t gate = shared + at.product_gates(part) + made.stage * 16;
        gate_wait(gate + 8, made.parity ^ 1);
        weigh(S, decays, shared + at.products(part, made.stage), Lane(afresh(thread)));
        show_to_products();
        this->arrive(gate);
        this->leave_token_values(values, part);
        if (++part >= w.parts) break;
        load(decays, this->token_values(Place::of(given[kHeads - 1], kValuesPlaces), part),
             Lane(afresh(thread)));
      }
    }
  }
};

}  // namespace ssmk::cuda
