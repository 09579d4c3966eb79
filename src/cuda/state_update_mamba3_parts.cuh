// SPDX-License-Identifier: MIT
// What the two kernels of Mamba-3 on packed states share: their parameters, and how they load.
#pragma once

#include "cuda/near.cuh"
#include "cuda/state_update_mamba3_common.cuh"

namespace ssmk::cuda {

struct Mamba3Packed {
  Stepped<4> x, z, dt, angles, state, k_state, intermediate_angle, intermediate_v;
  Stepped<5> out, intermediate, intermediate_k;
  Stepped<5> projected[2];  // B and C
  Stepped<3> bias[2];
  Stepped<3> A, adt, trap, mimo_x, mimo_z, mimo_out, angle_state, v_state;
  Stepped<2> D, dt_bias, norm_weight;
  Stepped<1> in, one_out;  // slots again; one_out: one for all tokens
  Slots slots;
  DtTransform dt_transform;
  int first_batch, first_head, ntokens, headdim, dstate, rank, nangles;
  int packs, log_lanes, padded, passes, rows;  // rows: of all passes
  int log_quads, log_rows, log_angles;         // of the next powers of two
  float groups_per_head, tokens_per_quad;
  float norm_eps;
  bool rotary_half, trap_sigmoid;
  bool all_ahead;  // states of all passes are asked for at once
};

// Four elements of B or C with their biases, two by two.
struct QuadBits {
  uint2 value[2], bias[2];
};
// What a row of a token needs, as bits; of the first ranks, and of those to come one after another.
template <int kRanks>
struct RowBits {
  uint32_t x, before, z, dt, bias, rate, trap, D;
  uint32_t psi[kRanks], zeta[kRanks], phi[kRanks];
};
struct AngleBits {
  uint32_t angle, dt, bias;
};

}  // namespace ssmk::cuda
