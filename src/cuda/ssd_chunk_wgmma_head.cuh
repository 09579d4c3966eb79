// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroups that each own the state of a head.
#pragma once

#include "cuda/ssd_chunk_wgmma_state.cuh"

namespace ssmk::cuda {

template <class T, int kStates, int kHeads, bool kOutputs>
struct HeadOwner : HeldState<kStates> {
  using Held = HeldState<kStates>;
  using Held::h, Held::here, Held::kHeld, Held::part, Held::plan, Held::thread;
  using typename Held::Lane;
  const SsdChunkProblem &p;
  const TileSource &out_to;
  const FusedShared<kStates, kHeads, kOutputs> &at;
  uint32_t shared;
  Place place;          // of the tiles
  Place batch;          // of the token values
  int of_batch = 0;     // chunk
  float D[2] = {0, 0};  // of the two rows

  __device__ __forceinline__ HeadOwner(const SsdChunkProblem &p, const FusedPlan &plan,
                                       const TileSource &out_to,
                                       const FusedShared<kStates, kHeads, kOutputs> &at,
                                       uint32_t shared, int part)
      : Held(plan, part), p(p), out_to(out_to), at(at), shared(shared) {}

  // ---- A chunk

  // x^T of the chunk: v[k] is the fragment for tokens 16 k on.
  __device__ __forceinline__ void load_values(uint32_t (&v)[4][4], uint32_t tile,
                                              const Lane &l) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_transposed(v[k], tile + l.values + k * 16 * kTileRowBytes);
  }

  // S = C B^T, under way when this returns.
  __device__ __forceinline__ void own_product(float (&S)[32], uint32_t B, uint32_t C) const {
    products_begin();
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k) {
      const int along = k / 4 * kTile + k % 4 * 32;
      product_64<T>(S, factor(C) + along, factor(B) + along, k > 0);
    }
    products_go();
  }

  // What the weights of the products within a chunk are made of.  Eights of tokens before this
  // warp's sixteen take the decay in two steps, up to the end of the eight and from there on.
  struct OwnDecays {
    float rows[2], ends[6];
    float2 near[6];
    float4 own[2];
  };
  __device__ __forceinline__ void load_decays(OwnDecays &d, uint32_t v, const Lane &l) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      d.rows[i] = shared_float(v + offsetof(TokenValues, decay) + (l.row + 8 * i) * 8);
    const float4 four = shared_float4(v + offsetof(TokenValues, eighths));
    const float2 two = shared_float2(v + offsetof(TokenValues, eighths) + 16);
    d.ends[0] = four.x, d.ends[1] = four.y, d.ends[2] = four.z, d.ends[3] = four.w;
    d.ends[4] = two.x, d.ends[5] = two.y;
#pragma unroll
    for (int b = 0; b < 6; ++b)
      d.near[b] = shared_float2(v + offsetof(TokenValues, near) + (8 * b + l.column) * 4);
