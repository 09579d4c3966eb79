// SPDX-License-Identifier: MIT
// Mamba-2 and Mamba-3 prefill, in chunks of tokens: matrix products within a chunk and with the
// state before it (Dao and Gu 2024, section 6; ssd_chunk_head.h has the formulas).
//
// A task owns some heads of one group of one sequence and walks its tokens, so nothing but the
// state passes from chunk to chunk and everything else stays in the caches.  B and C are read once
// for all its heads, as is C B^T where no bias or rotation tells the heads apart.  A chunk ends
// where it is full, where its sequence ends, and after a token whose state is captured.
#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/runs.h"
#include "cpu/ssd_chunk_head.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

// The states of one head at one entry of a set of tensors, to and from scratch.
struct StateAccess {
  const SsdChunkProblem &p;
  const SsdChunkPlan &plan;
  int64_t head;

  void clear(HeadScratch &s) const {
    s.h_is_zero = s.before_is_zero = true;
    s.turned = false;
    const size_t angles = size_t(plan.nangles) * sizeof(float);
    if (angles) {
      std::memset(s.theta, 0, angles);
      std::memset(s.theta_low, 0, angles);
    }
  }

  void read(HeadScratch &s, const HeadStates &from, int64_t entry) const {
    clear(s);
    if (from.h.given()) {
      read_tile(s.h, plan.headdim, from.h.at(entry, head), from.h.dtype, from.h.stride[3],
                from.h.stride[2], p.dstate, p.headdim);
      for (int64_t n = 0; n < p.dstate; ++n)
        for (int64_t c = p.headdim; c < plan.headdim; ++c) s.h[n * plan.headdim + c] = 0;
      s.h_is_zero = false;
    }
    if (from.angle.given())
      read_row(s.theta, from.angle.at(entry, head), from.angle.dtype, from.angle.stride[2],
               p.mamba3.nangles);
    if (!from.k.given() && !from.v.given()) return;
    clear_before(s);
    for (int64_t r = 0; from.k.given() && r < p.mamba3.rank; ++r)
      read_row(s.k + r * plan.dstate, from.k.at(entry, r, head), from.k.dtype, from.k.stride[3],
               p.dstate);
    if (from.v.given())
      read_row(s.v, from.v.at(entry, head), from.v.dtype, from.v.stride[2], p.headdim);
    s.before_is_zero = false;
  }

  void clear_before(HeadScratch &s) const {
    std::memset(s.k, 0, size_t(p.mamba3.rank * plan.dstate) * sizeof(float));
    std::memset(s.v, 0, size_t(plan.headdim) * sizeof(float));
  }

  void write(HeadScratch &s, const HeadStates &to, int64_t entry) const {
    if (to.h.given()) {
      if (s.h_is_zero) {
        std::memset(s.h, 0, size_t(p.dstate * plan.headdim) * sizeof(float));
        s.h_is_zero = false;
      }
      write_tile(to.h.at(entry, head), to.h.dtype, to.h.stride[3], to.h.stride[2], s.h,
                 plan.headdim, p.dstate, p.headdim);
    }
    if (to.angle.given()) {
      for (int64_t i = 0; s.turned && i < p.mamba3.nangles; i += kLanes) {
        const Angle a = wrapped({load(s.theta + i), load(s.theta_low + i)});
        store(s.theta + i, a.high);
        store(s.theta_low + i, a.low);
      }
      write_row(to.angle.at(entry, head), to.angle.dtype, to.angle.stride[2], s.theta,
                p.mamba3.nangles);
    }
    if ((to.k.given() || to.v.given()) && s.before_is_zero) {
      clear_before(s);
      s.before_is_zero = false;
    }
    for (int64_t r = 0; to.k.given() && r < p.mamba3.rank; ++r)
      write_row(to.k.at(entry, r, head), to.k.dtype, to.k.stride[3], s.k + r * plan.dstate,
                p.dstate);
    if (to.v.given()) write_row(to.v.at(entry, head), to.v.dtype, to.v.stride[2], s.v, p.headdim);
  }
};

struct Task {
  const SsdChunkProblem &p;
  const SsdChunkPlan &plan;
  float *scratch;
  Sequence seq;
  int64_t group, first, nheads;  // heads first .. first + nheads of all

  HeadScratch head_scratch(int64_t i) const {
    float *const f = scratch + plan.at.heads + i * plan.head_floats;
    const auto &at = plan.head_at;
    return {f + at.h, f + at.theta, f + at.theta_low, f + at.k, f + at.v, true, true, false};
  }

