// SPDX-License-Identifier: MIT
// Decode of Mamba-2 as models use it: which calls the fast kernels take, and in what shape.
#include <cmath>

#include "cuda/near.cuh"
#include "cuda/state_update_launch.cuh"
#include "cuda/state_update_mma.cuh"
#include "cuda/state_update_one.cuh"

namespace ssmk::cuda {
namespace {

constexpr int64_t kMostHeads = 1 << 15;  // group_of() is exact
constexpr int64_t kManyBlocks = 2048;    // enough for any chip

template <int Rank>
bool per_token(const View<Rank> &v, int group_axis, PerToken *to) {
  to->data = v.data;
  return narrow_stride(v.stride[0], v.dtype, &to->batch) &&
         narrow_stride(v.stride[1], v.dtype, &to->token) &&
         narrow_stride(v.stride[group_axis], v.dtype, &to->head);
}

bool per_head(const View<2> &v, PerHead *to) {
  to->data = v.data;
  return v.stride[1] == 0 && narrow_stride(v.stride[0], v.dtype, &to->head);
}

bool slot_list(const View<2> &v, SlotList *to) {
  to->data = v.data;
  return narrow_stride(v.stride[0], v.dtype, &to->batch);
}

bool tied(const StateUpdateProblem &q, TiedProblem *p) {
  const Slots &s = q.slots;
  if (!one_decay(q) || q.intermediate.given() || s.num_accepted.given() || s.out_per_token ||
      s.in_choices != 1 || s.keep_state || q.ntokens == 0)
    return false;
  if (s.pad.entries < 1 || s.pad.entries > INT32_MAX || q.batch > INT32_MAX ||
      q.nheads > kMostHeads || q.headdim > kMostHeads || q.ntokens > kMmaTokens)
    return false;
  const auto either = [&](DType t) { return t == DType::kF32 || t == q.x.dtype; };
  if (q.out.dtype != q.x.dtype || q.B.dtype != q.x.dtype || q.C.dtype != q.x.dtype ||
      !either(q.dt.dtype) || !either(q.A.dtype) || (q.z.given() && q.z.dtype != q.x.dtype) ||
      (q.D.given() && !either(q.D.dtype)) || (q.dt_bias.given() && !either(q.dt_bias.dtype)))
    return false;
  if (q.dt.stride[3] != 0 || q.A.stride[1] != 0 || q.state.stride[2] != q.dstate ||
      !packs_along(q.state, 3, 16))
    return false;

  const auto flag = [](bool given, uint32_t bit) { return given ? bit : 0; };
  const auto wide = [&](DType t, uint32_t bit) { return flag(t == DType::kF32, bit); };
  p->flags = flag(s.in.given(), kHasSlots) | flag(s.out.given(), kHasOutSlots) |
             flag(s.in.dtype == DType::kI64, kWideSlots) |
             flag(s.out.dtype == DType::kI64, kWideOutSlots) | wide(q.dt.dtype, kWideDt) |
             wide(q.A.dtype, kWideA) | flag(q.dt_bias.given(), kHasBias) |
             wide(q.dt_bias.dtype, kWideBias) | flag(q.dt_transform.softplus, kSoftplus) |
             flag(q.z.given(), kHasZ) | flag(q.D.given(), kHasD) | wide(q.D.dtype, kWideD);
  p->headdim = int(q.headdim), p->ntokens = int(q.ntokens);
  p->entries = uint32_t(s.pad.entries);
  const bool pads = s.pad.has_pad_slot && s.pad.pad_slot >= 0 && s.pad.pad_slot < s.pad.entries;
  p->pad_slot = pads ? uint32_t(s.pad.pad_slot) : p->entries;
  const uint64_t heads = uint64_t(q.nheads / q.ngroups);
  p->heads_inverse = uint32_t(((uint64_t(1) << 31) + heads - 1) / heads);
  p->dt_lo = q.dt_transform.clamp ? q.dt_transform.lo : -INFINITY;
  p->dt_hi = q.dt_transform.clamp ? q.dt_transform.hi : INFINITY;
  p->state = q.state.data;
  p->num_tokens = s.num_tokens;
  // What is not given is read all the same, in the place of something of the same axes.
  View<2> A;
  A.data = q.A.data, A.dtype = q.A.dtype, A.stride[0] = q.A.stride[0];
  return narrow_stride(q.state.stride[0], q.state.dtype, &p->state_slot) &&
         narrow_stride(q.state.stride[1], q.state.dtype, &p->state_head) &&
         slot_list(s.in, &p->in) && slot_list(s.out, &p->out_slots) && per_token(q.x, 2, &p->x) &&
         per_token(q.dt, 2, &p->dt) && per_token(q.z.given() ? q.z : q.x, 2, &p->z) &&
         per_token(q.out, 3, &p->out) && per_token(q.B, 3, &p->B) && per_token(q.C, 3, &p->C) &&
         per_head(A, &p->A) && per_head(q.D.given() ? q.D : A, &p->D) &&
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
