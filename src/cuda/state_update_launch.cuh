// SPDX-License-Identifier: MIT
// Launching the kernels of a decode call: what Mamba-1, 2 and 3 share.
#pragma once

#include "core/status.h"
#include "cuda/launch.cuh"

namespace ssmk::cuda {

ssmk_status state_update_mamba3(const StateUpdateProblem &, const Call &);
// False if the call is none for their kernels; else *status says how it went.
bool state_update_mamba3_mma(const StateUpdateProblem &, const Call &, ssmk_status *status);
bool state_update_tied(const StateUpdateProblem &, const Call &, ssmk_status *status);

constexpr int64_t kMostGrid = 65535;        // blocks along y and z
constexpr int64_t kPlainShared = 48 << 10;  // bytes of shared memory that need no asking

// One decay for all states of a row.
inline bool one_decay(const StateUpdateProblem &p) { return p.A.stride[2] == 0 || p.dstate == 1; }

inline ssmk_status too_long(const Call &call, int64_t dstate, int64_t most) {
  return fail(SSMK_UNSUPPORTED, "%s: state: dstate must be at most %lld on CUDA, got %lld", call.op,
              (long long)most, (long long)dstate);
}

template <class Kernel>
ssmk_status allow_shared(const Call &call, Kernel kernel, int64_t bytes) {
  int most = 0;
  cudaError_t e =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, call.device);
  if (e == cudaSuccess && bytes > most)
    return fail(SSMK_UNSUPPORTED,
                "%s: state: headdim, dstate, rank and T of a head must fit into %d bytes of shared "
                "memory on this device, and take %lld",
                call.op, most, (long long)bytes);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  return e == cudaSuccess ? SSMK_OK : device_error(call, "preparing a kernel on", e);
}

// One launch after another where there are more rows or heads than a grid takes.  block.y: heads of
// a block, which divide nheads.
template <class Problem, class Kernel>
ssmk_status each_grid(Problem p, Kernel kernel, int64_t blocks, int64_t nheads, int64_t batch,
                      dim3 block, int64_t shared, const Call &call) {
  if (shared > kPlainShared) {
    if (const ssmk_status status = allow_shared(call, kernel, shared)) return status;
  }
  for (int64_t b = 0; b < batch; b += kMostGrid)
    for (int64_t h = 0; h < nheads; h += kMostGrid * block.y) {
      p.first_batch = decltype(p.first_batch)(b);
      p.first_head = decltype(p.first_head)(h);
      const int64_t heads = (nheads - h) / block.y;
      const dim3 grid(unsigned(blocks), unsigned(heads < kMostGrid ? heads : kMostGrid),
                      unsigned(batch - b < kMostGrid ? batch - b : kMostGrid));
      const ssmk_status status = launch(call, kernel, grid, block, size_t(shared), p);
      if (status != SSMK_OK) return status;
    }
  return SSMK_OK;
}

}  // namespace ssmk::cuda
