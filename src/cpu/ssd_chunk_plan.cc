// SPDX-License-Identifier: MIT
#include "cpu/ssd_chunk_plan.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace ssmk::cpu {
namespace {

// Rows of a chunk.  The products with the state cost the same for any number; those within the
// chunk grow with it, the traffic of the state shrinks.  A multiple of the rows of a product's
// tile.
constexpr int64_t kRows = 48;

int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }

// Hands out consecutive arrays.
struct Room {
  int64_t used = 0;
  int64_t take(int64_t floats) {
    const int64_t at = used;
    used += whole(floats);
    return at;
  }
};

}  // namespace

SsdChunkPlan ssd_chunk_plan(const SsdChunkProblem &p) {
  SsdChunkPlan s;
  const Mamba3 &m = p.mamba3;
  s.tokens = std::max<int64_t>(1, kRows / m.rank);
  if (p.chunk_size > 0) s.tokens = std::min(s.tokens, p.chunk_size);
  s.tokens = std::max<int64_t>(1, std::min(s.tokens, p.seqlen));
  s.rows = s.tokens * m.rank;
  s.padded_rows = whole(s.rows);
  s.headdim = whole(p.headdim);
  s.dstate = whole(p.dstate);
  s.nangles = whole(m.nangles);
  s.shared_keys = !p.angles.given() && !m.B_bias.given() && !m.C_bias.given();

  const int threads = num_threads();
  const int64_t per_group = p.ngroups ? p.nheads / p.ngroups : 0, groups = p.seqs.nseq * p.ngroups;
  const int64_t most = std::max<int64_t>(1, std::min(kMaxHeadsPerTask, per_group));
  s.heads_per_task = most;
  // Even shares, and enough tasks for the threads.
  const auto tasks = [&](int64_t heads) { return groups * ((per_group + heads - 1) / heads); };
  while (s.heads_per_task > 1 &&
         (tasks(s.heads_per_task) < 2 * threads || tasks(s.heads_per_task) % threads != 0) &&
         tasks(s.heads_per_task) < 8 * threads)
    --s.heads_per_task;
  s.tasks_per_group = (per_group + s.heads_per_task - 1) / s.heads_per_task;
  if (per_group > 0) s.heads_per_task = (per_group + s.tasks_per_group - 1) / s.tasks_per_group;

  Room room;
  auto &a = s.at;
  const int64_t keys = s.rows * s.dstate, values = s.rows * s.headdim;
  const int64_t square = s.rows * s.padded_rows;
  const int64_t rank_rows = m.rank * s.headdim, rank_keys = m.rank * s.dstate;
  a.B = room.take(keys);
  a.C = room.take(keys);
  a.K = s.shared_keys ? a.B : room.take(keys);
  a.Q = s.shared_keys ? a.C : room.take(keys);
  a.K_transposed = room.take(s.dstate * s.padded_rows);
  a.G = room.take(square);
  a.M = room.take(square);
  a.U = room.take(values);
  a.Y = room.take(values);
  for (int64_t *row : {&a.log_decay, &a.log_decay_low, &a.decay, &a.dt, &a.gamma, &a.write,
                       &a.weight, &a.trap, &a.token})
    *row = room.take(s.padded_rows);
  for (int64_t *row : {&a.psi, &a.zeta, &a.phi, &a.before}) *row = room.take(rank_rows);
  for (int64_t *row : {&a.B_bias, &a.C_bias}) *row = room.take(rank_keys);
  for (int64_t *row : {&a.D, &a.norm, &a.gate, &a.sum}) *row = room.take(s.headdim);
  for (int64_t *tile : {&a.turn, &a.sine, &a.cosine}) *tile = room.take(s.tokens * s.nangles);
  a.heads = room.used;

  Room head;
  s.head_at.h = head.take(p.dstate * s.headdim);
  s.head_at.theta = head.take(s.nangles);
  s.head_at.theta_low = head.take(s.nangles);
  s.head_at.k = head.take(p.trap.given() ? rank_keys : 0);
  s.head_at.v = head.take(p.trap.given() ? s.headdim : 0);
  s.head_floats = head.used;
  // Room for the most heads, however many a task has: the workspace then depends on the number of
  // threads only by the number of workers.
  s.worker_floats = room.used + most * head.used;
  s.workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, tasks(s.heads_per_task))));
  return s;
}

uint64_t ssd_chunk_workspace(const SsdChunkProblem &p) { return ssd_chunk_plan(p).bytes(); }

}  // namespace ssmk::cpu