  void zero_output(int64_t begin, int64_t end) const {
    const int64_t outputs = p.out.stride[2] ? p.mamba3.rank : 1;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t r = 0; r < outputs; ++r)
        for (int64_t h = first; h < first + nheads; ++h)
          zero_row(p.out.at(seq.row, t, r, h), p.out.dtype, p.out.stride[4], p.headdim);
  }

  void read_projections(int64_t begin, int64_t tokens) const {
    const auto read = [&](int64_t to, const View<5> &v) {
      for (int64_t r = 0; r < p.mamba3.rank; ++r)
        read_tile(scratch + to + r * plan.dstate, p.mamba3.rank * plan.dstate,
                  v.at(seq.row, begin, r, group), v.dtype, v.stride[1], v.stride[4], tokens,
                  p.dstate);
    };
    read(plan.at.B, p.B);
    read(plan.at.C, p.C);
  }

  // The first captured position in [begin, end), or -1.
  int64_t next_capture(int64_t begin, int64_t end) const {
    int64_t next = -1;
    for (int64_t i = 0; i < p.ncaptures; ++i) {
      const int64_t t = read_index(p.capture_positions, i) - seq.row * p.seqlen;
      if (t >= begin && t < end && (next < 0 || t < next)) next = t;
    }
    return next;
  }

  void capture(HeadScratch *heads, int64_t t) const {
    for (int64_t i = 0; i < p.ncaptures; ++i)
      if (read_index(p.capture_positions, i) == seq.row * p.seqlen + t)
        for (int64_t h = 0; h < nheads; ++h)
          StateAccess{p, plan, first + h}.write(heads[h], p.captured, i);
  }

  void walk(HeadScratch *heads, int64_t begin, int64_t end) const {
    int64_t captured = next_capture(begin, end);
    for (int64_t t = begin; t < end;) {
      int64_t stop = end - t < plan.tokens ? end : t + plan.tokens;
      if (captured >= 0 && captured < stop) stop = captured + 1;
      read_projections(t, stop - t);
      for (int64_t h = 0; h < nheads; ++h) {
        const int64_t after = end - stop < plan.tokens ? end - stop : plan.tokens;
        const TokenSpan next =
            h + 1 < nheads ? TokenSpan{first + h + 1, t, stop - t} : TokenSpan{first, stop, after};
        SsdHead{p, plan, scratch, heads[h], seq.row, first + h, group, t, stop - t, next}.run(h ==
                                                                                              0);
      }
      if (captured == stop - 1) {
        capture(heads, captured);
        captured = next_capture(stop, end);
      }
      t = stop;
    }
  }

  // Pads do nothing; a new id starts from zeros, the first one from the initial states.
  void walk_runs(HeadScratch *heads) const {
    each_run(
        p.seqs.seq_idx, seq.row, seq.begin, seq.end,
        [&](int64_t begin, int64_t end) { zero_output(begin, end); },
        [&](int64_t begin, int64_t end, bool fresh) {
          for (int64_t h = 0; fresh && h < nheads; ++h)
            StateAccess{p, plan, first + h}.clear(heads[h]);
          walk(heads, begin, end);
        });
  }

  void run() const {
    if (seq.pad) return zero_output(seq.begin, seq.end);
    HeadScratch heads[kMaxHeadsPerTask];
    for (int64_t h = 0; h < nheads; ++h) {
      const StateAccess access{p, plan, first + h};
      heads[h] = head_scratch(h);
      access.read(heads[h], seq.has_initial ? p.initial : HeadStates{}, seq.slot);
    }
    p.seqs.seq_idx.given() ? walk_runs(heads) : walk(heads, seq.begin, seq.end);
    for (int64_t h = 0; h < nheads; ++h)
      StateAccess{p, plan, first + h}.write(heads[h], p.final, seq.slot);
  }
};

}  // namespace

void ssd_chunk(const SsdChunkProblem &p) {
  if (p.seqs.nseq == 0 || p.nheads == 0) return;
  const SsdChunkPlan plan = ssd_chunk_plan(p);
  const int64_t per_group = p.nheads / p.ngroups;
  // The number of threads may have risen since the workspace was checked.
  const int64_t room = int64_t(p.workspace.bytes / (uint64_t(plan.worker_floats) * 4));
  const int workers = int(room < plan.workers ? room : plan.workers);
  parallel_workers(p.seqs.nseq * p.ngroups * plan.tasks_per_group,
                   p.batch * p.seqlen * p.nheads * (p.headdim + 1) * (p.dstate / 4 + 1), workers,
                   [&](int64_t i, int worker) {
                     const int64_t block = i % plan.tasks_per_group,
                                   group = i / plan.tasks_per_group % p.ngroups,
                                   s = i / plan.tasks_per_group / p.ngroups;
                     const int64_t begin = block * plan.heads_per_task, left = per_group - begin;
                     const Task task{
                         p,
                         plan,
                         static_cast<float *>(p.workspace.data) + worker * plan.worker_floats,
                         sequence(p.seqs, s, p.seqlen),
                         group,
                         group * per_group + begin,
                         left < plan.heads_per_task ? left : plan.heads_per_task};
                     task.run();
                   });
}

}  // namespace ssmk::cpu::SSMK_ISA
