// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroups that make keys and queries of B and C, for Mamba-3: biases
// added, turned by the angles so far, where they stand in the stage.
#pragma once

#include "cuda/ssd_chunk_turns.cuh"
#include "cuda/ssd_chunk_wgmma.cuh"

namespace ssmk::cuda {

// A tile's rows, where B or C are one or two tiles wide.
template <int kStates>
struct TileRows {
  static constexpr int kN = kStates, kRows = kChunk;
  static __device__ __forceinline__ uint32_t piece(int row, int piece) {
    return uint32_t(piece / 8 * kTile) + tile_piece(row, piece % 8);
  }
  static __device__ __forceinline__ uint32_t word(int row, int column) {
    return piece(row, column >> 3) + ((column & 7) << 1);
  }
};

// What turners have in shared memory, from at.turner() on: bytes from there.
struct TurnerPlaces {
  int angles, turns, totals, carry, bias, bytes;  // angles: of one of two chunks

  // angle_bytes: of one angle.
  __host__ __device__ TurnerPlaces(int nangles, int angle_bytes, int dstate)
      : angles(kChunk * nangles * angle_bytes),
        turns(2 * angles),
        totals(turns + kChunk * nangles * 4),
        carry(totals + 2 * kTurners * 4),
        bias(carry + 2 * nangles * 4),
        bytes(bias + 2 * dstate * 4) {}
  __host__ __device__ TurnerPlaces(const SsdChunkProblem &p)
      : TurnerPlaces(int(p.mamba3.nangles),
                     p.angles.given() ? (p.angles.dtype == DType::kF32 ? 4 : 2) : 0,
                     int(p.dstate)) {}
};

// The turns after a sequence that was walked in so many chunks.
__device__ __forceinline__ int carry_after(const TurnerPlaces &at, int chunks, int nangles) {
  return at.carry + (chunks & 1) * nangles * 4;
}

template <class T, int kStates, int kHeads, int kMode>
struct KeyTurner {
  static constexpr int kBarrier = 8;
  using Rows = TileRows<kStates>;
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedShared<kStates, kHeads, kMode> &at;
  uint32_t shared;
  char *generic;  // the same memory
  int thread;     // of kTurners
  Place place = {}, values = {};

  __device__ __forceinline__ void meet_all() const { meet(kBarrier, kTurners); }

  // A chunk's angles, rows of 16-byte pieces; zeros past the end.
  __device__ __forceinline__ void bring(const char *from, int64_t token, int row_bytes, uint32_t to,
                                        int tokens) const {
    const int pieces = row_bytes / 16;
#pragma unroll 1
    for (int i = thread; i < kChunk * pieces; i += kTurners) {
      const int row = i / pieces, piece = i % pieces;
      copy_ahead_if(row < tokens, to + i * 16, from + (row < tokens ? row * token : 0) + piece * 16);
    }
    end_copies();
  }

  __device__ __forceinline__ void begin(const TurnerPlaces &own, const Piece &w, int head) const {
    const Mamba3 &m = p.mamba3;
    char *const base = generic + at.turner();
    float *const bias = reinterpret_cast<float *>(base + own.bias);
#pragma unroll 1
    for (int i = thread; i < 2 * kStates; i += kTurners) {
      const bool of_B = i < kStates, given = of_B ? m.B_bias.given() : m.C_bias.given();
      bias[i] = !given ? 0.0f : load_at(of_B ? m.B_bias : m.C_bias, head, 0, i % kStates);
    }
    const View<1> &flags = p.seqs.has_initial_state;
    const bool initial =
        p.initial.angle.given() && (!flags.given() || *flags.at(w.s) != 0);
    const int64_t slot = slot_of(p.seqs.state_indices, p.seqs.pad, w.s).index;
    uint32_t *const carry = reinterpret_cast<uint32_t *>(base + own.carry);
#pragma unroll 1
    for (int i = thread; i < int(m.nangles); i += kTurners)
      carry[i] = initial ? turns_of_angle(load_at(p.initial.angle, slot, head, i)) : 0;
    meet_all();
  }

  __device__ __forceinline__ void turn(const TurnerPlaces &own, uint32_t stage, uint32_t values,
                                       int parity) const {
    const Mamba3 &m = p.mamba3;
    const int nangles = int(m.nangles);
    char *const base = generic + at.turner();
    const uint32_t mine = shared + at.turner();
    const float *const bias = reinterpret_cast<const float *>(base + own.bias);
    uint32_t *const totals = reinterpret_cast<uint32_t *>(base + own.totals);
    uint32_t *const carry = reinterpret_cast<uint32_t *>(base + own.carry);
    const KeyTiles tiles = {stage, stage + at.kSide, stage, stage + at.kSide, true};
    if (nangles > 0) {
      const TurnCut &cut = plan.turn_cut;
      sum_turns(cut, mine + parity * own.angles, p.angles.dtype, nangles,
                reinterpret_cast<const float *>(generic + (values - shared) +
                                                offsetof(TokenValues, dt)),
                mine + own.turns, totals, thread);
      meet_all();
      const uint32_t *const now = carry + parity * nangles;
      uint32_t *const next = carry + (parity ^ 1) * nangles;
      if (m.rotary_half)
        turn_keys<T, Rows, false, true>(cut, tiles, kStates, nangles, 0, mine + own.turns, totals,
                                        now, next, bias, thread);
      else
        turn_keys<T, Rows, false, false>(cut, tiles, kStates, nangles, 0, mine + own.turns, totals,
                                         now, next, bias, thread);
    }
    copy_keys<T, Rows, false>(tiles, kStates, nangles, m.rotary_half, 0, bias, thread);
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (w.pad) return;
    const TurnerPlaces own(p);
    const int head = head_of(plan, w, 0), nangles = int(p.mamba3.nangles);
    const int size = p.angles.dtype == DType::kF32 ? 4 : 2;
    const int64_t token = nangles ? p.angles.stride[1] * size : 0;
    const char *const angles = nangles ? p.angles.at(w.row, 0, head, 0) : nullptr;
    const uint32_t mine = shared + at.turner();
    const auto ask = [&](int t, int parity) {
      if (nangles && t < w.end)
        bring(angles + t * token, token, nangles * size, mine + parity * own.angles,
              min(w.end - t, kChunk));
      else
        end_copies();
    };
    begin(own, w, head);
    int parity = 0;
    ask(w.begin, 0);
#pragma unroll 1
    for (int t = w.begin; t < w.end; t += kChunk) {
      ask(t + kChunk, parity ^ 1);
      const uint32_t value_gate = shared + at.value_gates(0) + values.stage * 16;
      gate_wait(value_gate, values.parity);
      gate_wait(shared + at.gates() + place.stage * 16, place.parity);
      wait_for_all_but<1>();
      meet_all();
      turn(own, shared + place.stage * at.stage, shared + at.values(0, values.stage), parity);
      show_to_products();
      __syncwarp();
      if ((thread & 31) == 0) {
        gate_arrive(shared + at.ready_gate(place.stage));
        gate_arrive(value_gate + 8);
      }
      place.advance(at.stages);
      values.advance(kValuesPlaces);
      parity ^= 1;
      meet_all();  // before others' angles and sums are written over
    }
  }
};

}  // namespace ssmk::cuda
