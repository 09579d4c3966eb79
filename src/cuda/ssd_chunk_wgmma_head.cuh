// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroups that each own the state of a head.
#pragma once

#include "cuda/ssd_chunk_wgmma_state.cuh"
#include "cuda/ssd_chunk_wgmma_turner.cuh"

namespace ssmk::cuda {

template <class T, int kStates, int kHeads, int kMode>
struct HeadOwner : HeldState<kStates, kHeads, kMode> {
  using Held = HeldState<kStates, kHeads, kMode>;
  using Held::at, Held::kOutputs, Held::h, Held::here, Held::kHeld, Held::p, Held::part,
      Held::place, Held::plan, Held::shared, Held::thread;
  const TileSource &out_to;
  char *generic;        // the shared memory
  Place values, made;   // of what is per token; of M
  float D[2] = {0, 0};  // of the two rows

  __device__ __forceinline__ HeadOwner(const SsdChunkProblem &p, const FusedPlan &plan,
                                       const TileSource &out_to,
                                       const FusedShared<kStates, kHeads, kMode> &at,
                                       uint32_t shared, char *generic, int part)
      : Held(p, plan, at, shared, part), out_to(out_to), generic(generic) {}

  // ---- A chunk

  // x^T of the chunk: v[k] is the fragment for tokens 16 k on.
  __device__ __forceinline__ void load_values(uint32_t (&v)[4][4], uint32_t tile,
                                              const Lane &l) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_transposed(v[k], tile + l.values + k * 16 * kTileRowBytes);
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

  // h exp(cs_last)
  __device__ __forceinline__ void fade(float last) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) h[i] *= last;
  }

  // h + u^T B, under way when this returns.
  __device__ __forceinline__ void update(const uint32_t (&u)[4][4], uint32_t B) {
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

  // ---- A piece

  // Only what changes the state.  A chunk's update is prepared while the one before is under way.
  __device__ __forceinline__ float walk_states(const Piece &w) {
    float total = 0, last = 0;
    uint32_t u[4][4];
    Place next = place;  // of the chunk that is prepared
    const auto prepare = [&](int &t, uint32_t (&to)[4][4]) {
      uint32_t x[4][4];
      float2 weight[8];
      const uint32_t v = this->token_values(values, part);
      const Lane l = here();
      load_columns(weight, v + offsetof(TokenValues, weight), l);
      const float2 over = shared_float2(v + offsetof(TokenValues, last));
      last = over.x;
      total += over.y;
      t += this->next_note(next, t, w.end) & kTokensMask;
      load_values(x, this->tiles(next.stage) + at.x(part), l);
      this->leave_token_values(values, part);
      weigh_values(to, x, weight);
      next.advance(at.stages);
    };
    int t = w.begin;
    if (t < w.end) prepare(t, u);
#pragma unroll 1
    for (bool more = w.begin < w.end; more;) {
      uint32_t after[4][4];
      fade(last);
      update(u, this->tiles(place.stage));
      more = t < w.end;
      if (more) prepare(t, after);
      products_wait<0>();
      settle(h);
      settle(u);
      this->free_stage();
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) u[k][i] = after[k][i];
    }
    return total;
  }

  __device__ __forceinline__ void walk_outputs(const Piece &w, int head, int slice) {
    const bool gated = p.z.given();
    const uint32_t target = shared + at.targets(part);
    if (thread == 0) shared_store(target, make_int4(w.row, head, slice, 0));
    uint32_t turn = 0;  // of the two tiles for outputs
    int t = w.begin;
#pragma unroll 1
    while (t < w.end) {
      bool captured;
#pragma unroll 1
      do {
        const int note = this->next_note(place, t, w.end), tokens = note & kTokensMask;
        const uint32_t B = this->tiles(place.stage), C = B + at.kSide;
        float y[32];
        uint32_t x[4][4], u[4][4];
        float2 grown[8], weight[8];
        const uint32_t v = this->token_values(values, part);
        const float last = shared_float(v + offsetof(TokenValues, last));
        state_product(y, C);
        const Lane l = here();
        load_values(x, B + at.x(part), l);
        load_columns(grown, v + offsetof(TokenValues, grown), l);
        fade(last);
        const uint32_t gate = shared + at.product_gates(part) + made.stage * 16;
        gate_wait(gate, made.parity);
        products_wait<0>();
        settle(y);
        load_columns(weight, v + offsetof(TokenValues, weight), here());
        add_own(y, x, grown, shared + at.products(part, made.stage));
        weigh_values(u, x, weight);
        update(u, B);
        captured = note & kCaptured;
        t += tokens;
        this->leave_token_values(values, part);
        products_wait<1>();
        settle(y);
        this->arrive(gate + 8);
        made.advance(kProductPlaces);
        const uint32_t Y = shared + at.outputs() + (2 * part + turn) * kTile;
        if (gated)
          finish<true>(y, x, Y, B + at.z(part), here());
        else
          finish<false>(y, x, Y, 0, here());
        if (thread == 0) tiles_read();  // the outputs of the chunk before
        show_to_products();
        meet(1 + part, kWarpgroup);
        const int4 to = shared_int4(target);
        if (tokens < kChunk) {
          store_some(to, Y, t - tokens, tokens);
          meet(1 + part, kWarpgroup);
        } else if (thread == 0) {
          send_tile(out_to, to.x, t - kChunk, to.y, to.z, Y);
        }
        turn ^= 1;
        products_wait<0>();
        settle(h);
        settle(u);
        this->free_stage();
      } while (t < w.end && !captured);
      if (captured) capture(int64_t(w.row) * p.seqlen + t - 1, head, slice);
    }
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

  // Mamba-3: the other states at the sequence's end.
  __device__ __forceinline__ void write_carried(const Piece &w, int64_t slot, int head) const {
    const HeadSlice all = {head, w.group, 0, 0, kSlice};
    if (w.begin < w.end) {
      const TurnerPlaces own(p);
      const int chunks = (w.end - w.begin + kChunk - 1) / kChunk;
      const uint32_t *const turns = reinterpret_cast<const uint32_t *>(
          generic + at.turner() + carry_after(own, chunks, int(p.mamba3.nangles)));
      write_parts(p, w.row, w.end - 1, all, p.final, slot, turns, thread, kWarpgroup);
    } else {
      HeadStates to = p.final;
      to.h = {};
      const View<1> &flags = p.seqs.has_initial_state;
      pass_states(p, !flags.given() || *flags.at(w.s) != 0, slot, all, p.initial, to, slot, thread,
                  kWarpgroup);
    }
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (part >= w.parts) {  // nothing to do but keep step
      for (int t = w.begin; t < w.end && !w.pad;) {
        t += this->next_note(place, t, w.end) & kTokensMask;
        this->free_stage();
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
    if constexpr (kMode == kSiso) this->add_before(w, slot, head);
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
    if constexpr (kMode == kSiso) write_carried(w, slot, head);
  }
};

}  // namespace ssmk::cuda
