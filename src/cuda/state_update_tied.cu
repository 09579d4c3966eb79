// SPDX-License-Identifier: MIT
// Decode of Mamba-2 as models use it: which calls the fast kernels take, and in what shape.
#include "cuda/state_update_launch.cuh"
#include "cuda/state_update_mma.cuh"
#include "cuda/state_update_one.cuh"
#include "cuda/state_update_tied_call.cuh"

namespace ssmk::cuda {
namespace {

constexpr int64_t kManyBlocks = 2048;  // enough for any chip

bool tied(const StateUpdateProblem &q, TiedProblem *p) {
  if (!one_decay(q) || q.slots.keep_state || q.ntokens > kMmaTokens) return false;
  const auto either = [&](DType t) { return t == DType::kF32 || t == q.x.dtype; };
  if (q.out.dtype != q.x.dtype || !either(q.A.dtype) || q.A.stride[1] != 0 || !tied_call(q, p))
    return false;
  p->flags |= q.A.dtype == DType::kF32 ? kWideA : 0;
  // What is not given is read all the same, in the place of something of the same axes.
  View<2> A;
  A.data = q.A.data, A.dtype = q.A.dtype, A.stride[0] = q.A.stride[0];
  return per_head(A, &p->A) && per_head(q.D.given() ? q.D : A, &p->D) &&
         per_head(q.dt_bias.given() ? q.dt_bias : A, &p->dt_bias);
}

// Can a thread read and write `rows` rows at once?
bool rows_fit(const StateUpdateProblem &q, int rows) {
  return q.headdim % rows == 0 && packs_of(q.x, 3, rows) && packs_of(q.out, 4, rows) &&
         (!q.z.given() || packs_of(q.z, 3, rows));
}

// And B and C beside a pack of `states`?
bool inputs_fit(const StateUpdateProblem &q, int64_t states) {
  return packs_of(q.B, 4, states) && packs_of(q.C, 4, states);
}

// ---- One token

// Blocks of a multiprocessor that leave each thread the registers that its states, and B and C
// beside them, want.
constexpr int one_blocks(int threads, int rows, int chunks, bool half) {
  const int words = rows * chunks * 4;
  const int registers = words <= 8 ? 48 : chunks > 1 ? 80 : half ? 64 : 56;
  return 65536 / (threads * registers);
}

// kThreads: of a block, for as many rows of a head as that makes; where heads have fewer, a block
// is for several.
template <class S, class X, int kLogLanes, int kChunks, int kRows, int kThreads>
ssmk_status run_one(const TiedProblem &p, const StateUpdateProblem &q, const Call &call) {
  int64_t threads = kThreads, heads = 1;
  const auto blocks = [&] {
    const int64_t rows = (threads >> kLogLanes) * kRows;
    return (q.headdim + rows - 1) / rows;
  };
  const int64_t wanted = (q.headdim << kLogLanes) / kRows;
  while (threads > 32 && blocks() * threads - wanted >= threads / 2) threads /= 2;
  while (threads * heads < kThreads && q.nheads % (2 * heads) == 0) heads *= 2;
  return each_grid(p,
                   update_one<S, X, kLogLanes, kChunks, kRows, kThreads,
                              one_blocks(kThreads, kRows, kChunks, dtype_for<S> == DType::kF16)>,
                   blocks(), q.nheads, q.batch, dim3(unsigned(threads), unsigned(heads)), 0, call);
}

// Four rows a thread where there is enough work to fill the chip all the same: what a thread
// prepares is then for more.  The bits do not depend on it.
template <class S, class X, int kLogLanes, int kChunks>
bool pick_one(const TiedProblem &p, const StateUpdateProblem &q, const Call &call,
              ssmk_status *status) {
  if constexpr (kChunks == 1) {
    const int64_t blocks = (q.batch * q.nheads * q.headdim << kLogLanes) / (4 * 64);
    if (blocks >= kManyBlocks && rows_fit(q, 4)) {
      *status = run_one<S, X, kLogLanes, kChunks, 4, 64>(p, q, call);
      return true;
    }
  }
  if (!rows_fit(q, 2)) return false;
  *status = run_one<S, X, kLogLanes, kChunks, 2, kChunks == 1 ? 128 : 64>(p, q, call);
  return true;
}

template <class S, class X>
bool one(const TiedProblem &p, const StateUpdateProblem &q, const Call &call, ssmk_status *status) {
  constexpr int K = kPack<S>;
  const Cut cut = cut_of(q.dstate, K);
  if (q.dstate != K * cut.lanes() * cut.chunks || !inputs_fit(q, K)) return false;
  switch (cut.chunks * 8 + cut.log_lanes) {
    case 8 + 1: return pick_one<S, X, 1, 1>(p, q, call, status);
    case 8 + 2: return pick_one<S, X, 2, 1>(p, q, call, status);
    case 8 + 3: return pick_one<S, X, 3, 1>(p, q, call, status);
    case 8 + 4: return pick_one<S, X, 4, 1>(p, q, call, status);
    case 8 + 5: return pick_one<S, X, 5, 1>(p, q, call, status);
    case 16 + 5: return pick_one<S, X, 5, 2>(p, q, call, status);
    case 24 + 2: return pick_one<S, X, 2, 3>(p, q, call, status);
    case 24 + 3: return pick_one<S, X, 3, 3>(p, q, call, status);
    case 24 + 4: return pick_one<S, X, 4, 3>(p, q, call, status);
    default: return false;
  }
}

// ---- Up to four tokens

constexpr int kMmaThreads = 128;

// Blocks that leave room for the states of a lane, and B and C beside them.
constexpr int mma_blocks(int words, bool wide) {
  return words <= 16 ? 6 : words <= 32 ? (wide ? 5 : 4) : words <= 64 ? 3 : 2;
}

template <class S, int kWords, int kGroups, int kRows>
ssmk_status run_mma(const TiedProblem &p, const StateUpdateProblem &q, const Call &call) {
  constexpr int kStates = kWords * kGroups * kRows;
  const int64_t tiles = (q.headdim + 8 * kRows - 1) / (8 * kRows);
  int64_t warps = kMmaThreads / 32;
  while (tiles % warps) --warps;
  return each_grid(
      p, update_mma<S, kWords, kGroups, kRows, kMmaThreads, mma_blocks(kStates, sizeof(S) == 4)>,
      tiles / warps, q.nheads, q.batch, int(32 * warps), 0, call);
}

template <class S>
bool mma(const TiedProblem &p, const StateUpdateProblem &q, const Call &call, ssmk_status *status) {
  constexpr bool kWide = sizeof(S) == 4;
  if (q.x.dtype != DType::kBF16 || !rows_fit(q, 2) || !inputs_fit(q, kWide ? 4 : 8)) return false;
  const auto run =
      [&](ssmk_status (*f)(const TiedProblem &, const StateUpdateProblem &, const Call &)) {
        *status = f(p, q, call);
        return true;
      };
  switch (q.dstate) {
    case 16: return run(run_mma < S, kWide ? 4 : 2, 1, 2 >);
    case 32: return run(run_mma < S, 4, kWide ? 2 : 1, 2 >);
    case 64: return run(run_mma < S, 4, kWide ? 4 : 2, 2 >);
    case 96: return run(run_mma < S, 4, kWide ? 6 : 3, 2 >);
    case 128: return run(run_mma < S, 4, kWide ? 8 : 4, kWide ? 1 : 2 >);
    case 256: return run(run_mma < S, 4, kWide ? 16 : 8, 1 >);
    default: return false;
  }
}

template <class S>
bool take(const TiedProblem &p, const StateUpdateProblem &q, const Call &call,
          ssmk_status *status) {
  if (q.ntokens > 1 || q.slots.num_tokens.given()) {
    if constexpr (sizeof(S) == 4 || dtype_for<S> == DType::kBF16) return mma<S>(p, q, call, status);
    return false;
  }
  if constexpr (sizeof(S) == 4) {
    if (q.x.dtype == DType::kF16) return one<S, __half>(p, q, call, status);
    if (q.x.dtype == DType::kBF16) return one<S, __nv_bfloat16>(p, q, call, status);
  }
  return q.x.dtype == dtype_for<S> && one<S, S>(p, q, call, status);
}

}  // namespace

bool state_update_tied(const StateUpdateProblem &q, const Call &call, ssmk_status *status) {
  TiedProblem p = {};
  if (!tied(q, &p)) return false;
  if (q.state.dtype == DType::kF32) return take<float>(p, q, call, status);
  if (q.state.dtype == DType::kF16) return take<__half>(p, q, call, status);
  return take<__nv_bfloat16>(p, q, call, status);
}

}  // namespace ssmk::cuda
