// SPDX-License-Identifier: MIT
// Which kernel of state_update_channels.cuh takes a call, with how many batch rows a block.
#pragma once

#include "cuda/state_update_channels.cuh"
#include "cuda/state_update_launch.cuh"

namespace ssmk::cuda {

// Blocks on a multiprocessor: as many as the registers that the states take leave room for.
constexpr int channels_blocks(int states, bool tight, bool one, int ahead) {
  if (tight) return !one ? 5 : ahead == 1 ? 5 : ahead ? 6 : 7;
  if (states > 16) return 3;
  if (!one) return states > 8 ? 4 : 6;
  return ahead ? 4 : 6;
}

template <class S, class X, int kLogLanes, int kRows, int kChunks, bool kOne, int kAhead>
struct ChannelsKernel {
  static constexpr int kBlocks =
      channels_blocks(kRows * kChunks * kPack<S>, kLogLanes >= 0, kOne, kAhead) +
      (sizeof(S) == 2 && kLogLanes >= 0 && kOne && kAhead > 0);

  static int64_t blocks_of_a_row(const PackedProblem &p, const StateUpdateProblem &q) {
    const int64_t rows = int64_t(kChannelsThreads >> p.log_lanes) * kRows;
    return (q.headdim + rows - 1) / rows;
  }

  static ssmk_status run(ChannelsProblem p, const StateUpdateProblem &q, const Call &call) {
    int64_t shared = 0;
    if (kAhead > 0) shared = p.walk * q.ntokens * p.padded * 8;
    p.ring = int(shared / 16);
    if (kAhead > 1) shared += kAhead * kRows * kChunks * kChannelsThreads * 16;
    if (kAhead == 0) p.walk = 1;
    return each_grid(p, update_channels<S, X, kLogLanes, kRows, kChunks, kOne, kAhead, kBlocks>,
                     blocks_of_a_row(p, q), q.nheads, (q.batch + p.walk - 1) / p.walk,
                     kChannelsThreads, shared, call);
  }
};

constexpr int64_t kChannelsStage = 16 << 10;  // bytes of B and C in shared memory
constexpr int64_t kDeepBytes = 24 << 20;      // of states that hints may bring to the cache

// One batch row a thread for the smallest calls, whose blocks have the time to bring all they need
// to the cache.  Then as few rows a thread as make the call fit on the device at once, with one in
// advance; and where a block would stay for too long, more in advance.
template <class One, class Walk, class Far>
ssmk_status run_channels(ChannelsProblem p, const StateUpdateProblem &q, const Call &call) {
  int sms = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, call.device);
  if (error != cudaSuccess) return device_error(call, "asking about", error);
  const int64_t one = q.batch * q.nheads * One::blocks_of_a_row(p, q);
  const int64_t most = kChannelsStage / (q.ntokens * p.padded * 8);
  const bool smallest = one <= (q.ntokens > 1 ? 2 * sms : sms);
  if (smallest || most < 2) {
    p.deep = smallest;
    return One::run(p, q, call);
  }
  const int64_t blocks = q.batch * q.nheads * Walk::blocks_of_a_row(p, q);
  const int64_t at_once = sms * Walk::kBlocks;
  int64_t walk = (blocks + at_once - 1) / at_once;
  const bool far = walk > 8;
  if (far) walk = 8;
  p.walk = int(walk < 2 ? 2 : walk > most ? most : walk);
  p.hinted = sms * (far ? Far::kBlocks : Walk::kBlocks);
  p.deep = q.batch * q.nheads * q.headdim * q.dstate * size_of(q.state.dtype) <= kDeepBytes;
  return far ? Far::run(p, q, call) : Walk::run(p, q, call);
}

// A call for which there is a PackedProblem, and whose states have each a decay of their own.
template <class S, class X>
ssmk_status channels(const Cut &cut, const PackedProblem &packed, const StateUpdateProblem &q,
                     const Call &call) {
  constexpr int K = kPack<S>, kLog = K == 4 ? 2 : 1, kRows = 1 << kLog;
  const Slots &s = q.slots;
  const bool one = q.ntokens == 1 && !s.num_tokens.given() && !s.num_accepted.given() &&
                   !s.out_per_token && !q.intermediate.given();
  ChannelsProblem p = {packed};
  p.batch = int(q.batch);
  p.dt_shift = q.dt.dtype == DType::kBF16 ? 16 : 0;
  p.padded = cut.lanes() * cut.chunks * K;
  const bool tight = q.dstate == 16 && q.headdim % 32 == 0 && q.state.stride[2] == 16 &&
                     q.A.stride[1] == 16 &&
                     (!q.intermediate.given() || q.intermediate.stride[3] == 16);
  if (tight && one)
    return run_channels<ChannelsKernel<S, X, kLog, kRows, 1, true, 0>,
                        ChannelsKernel<S, X, kLog, kRows, 1, true, 1>,
                        ChannelsKernel<S, X, kLog, kRows, 1, true, 3>>(p, q, call);
  // In registers where they leave room for it.
  using Tokens = ChannelsKernel<S, X, kLog, kRows, 1, false, K == 4 ? 2 : 1>;
  if (tight)
    return run_channels<ChannelsKernel<S, X, kLog, kRows, 1, false, 0>, Tokens, Tokens>(p, q, call);
  if (cut.chunks == 3) return ChannelsKernel<S, X, -1, 1, 3, false, 0>::run(p, q, call);
  if (cut.chunks == 2) return ChannelsKernel<S, X, -1, 1, 2, false, 0>::run(p, q, call);
  if (cut.lanes() < 4) return ChannelsKernel<S, X, -1, 1, 1, false, 0>::run(p, q, call);
  using Any = ChannelsKernel<S, X, -1, 4, 1, true, 1>;
  using AnyTokens = ChannelsKernel<S, X, -1, kRows, 1, false, 2>;
  if (one) return run_channels<ChannelsKernel<S, X, -1, kRows, 1, true, 0>, Any, Any>(p, q, call);
  return run_channels<ChannelsKernel<S, X, -1, kRows, 1, false, 0>, AnyTokens, AnyTokens>(p, q,
                                                                                          call);
}

}  // namespace ssmk::cuda
