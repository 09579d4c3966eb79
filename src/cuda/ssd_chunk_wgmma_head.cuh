// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroups that each own the state of a head.
#pragma once

#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

template <class T, int kStates, int kHeads, bool kOutputs>
struct HeadOwner {
  static constexpr int kHeld = kSlice * kStates / kWarpgroup;  // states of a thread
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const TileSource &out_to;
  const FusedShared<kStates, kHeads, kOutputs> &at;
  uint32_t shared;
  int part;          // of the block
  int thread;        // of the warpgroup
  Place place;       // of the tiles
  Place batch;       // of the token values
  int of_batch = 0;  // chunk
  float h[kHeld];
  float D[2] = {0, 0};  // of the two rows

  // What follows from the thread: cheap, so found anew in every chunk.
  struct Lane {
    int lane, warp;
    // h[4 b + 2 i + j] is row `row + 8 i`, state 8 b + column + j; of y^T tokens are columns.
    int row, column;
    uint32_t values;    // the offset, in a tile of x, z or y, of its row of four 8 x 8 matrices
    uint32_t products;  // the same of the products within a chunk, of their first 16 columns

    __device__ __forceinline__ explicit Lane(int thread) {
      lane = thread & 31;
      warp = thread / 32;
      row = 16 * warp + lane / 4;
      column = 2 * (lane & 3);
      const int m = lane >> 3, r = lane & 7;
      values = (8 * (m >> 1) + r) * kTileRowBytes + (((2 * warp + (m & 1)) ^ r) << 4);
      products = tile_piece(16 * warp + 8 * (m & 1) + r, m >> 1);
    }
  };
  __device__ __forceinline__ Lane here() const { return Lane(afresh(thread)); }

  __device__ __forceinline__ HeadOwner(const SsdChunkProblem &p, const FusedPlan &plan,
                                       const TileSource &out_to,
                                       const FusedShared<kStates, kHeads, kOutputs> &at,
                                       uint32_t shared, int part)
      : p(p),
        plan(plan),
        out_to(out_to),
        at(at),
        shared(shared),
        part(part),
        thread(thread_number() % kWarpgroup) {}

  // ---- States

  __device__ __forceinline__ void read(const View<4> &v, int64_t entry, int head, int slice) {
    const int64_t size = size_of(v.dtype), next = v.stride[3] * size;
    const Lane l = here();
    const char *from = v.at(entry, head, slice + l.row, l.column);
#pragma unroll
    for (int b = 0; b < kStates / 8; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char *const q = from + i * 8 * v.stride[2] * size;
        h[4 * b + 2 * i] = load(q, v.dtype);
        h[4 * b + 2 * i + 1] = load(q + next, v.dtype);
      }
      from += 8 * next;
    }
  }
  __device__ __forceinline__ void write(const View<4> &v, int64_t entry, int head,
                                        int slice) const {
    const int64_t size = size_of(v.dtype), next = v.stride[3] * size;
    const int64_t lower = 8 * v.stride[2] * size;
    const Lane l = here();
    char *to = v.at(entry, head, slice + l.row, l.column);
    const bool pairs = v.dtype == DType::kF32 && v.stride[3] == 1 &&
                       (v.stride[0] | v.stride[1] | v.stride[2]) % 2 == 0 &&
                       reinterpret_cast<uintptr_t>(v.data) % 8 == 0;
    if (pairs) {
#pragma unroll
      for (int b = 0; b < kStates / 8; ++b) {
        *reinterpret_cast<float2 *>(to) = {h[4 * b], h[4 * b + 1]};
        *reinterpret_cast<float2 *>(to + lower) = {h[4 * b + 2], h[4 * b + 3]};
        to += 32;
      }
      return;
    }
#pragma unroll
    for (int b = 0; b < kStates / 8; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store(to + i * lower, v.dtype, h[4 * b + 2 * i]);
        store(to + i * lower + next, v.dtype, h[4 * b + 2 * i + 1]);
      }
      to += 8 * next;
    }
  }

  // To and from other blocks, as the threads hold them.
  __device__ __forceinline__ float *handed(int i) const {
    return plan.states + int64_t(i + part) * (kSlice * kStates) + thread * 4;
  }
  __device__ __forceinline__ void park(int place) const {
    float *const to = handed(place);
#pragma unroll
    for (int i = 0; i < kHeld; i += 4)
      *reinterpret_cast<float4 *>(to + i * kWarpgroup) = {h[i], h[i + 1], h[i + 2], h[i + 3]};
  }
  __device__ __forceinline__ void hand_on(const Piece &w, float total) const {
    park(w.to);
    if (plan.chunks) {
      __threadfence();
      meet(1 + part, kWarpgroup);
      if (thread == 0)
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(plan.flags + w.to + part)
                     : "memory");
    } else if (thread == 0) {
      plan.decays[w.to + part] = total;
    }
  }
  __device__ __forceinline__ void take_over(const Piece &w) {
    const int place = w.starts ? w.kept : w.from;
    if (w.waits) {
      if (thread == 0) {
        uint32_t there;
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                       : "=r"(there)
                       : "l"(plan.flags + w.from + part)
                       : "memory");
        } while (!there);
      }
      meet(1 + part, kWarpgroup);
    }
    const float *const from = handed(place);
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) {
      const float4 v = __ldcg(reinterpret_cast<const float4 *>(from + i * kWarpgroup));
      h[i] = v.x, h[i + 1] = v.y, h[i + 2] = v.z, h[i + 3] = v.w;
    }
  }

  // ---- A chunk

  // x^T of the chunk: v[k] is the fragment for tokens 16 k on.
  __device__ __forceinline__ void load_values(uint32_t (&v)[4][4], uint32_t tile,
                                              const Lane &l) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_turned(v[k], tile + l.values + k * 16 * kTileRowBytes);
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
            m[c][k] = pair<T>(s[0] * (near.x * far), s[1] * (near.y * far));
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
            m[c][k] =
                pair<T>(j > l.row + 8 * k ? 0.0f : first, j + 1 > l.row + 8 * k ? 0.0f : second);
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
      for (int i = 0; i < 4; ++i) a[k][i] = pair<T>(h[8 * k + 2 * i], h[8 * k + 2 * i + 1]);
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
        const float2 f = both<T>(x[k][i]), by = weight[2 * k + i / 2];
        u[k][i] = pair<T>(f.x * by.x, f.y * by.y);
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
      if (kGated) load_turned(z, z_tile + l.values + k * 16 * kTileRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = both<T>(x[k][i]);
        float first = fmaf(D[i & 1], f.x, y[8 * k + 2 * i]);
        float second = fmaf(D[i & 1], f.y, y[8 * k + 2 * i + 1]);
        if (kGated) {
          const float2 g = both<T>(z[i]);
          first *= silu(g.x);
          second *= silu(g.y);
        }
        out[i] = pair<T>(first, second);
      }
      store_turned(tile + l.values + k * 16 * kTileRowBytes, out[0], out[1], out[2], out[3]);
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
      if (read_index(p.capture_positions, i) == position) write(p.captured.h, i, head, slice);
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
      take_over(w);
    } else if (w.starts && p.initial.h.given() && (!flags.given() || *flags.at(w.s) != 0)) {
      read(p.initial.h, slot, head, slice);
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) h[i] = 0;
    }
    if (!kOutputs && w.kept >= 0) park(w.kept);
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
    if (w.to >= 0 && (!kOutputs || plan.chunks)) hand_on(w, total);
    if (kOutputs && w.ends && p.final.h.given()) write(p.final.h, slot, head, slice);
  }
};

}  // namespace ssmk::cuda
