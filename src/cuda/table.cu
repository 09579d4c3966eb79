// SPDX-License-Identifier: MIT
// The CUDA backend's operations.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace ssmk::cuda {

ssmk_status state_update(const StateUpdateProblem &, const Call &);
ssmk_status causal_conv1d_update(const CausalConv1dUpdateProblem &, const Call &);
ssmk_status ssd_chunk(const SsdChunkProblem &, const Call &);
uint64_t ssd_chunk_workspace(const SsdChunkProblem &);
const char *ssd_chunk_path(const SsdChunkProblem &, int capability);

const Kernels &kernels() {
  static constexpr Kernels table = {
      {on_device<StateUpdateProblem, state_update>},
      {on_device<CausalConv1dUpdateProblem, causal_conv1d_update>},
      {on_device<SsdChunkProblem, ssd_chunk>, ssd_chunk_workspace},
      ssd_chunk_path,
  };
  return table;
}

bool built() { return true; }

}  // namespace ssmk::cuda
