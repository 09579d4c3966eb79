// SPDX-License-Identifier: MIT
#include "cpu/mla_decode_plan.h"

#include <algorithm>

#include "cpu/kernels.h"

namespace ssmk::cpu {
namespace {

// Tasks that keep the threads of a large machine busy: of a call, and of one row if its bits must
// not depend on the others.
constexpr int64_t kTasks = 64;
constexpr int64_t kTasksOfRow = 32;
static_assert(kTasks <= kMlaMostPieces && kTasksOfRow <= kMlaMostPieces,
              "the merge has room for the pieces of a row");

int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }
int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// An odd number of cache lines, so that rows below each other do not compete for one cache set.
int64_t spread_pitch(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

// Sizes that fit no address space become one that no caller has.
struct Bytes {
  uint64_t n = 0;

  uint64_t take(std::initializer_list<int64_t> sizes) {
    const uint64_t at = n;
    uint64_t bytes = 1;
    for (int64_t size : sizes)
      if (__builtin_mul_overflow(bytes, uint64_t(size), &bytes)) bytes = UINT64_MAX;
    if (bytes > UINT64_MAX - 63 || __builtin_add_overflow(n, (bytes + 63) / 64 * 64, &n))
      n = UINT64_MAX;
    return at;
  }
};

}  // namespace

int64_t MlaDecodePlan::piece(int64_t seqlen, int64_t total) const {
  return std::max(kMlaMinPiece, round_up(ceil_div(of_row ? seqlen : total, cuts), kMlaTile));
}

MlaDecodePlan mla_decode_plan(const MlaDecodeProblem &p) {
  MlaDecodePlan plan;
  plan.queries = p.ntokens * p.nheads;
  plan.width = p.latent + p.rope;
  plan.q_pitch = spread_pitch(plan.width);
  plan.out_pitch = spread_pitch(p.latent);
  if (p.batch == 0 || plan.queries == 0) return plan;
  plan.blocks = ceil_div(plan.queries, kMlaMostQueries);
  plan.block = round_up(ceil_div(plan.queries, plan.blocks), kMlaQueryBlock);
  plan.blocks = ceil_div(plan.queries, plan.block);

  // Blocks of queries are tasks already, and a partial output is as large as they are many.
  plan.of_row = p.batch_invariant;
  plan.cuts = std::max<int64_t>(1, (plan.of_row ? kTasksOfRow : kTasks) / plan.blocks);
  plan.most_pieces = p.batch * std::min(ceil_div(p.capacity, kMlaMinPiece), plan.cuts);
  if (!plan.of_row) plan.most_pieces = std::min(plan.most_pieces, p.batch + plan.cuts);

  Bytes bytes;
  plan.pieces_at = bytes.take({p.batch + 1, 8});
  plan.q_at = bytes.take({p.batch, plan.padded_queries(), plan.q_pitch, 4});
  plan.max_at = bytes.take({plan.most_pieces, plan.padded_queries(), 4});
  plan.sum_at = bytes.take({plan.most_pieces, plan.padded_queries(), 4});
  plan.out_at = bytes.take({plan.most_pieces, plan.padded_queries(), plan.out_pitch, 4});
  plan.bytes = bytes.n;
  return plan;
}

uint64_t mla_decode_workspace(const MlaDecodeProblem &p) { return mla_decode_plan(p).bytes; }

}  // namespace ssmk::cpu
