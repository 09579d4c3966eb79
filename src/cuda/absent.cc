// SPDX-License-Identifier: MIT
// Instead of the CUDA backend, in a build without CUDA.
#include "cuda/kernels.h"

namespace ssmk::cuda {

const Kernels &kernels() {
  static constexpr Kernels none;
  return none;
}

bool built() { return false; }
int device_count() { return 0; }

}  // namespace ssmk::cuda