#pragma unroll
    for (int c = 0; c < 2; ++c)
      d.own[c] =
          shared_float4(v + offsetof(TokenValues, decay) + (16 * l.warp + 8 * c + l.column) * 8);
  }

  // M, to shared memory.
  __device__ __forceinline__ void weigh_own(const float (&S)[32], const OwnDecays &d,
                                            const Lane &l) const {
    const uint32_t to = shared + at.products() + part * kTile + l.products;
#pragma unroll
    for (int b = 0; b < 8; b += 2) {
      uint32_t m[2][2] = {};
      // Opaque, or the compiler would make b a variable, and S an array in memory.
      const int sixteen = afresh(2 * l.warp);
      if (b < 6 && b < sixteen) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float far = exp2_fast(d.rows[k] - d.ends[(b + c) % 6]);
            const float2 near = d.near[(b + c) % 6];
            const float *const s = &S[4 * (b + c) + 2 * k];
            m[c][k] = pack_two<T>(s[0] * (near.x * far), s[1] * (near.y * far));
          }
      } else if (b == sixteen) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = 8 * (b + c) + l.column;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float *const s = &S[4 * (b + c) + 2 * k];
            const float first = s[0] * (exp2_fast(d.rows[k] - d.own[c].x) * d.own[c].y);
            const float second = s[1] * (exp2_fast(d.rows[k] - d.own[c].z) * d.own[c].w);
            m[c][k] = pack_two<T>(j > l.row + 8 * k ? 0.0f : first,
                                  j + 1 > l.row + 8 * k ? 0.0f : second);
          }
        }
      }
      store_matrices(to ^ (b << 4), m[0][0], m[0][1], m[1][0], m[1][1]);
    }
  }

  // Values of this lane's columns: 8 b + column, and the next.
  __device__ __forceinline__ void load_columns(float2 (&to)[8], uint32_t from,
                                               const Lane &l) const {
#pragma unroll
    for (int b = 0; b < 8; ++b) to[b] = shared_float2(from + l.column * 4 + b * 32);
  }

  // y^T = h C^T, under way when this returns; the state as it was before the chunk.
  __device__ __forceinline__ void state_product(float (&y)[32], uint32_t C) const {
    uint32_t a[kStates / 16][4];
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = pack_two<T>(h[8 * k + 2 * i], h[8 * k + 2 * i + 1]);
    products_begin();
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k)
      product_64<T>(y, a[k], factor(C) + (k / 4 * kTile + k % 4 * 32), k > 0);
    products_go();
  }

  // y^T exp(cs) + x^T M^T, under way when this returns.
  __device__ __forceinline__ void add_own(float (&y)[32], const uint32_t (&x)[4][4],
                                          const float2 (&grown)[8], uint32_t M) const {
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      y[4 * b] *= grown[b].x, y[4 * b + 1] *= grown[b].y;
      y[4 * b + 2] *= grown[b].x, y[4 * b + 3] *= grown[b].y;
    }
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) product_64<T>(y, x[k], factor(M) + k * 32, true);
    products_go();
  }

  // u = weight x, as fragments.
  __device__ __forceinline__ void weigh_values(uint32_t (&u)[4][4], const uint32_t (&x)[4][4],
                                               const float2 (&weight)[8]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = unpack_two<T>(x[k][i]), by = weight[2 * k + i / 2];
        u[k][i] = pack_two<T>(f.x * by.x, f.y * by.y);
      }
  }

  // h exp(cs_last) + u^T B, under way when this returns.
  __device__ __forceinline__ void update(const uint32_t (&u)[4][4], float last, uint32_t B) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) h[i] *= last;
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) product_across<T>(h, u[k], factor(B, kTile) + k * 2048);
    products_go();
  }

  // The skip and the gate, and y to shared memory.
  template <bool kGated>
  __device__ __forceinline__ void finish(const float (&y)[32], const uint32_t (&x)[4][4],
                                         uint32_t tile, uint32_t z_tile, const Lane &l) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t z[4], out[4];
      if (kGated) load_transposed(z, z_tile + l.values + k * 16 * kTileRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = unpack_two<T>(x[k][i]);
        float first = fmaf(D[i & 1], f.x, y[8 * k + 2 * i]);
        float second = fmaf(D[i & 1], f.y, y[8 * k + 2 * i + 1]);
        if (kGated) {
          const float2 g = unpack_two<T>(z[i]);
          first *= silu(g.x);
          second *= silu(g.y);
        }
        out[i] = pack_two<T>(first, second);
      }
      store_transposed(tile + l.values + k * 16 * kTileRowBytes, out[0], out[1], out[2], out[3]);
    }
  }

  // Outputs of a chunk that is not full: this thread's piece of 8 of every sixteenth token.
  __device__ __forceinline__ void store_some(int4 target, uint32_t tile, int t, int tokens) const {
    const int c = thread & 7;
#pragma unroll 1
    for (int r = thread >> 3; r < tokens; r += 16)
      *reinterpret_cast<int4 *>(output(target.x, t + r, target.y, target.z) + c * 8) =
          shared_int4(tile + tile_piece(r, c));
  }
  __device__ __forceinline__ T *output(int row, int t, int head, int slice) const {
    return reinterpret_cast<T *>(p.out.data) +
           (row * p.out.stride[0] + t * p.out.stride[1] + head * p.out.stride[3] + slice);
  }

  __device__ __forceinline__ uint32_t tiles(int stage) const { return shared + stage * at.stage; }
  // Where the chunk's token values are, once they are there.
  __device__ __forceinline__ uint32_t token_values() const {
    if (of_batch == 0) gate_wait(shared + at.batch_gates(part) + batch.stage * 16, batch.parity);
    return shared + at.values() +
           ((part * kBatchPlaces + batch.stage) * kBatch + of_batch) * int(sizeof(TokenValues));
  }
  // The warp is done with them; `end`: the piece has no more chunks.
  __device__ __forceinline__ void leave_token_values(bool end) {
    if (++of_batch < kBatch && !end && p.ncaptures == 0) return;
    of_batch = 0;
    __syncwarp();
    if ((thread & 31) == 0) gate_arrive(shared + at.batch_gates(part) + batch.stage * 16 + 8);
    batch.advance(kBatchPlaces);
  }
  // The next stage is full.
  __device__ __forceinline__ int next_note(const Place &next) const {
    gate_wait(shared + at.gates() + next.stage * 16, next.parity);
    return shared_int(shared + at.notes() + next.stage * 4);
  }
  __device__ __forceinline__ void free_stage() {
    __syncwarp();
    if ((thread & 31) == 0) gate_arrive(shared + at.gates() + place.stage * 16 + 8);
    place.advance(at.stages);
  }

  // ---- A piece

  // Only what changes the state.  A chunk's update is prepared while the one before is under way.
  __device__ __forceinline__ float walk_states(const Piece &w) {
    float total = 0, last = 0;
    uint32_t u[4][4];
    Place next = place;  // of the chunk that is prepared
    const auto prepare = [&](int &t, uint32_t (&to)[4][4]) {
      uint32_t x[4][4];
      float2 weight[8];
      const uint32_t v = token_values();
      const Lane l = here();
      load_columns(weight, v + offsetof(TokenValues, weight), l);
      const float2 over = shared_float2(v + offsetof(TokenValues, last));
      last = over.x;
      total += over.y;
      t += next_note(next) & kTokensMask;
      load_values(x, tiles(next.stage) + at.x(part), l);
      leave_token_values(t >= w.end);
      weigh_values(to, x, weight);
      next.advance(at.stages);
    };
    int t = w.begin;
    if (t < w.end) prepare(t, u);
#pragma unroll 1
    for (bool more = w.begin < w.end; more;) {
      uint32_t after[4][4];
      update(u, last, tiles(place.stage));
      more = t < w.end;
      if (more) prepare(t, after);
      products_wait<0>();
      settle(h);
      settle(u);
      free_stage();
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) u[k][i] = after[k][i];
    }
    return total;
  }

  // A chunk's S is found while the one before it is finished; its outputs are sent when the next
  // one's products are shown to the tensor cores: one barrier for both.
  __device__ __forceinline__ void walk_outputs(const Piece &w, int head, int slice) {
    const uint32_t M = shared + at.products() + part * kTile;
    const bool gated = p.z.given();
    const uint32_t target = shared + at.targets(part);
    if (thread == 0) shared_store(target, make_int4(w.row, head, slice, 0));
    float S[32];
    int note = 0;
    uint32_t turn = 0;    // of the two tiles for outputs
    bool unsent = false;  // the chunk before has outputs there
    const auto Y = [&](uint32_t turn) {
      return shared + at.outputs() + 2 * part * kTile + turn * kTile;
    };
    if (w.begin < w.end) {
      note = next_note(place);
      own_product(S, tiles(place.stage), tiles(place.stage) + at.kSide);
      products_wait<0>();
      settle(S);
    }
    const auto send = [&](int t) {
      if (thread == 0 && unsent) {
        const int4 to = shared_int4(target);
        send_tile(out_to, to.x, t - kChunk, to.y, to.z, Y(turn ^ 1));
      }
    };
    int t = w.begin;
#pragma unroll 1
    while (t < w.end) {
      bool captured;
#pragma unroll 1
      do {
        const uint32_t B = tiles(place.stage), C = B + at.kSide;
        float y[32];
        uint32_t x[4][4], u[4][4];
        OwnDecays decays;
        float2 grown[8], weight[8];
        const uint32_t v = token_values();
        // What comes from shared memory comes slowly while products are under way: asked for early.
        const Lane l = here();
        load_decays(decays, v, l);
        state_product(y, C);
        weigh_own(S, decays, l);
        load_values(x, B + at.x(part), l);
        if (thread == 0) tiles_read();  // the outputs of the chunk before the last
        show_to_products();
        load_columns(grown, v + offsetof(TokenValues, grown), l);
        load_columns(weight, v + offsetof(TokenValues, weight), l);
        const float last = shared_float(v + offsetof(TokenValues, last));
        meet(1 + part, kWarpgroup);
        send(t);
        products_wait<0>();
        settle(y);
        add_own(y, x, grown, M);
        weigh_values(u, x, weight);
        update(u, last, B);
        const int tokens = note & kTokensMask;
        captured = note & kCaptured;
        t += tokens;
        leave_token_values(t >= w.end);
        if (t < w.end) {
          Place next = place;
          next.advance(at.stages);
          note = next_note(next);
          own_product(S, tiles(next.stage), tiles(next.stage) + at.kSide);
        } else {
          products_go();
        }
        products_wait<2>();
        settle(y);
        if (gated)
          finish<true>(y, x, Y(turn), B + at.z(part), here());
        else
          finish<false>(y, x, Y(turn), 0, here());
        unsent = tokens == kChunk;
        if (!unsent) {
          meet(1 + part, kWarpgroup);
          store_some(shared_int4(target), Y(turn), t - tokens, tokens);
          meet(1 + part, kWarpgroup);
        }
        turn ^= 1;
        products_wait<0>();
        settle(h);
        settle(S);
        settle(u);
        free_stage();
      } while (t < w.end && !captured);
      if (captured) capture(int64_t(w.row) * p.seqlen + t - 1, head, slice);
    }
    show_to_products();
    meet(1 + part, kWarpgroup);
    send(t);
    if (thread == 0) tiles_read();
    meet(1 + part, kWarpgroup);
  }

  __device__ __forceinline__ void capture(int64_t position, int head, int slice) const {
    for (int64_t i = 0; i < p.ncaptures; ++i)
      if (read_index(p.capture_positions, i) == position) this->write(p.captured.h, i, head, slice);
  }

  __device__ __forceinline__ void zero_outputs(const Piece &w, int head, int slice) const {
    for (int t = w.begin + (thread >> 3); t < w.end; t += 16)
      *reinterpret_cast<uint4 *>(output(w.row, t, head, slice) + (thread & 7) * 8) =
          make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (part >= w.parts) {  // nothing to do but keep step
      for (int t = w.begin; t < w.end && !w.pad;) {
        t += next_note(place) & kTokensMask;
        free_stage();
      }
      return;
    }
    const int head = head_of(plan, w, part), slice = slice_of(plan, w, part);
    if (w.pad) {
      if (kOutputs) zero_outputs(w, head, slice);
      return;
    }
    const int64_t slot = slot_of(p.seqs.state_indices, p.seqs.pad, w.s).index;
    const View<1> &flags = p.seqs.has_initial_state;
    if (kOutputs && (!w.starts || w.kept >= 0)) {
      this->take_over(w);
    } else if (w.starts && p.initial.h.given() && (!flags.given() || *flags.at(w.s) != 0)) {
      this->read(p.initial.h, slot, head, slice);
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) h[i] = 0;
    }
    if (!kOutputs && w.kept >= 0) this->park(w.kept);
    float total = 0;
    if constexpr (kOutputs) {
      if (p.D.given()) {
        const Lane l = here();
        D[0] = load_at(p.D, head, slice + l.row);
        D[1] = load_at(p.D, head, slice + l.row + 8);
      }
      walk_outputs(w, head, slice);
    } else {
      total = walk_states(w);
    }
    if (w.to >= 0 && (!kOutputs || plan.chunks)) this->hand_on(w, total);
    if (kOutputs && w.ends && p.final.h.given()) this->write(p.final.h, slot, head, slice);
  }
};

}  // namespace ssmk::cuda
