// SPDX-License-Identifier: MIT
// The CUDA backend's operations.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace ssmk::cuda {

ssmk_status state_update(const StateUpdateProblem &, const Call &);
ssmk_status causal_conv1d_update(const CausalConv1dUpdateProblem &, const Call &);

const Kernels &kernels() {
  static constexpr Kernels table = {
      {on_device<StateUpdateProblem, state_update>},
      {on_device<CausalConv1dUpdateProblem, causal_conv1d_update>},
  };
  return table;
}

bool built() { return true; }

}  // namespace ssmk::cuda
