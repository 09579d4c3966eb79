// SPDX-License-Identifier: MIT
// The fused prefill kernel's warpgroups that make keys and queries of B and C, for Mamba-3: biases
// added, turned by the angles so far, where they stand in the stage.  Two of them, chunk by chunk
// in turn: the one hands the angles after its chunk to the other.
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

// What turners have in shared memory, from at.turner() on: bytes from there.  Angles, turns and
// totals are there for each of the two.
struct TurnerPlaces {
  int angles, turns, totals, carry, bias, bytes;

  // angle_bytes: of one angle.
  __host__ __device__ TurnerPlaces(int nangles, int angle_bytes, int dstate)
      : angles(0),
        turns(2 * kChunk * nangles * angle_bytes),
        totals(turns + 2 * kChunk * nangles * 4),
        carry(totals + 2 * 2 * kWarpgroup * 4),
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
  static constexpr int kBatch = 2;  // tokens: short code is worth more than many under way
  using Rows = TileRows<kStates>;
  const SsdChunkProblem &p;
  const FusedPlan &plan;
  const FusedShared<kStates, kHeads, kMode> &at;
  uint32_t shared;
  char *generic;  // the same memory
  int thread;     // of the warpgroup
  int own;        // of the two

  // A chunk's angles, rows of 16-byte pieces; zeros past the end.
  __device__ __forceinline__ void bring(const char *from, int64_t token, int row_bytes, uint32_t to,
                                        int tokens) const {
    const int pieces = row_bytes / 16;
#pragma unroll 1
    for (int i = thread; i < kChunk * pieces; i += kWarpgroup) {
      const int row = i / pieces, piece = i % pieces;
      copy_ahead_if(row < tokens, to + i * 16,
                    from + (row < tokens ? row * token : 0) + piece * 16);
    }
    end_copies();
  }

  // By both: what does not change, and the angles before the first chunk.
  __device__ __forceinline__ void begin(const TurnerPlaces &places, const Piece &w,
                                        int head) const {
    const Mamba3 &m = p.mamba3;
    char *const base = generic + at.turner();
    const int first = own * kWarpgroup + thread, step = 2 * kWarpgroup;
    float *const bias = reinterpret_cast<float *>(base + places.bias);
#pragma unroll 1
    for (int i = first; i < 2 * kStates; i += step) {
      const bool of_B = i < kStates, given = of_B ? m.B_bias.given() : m.C_bias.given();
      bias[i] = !given ? 0.0f : load_at(of_B ? m.B_bias : m.C_bias, head, 0, i % kStates);
    }
    const View<1> &flags = p.seqs.has_initial_state;
    const bool initial = p.initial.angle.given() && (!flags.given() || *flags.at(w.s) != 0);
    const int64_t slot = slot_of(p.seqs.state_indices, p.seqs.pad, w.s).index;
    uint32_t *const carry = reinterpret_cast<uint32_t *>(base + places.carry);
#pragma unroll 1
    for (int i = first; i < int(m.nangles); i += step)
      carry[i] = initial ? turns_of_angle(load_at(p.initial.angle, slot, head, i)) : 0;
    meet(kBarrier + 2, step);
  }

  // A chunk whose tiles are in the stage.
  __device__ __forceinline__ void turn(const TurnerPlaces &places, uint32_t stage,
                                       uint32_t chunk) const {
    const Mamba3 &m = p.mamba3;
    const int nangles = int(m.nangles);
    char *const base = generic + at.turner();
    const float *const bias = reinterpret_cast<const float *>(base + places.bias);
    const KeyTiles tiles = {stage, stage + at.kSide, stage, stage + at.kSide, true};
    copy_keys<T, Rows, false, 1>(tiles, kStates, nangles, m.rotary_half, 0, bias, thread,
                                 kWarpgroup);
    if (nangles == 0) return;
    const TurnCut &cut = plan.turn_cut;
    uint32_t *const totals =
        reinterpret_cast<uint32_t *>(base + places.totals) + own * 2 * kWarpgroup;
    uint32_t *const carry = reinterpret_cast<uint32_t *>(base + places.carry);
    const uint32_t parity = chunk & 1;
    if (chunk > 0)
      gate_wait(shared + at.carry_gate(parity), ((chunk - parity) / 2 - (parity ^ 1)) & 1);
    const TurnBase before = turn_base(cut, nangles, totals, carry + parity * nangles,
                                      carry + (parity ^ 1) * nangles, thread);
    __syncwarp();
    if ((thread & 31) == 0) gate_arrive(shared + at.carry_gate(parity ^ 1));
    const uint32_t turns = shared + at.turner() + places.turns + own * kChunk * nangles * 4;
    if (m.rotary_half)
      turn_keys<T, Rows, false, true, kBatch>(cut, tiles, kStates, nangles, 0, turns, before, bias,
                                              thread);
    else
      turn_keys<T, Rows, false, false, kBatch>(cut, tiles, kStates, nangles, 0, turns, before, bias,
                                               thread);
  }

  __device__ __forceinline__ void walk(const Piece &w) {
    if (w.pad) return;
    const TurnerPlaces places(p);
    const int head = head_of(plan, w, 0), nangles = int(p.mamba3.nangles);
    const int size = p.angles.dtype == DType::kF32 ? 4 : 2;
    const int64_t token = nangles ? p.angles.stride[1] * size : 0;
    const char *const from = nangles ? p.angles.at(w.row, 0, head, 0) : nullptr;
    const uint32_t mine = shared + at.turner();
    const uint32_t angles = mine + places.angles + own * kChunk * nangles * size;
    begin(places, w, head);
    const auto ask = [&](int t) {
      if (nangles && t < w.end)
        bring(from + t * token, token, nangles * size, angles, min(w.end - t, kChunk));
    };
    ask(w.begin + own * kChunk);
    Place place = {own};  // there are two stages or more
#pragma unroll 1
    for (int t = w.begin + own * kChunk; t < w.end; t += 2 * kChunk) {
      const uint32_t chunk = (t - w.begin) / kChunk;
      const Place values = Place::of(chunk, kValuesPlaces);
      const uint32_t value_gate = shared + at.value_gates(0) + values.stage * 16;
      gate_wait(value_gate, values.parity);
      if (nangles > 0) {
        wait_for_all_but<0>();
        meet(kBarrier + own, kWarpgroup);
        sum_turns<kBatch>(plan.turn_cut, angles, p.angles.dtype, nangles,
                          reinterpret_cast<const float *>(generic + at.values(0, values.stage) +
                                                          offsetof(TokenValues, dt)),
                          mine + places.turns + own * kChunk * nangles * 4,
                          reinterpret_cast<uint32_t *>(generic + at.turner() + places.totals) +
                              own * 2 * kWarpgroup,
                          thread);
        meet(kBarrier + own, kWarpgroup);
        ask(t + 2 * kChunk);
      }
      if ((thread & 31) == 0) gate_arrive(value_gate + 8);
      gate_wait(shared + at.gates() + place.stage * 16, place.parity);
      turn(places, shared + place.stage * at.stage, chunk);
      show_to_products();
      __syncwarp();
      if ((thread & 31) == 0) gate_arrive(shared + at.ready_gate(place.stage));
      place.advance(at.stages);
      place.advance(at.stages);
    }
  }
};

}  // namespace ssmk::cuda
