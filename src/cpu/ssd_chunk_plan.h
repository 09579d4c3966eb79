// SPDX-License-Identifier: MIT
// How ssd_chunk cuts its work, and what it keeps in the workspace.
#pragma once

#include "core/problem.h"

namespace ssmk::cpu {

// Heads whose states a task carries along: the more, the fewer tasks compute C B^T.
constexpr int64_t kMaxHeadsPerTask = 8;

// The same at every instruction-set level: rows are padded to the widest vector.
struct SsdChunkPlan {
  int64_t tokens = 0;  // of a chunk, at the most
  int64_t rows = 0;    // tokens times rank: row i * rank + r is rank r of token i

  // Strides, in floats: headdim, dstate, nangles and rows rounded up to whole vectors.
  int64_t headdim = 0, dstate = 0, nangles = 0, padded_rows = 0;

  // Heads of a group share the products C B^T, unless biases or rotations tell them apart.
  bool shared_keys = true;
  int64_t heads_per_task = 1, tasks_per_group = 1;

  // A worker's scratch: where each array begins, in floats.
  struct Offsets {
    int64_t B, C, K, Q, K_transposed, G, M, U, Y;                             // tiles of a chunk
    int64_t log_decay, log_decay_low, decay, dt, gamma, write, weight, trap;  // of its rows
    int64_t token;                                                            // of its rows: int32
    int64_t psi, zeta, phi, B_bias, C_bias, D, norm, before, gate, sum;  // a row, or one a rank
    int64_t turn, sine, cosine;  // a row of angles for each token
    int64_t heads;               // then for each head of a task:
  } at = {};
  struct HeadOffsets {
    int64_t h, theta, theta_low, k, v;
  } head_at = {};
  int64_t head_floats = 0, worker_floats = 0;
  int workers = 1;

  uint64_t bytes() const { return uint64_t(workers) * uint64_t(worker_floats) * 4; }
};

SsdChunkPlan ssd_chunk_plan(const SsdChunkProblem &);

}  // namespace ssmk::cpu
